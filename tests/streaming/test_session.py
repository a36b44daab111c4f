"""Streaming sessions: equal to offline generation for every cut of the audio; interrupts, controls, simulated clock."""

import math
from dataclasses import replace
from itertools import accumulate, count, pairwise
from types import SimpleNamespace

import pytest
import torch

from avatar.diffusion.plan import Plan
from avatar.diffusion.rollout import Noise, generate
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.autoencoders.causal_conv import CausalConvAutoencoder
from avatar.models.autoencoders.state import StateAutoencoder
from avatar.models.bundle import Origin
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.streaming import simulation
from avatar.streaming.session import Session
from avatar.streaming.simulation import Emitted, StreamStats, stream
from avatar.types import EMOTIONS, GESTURES, STATES, Conditioning
from tests.conftest import make_net

AUDIO, TEXT = LogMel(2, left_context=2, right_context=1), ByteTokenizer(16)
STRIDE, FRAME = 4, 640
LATENT = STRIDE * FRAME
PLAN = Plan((1.0, 0.6), chunk=2, first_chunk=1, window=4)
PLANS = [PLAN, replace(PLAN, context="merged"), replace(PLAN, context="noisy")]
SEED = 7


def randomised(module):
    """Add noise to all parameters, since zero-initialised layers would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    module.origin = Origin({})  # as loaded ones have
    return module.eval()


@pytest.fixture
def autoencoder():
    return randomised(CausalConvAutoencoder(channels=4, widths=(12, 24)))


@pytest.fixture
def net():
    return make_net(channels=4, patch=1, audio_features=AUDIO.dim, audio_tokens=AUDIO.tokens(STRIDE))


@pytest.fixture
def portrait():
    return torch.rand(1, 3, 1, 16, 16) * 2 - 1


@pytest.fixture
def opened(net, autoencoder, portrait):
    """A factory of sessions with the same networks, portrait and seed."""

    def make(plan: Plan = PLAN, prompt: str = "calm", **changes) -> Session:
        return Session(net, autoencoder, AUDIO, TEXT, plan, portrait, seed=SEED, prompt=prompt, **changes)

    return make


def noise_audio(latents: float) -> torch.Tensor:
    return torch.randn(int(latents * LATENT)) * 0.2


def windows(samples: torch.Tensor, latents: int) -> torch.Tensor:
    """The audio window of each latent, computed as in training."""
    frames = latents * STRIDE + AUDIO.right_context
    padded = torch.nn.functional.pad(samples, (0, (frames + 1) * FRAME))[: (frames + 1) * FRAME]
    features = torch.cat([AUDIO.silence.expand(AUDIO.left_context, -1), AUDIO.encode(padded)[:frames]])
    return AUDIO.window(features, STRIDE)


def conditioning(reference, own, other=None, prompt="calm", state=None, emotion=None, intensity=0.0) -> Conditioning:
    """The conditioning of a complete clip."""
    latents = len(own)
    ids, mask = TEXT.encode([prompt])

    def index(name, names):
        return torch.full((1, latents), names.index(name or "unspecified"))

    return Conditioning(
        reference=reference,
        audio=torch.stack([own, own * 0 if other is None else other])[None],
        audio_mask=torch.tensor([[True], [other is not None]]).expand(2, latents)[None],
        text=ids[None],
        text_mask=mask[None],
        text_event=torch.zeros(1, latents, dtype=torch.long),
        state=index(state, STATES),
        emotion=index(emotion, EMOTIONS),
        emotion_intensity=torch.full((1, latents), intensity),
        gesture=index(None, GESTURES),
    )


@torch.no_grad()
def offline(session: Session, cond: Conditioning) -> torch.Tensor:
    """Generate all latents of a clip, then decode them together."""
    latents = generate(session.net, cond, session.plan, Noise((SEED,))).latents
    return session.autoencoder.decode(torch.cat([cond.reference, latents], dim=2))[0, :, 1:]


def streamed(session: Session, speech: torch.Tensor, packet: int, other: torch.Tensor | None = None) -> torch.Tensor:
    parts = zip(speech.split(packet), [None] * len(speech) if other is None else other.split(packet), strict=False)
    return torch.cat([*(session.push(own, other) for own, other in parts), session.finish()], dim=1)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packet", [97, 640, 3001, 1 << 20])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.context)
def test_streamed_equals_offline_for_every_cut(opened, portrait, plan, packet):
    session, speech = opened(plan), noise_audio(8.3)  # chunks of 1 + 4 × 2 latents, the last one padded with silence
    expected = offline(session, conditioning(session.autoencoder.encode(portrait), windows(speech, 9)))
    frames = streamed(session, speech, packet)
    assert frames.shape[1] == math.ceil(len(speech) / FRAME)
    close(frames, expected[:, : frames.shape[1]])


def test_single_samples_give_bitwise_the_same_frames(opened):
    speech = noise_audio(1.5)
    assert torch.equal(streamed(opened(), speech, 1), streamed(opened(), speech, len(speech)))


def test_merged_context_equals_clean_context_without_rollback(opened):
    """The ring has room for a spare chunk all the same: a merged pass writes one chunk ahead of its window."""
    clean, merged = PLANS[:2]
    speech = noise_audio(15)
    frames = streamed(opened(merged, max_rollback=0), speech, 900)
    close(frames, streamed(opened(clean, max_rollback=0), speech, 900))
    close(frames, streamed(opened(merged), speech, 900))


def test_other_voice_and_controls_condition_the_network(opened, portrait):
    speech, other = noise_audio(5), noise_audio(5)
    session = opened()
    session.set_prompt("cheerful")
    session.set_state("listening")
    session.set_emotion("happy", 0.5)
    reference = session.autoencoder.encode(portrait)
    cond = conditioning(
        reference, windows(speech, 5), windows(other, 5), "cheerful", "listening", "happy", intensity=0.5
    )
    close(streamed(session, speech, 1000, other), offline(session, cond))


def test_streaming_in_the_state_world(portrait):
    autoencoder = randomised(StateAutoencoder(mean=[0.1, -0.2, 0.3], std=[0.5, 1.0, 2.0]))
    net = make_net(channels=12, patch=1, audio_features=AUDIO.dim, audio_tokens=AUDIO.tokens(STRIDE))
    face, speech = torch.randn(1, 3, 1, 1, 1), noise_audio(5)
    session = Session(net, autoencoder, AUDIO, TEXT, PLAN, face, seed=SEED, prompt="calm")
    cond = conditioning(autoencoder.encode(face), windows(speech, 5))
    close(streamed(session, speech, 1111), offline(session, cond))


def test_an_encoded_reference_equals_its_pixels(opened, net, autoencoder, portrait):
    speech, latent = noise_audio(3), autoencoder.encode(portrait).detach()
    session = Session(net, autoencoder, AUDIO, TEXT, PLAN, latent=latent, seed=SEED, prompt="calm")
    assert torch.equal(streamed(session, speech, 999), streamed(opened(), speech, 999))


def test_the_first_chunk_is_emitted_with_its_last_sample(opened):
    session, speech = opened(), noise_audio(2)
    samples_needed = (PLAN.first_chunk * STRIDE + AUDIO.right_context) * FRAME + AUDIO.lookahead_samples
    assert session.push(speech[: samples_needed - 1]).shape == (3, 0, 16, 16)
    assert session.push(speech[samples_needed - 1 : samples_needed]).shape == (3, STRIDE, 16, 16)


@pytest.mark.parametrize("samples", [0, 1, 640, 641, LATENT, LATENT + 1, 3 * LATENT])
def test_finish_gives_a_frame_for_every_640_samples_or_part(opened, samples):
    session = opened()
    frames = session.push(torch.randn(samples) * 0.2).shape[1] + session.finish().shape[1]
    assert frames == session.frames == math.ceil(samples / FRAME)
    assert session.finish().shape[1] == 0
    with pytest.raises(ValueError, match="after the end of the stream"):
        session.push(noise_audio(1))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.context)
def test_repeating_the_audio_after_an_interrupt_changes_nothing(opened, plan):
    """Cache, decoder, audio and noise are all rolled back: otherwise the frames would differ."""
    speech = noise_audio(14)
    full = streamed(opened(plan), speech, 700)
    session = opened(plan)
    session.push(speech[: int(10.7 * LATENT)])
    assert session.frames == 9 * STRIDE
    assert session.interrupt(7 * STRIDE - 1) == 5 * STRIDE  # a chunk that lacks its last frame is undone
    assert torch.equal(session.push(speech[5 * LATENT : 7 * LATENT + FRAME + AUDIO.lookahead_samples]), full[:, 20:28])
    assert session.interrupt() == 7 * STRIDE
    assert torch.equal(streamed(session, speech[7 * LATENT :], 900), full[:, 28:])


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.context)
def test_after_an_interrupt_the_old_audio_has_no_effect(opened, portrait, plan):
    old, new, session = noise_audio(12), noise_audio(6), opened(plan)
    first = session.push(old)[:, : 5 * STRIDE]
    assert session.interrupt(5 * STRIDE) == 5 * STRIDE
    frames = torch.cat([first, streamed(session, new, 1234)], dim=1)
    # Kept frames have the old right context; the following ones are conditioned on the new audio directly after them.
    spliced = windows(torch.cat([old[: 5 * LATENT], new]), 11)
    audio = torch.cat([windows(old, 11)[:5], spliced[5:]])
    close(frames, offline(session, conditioning(session.autoencoder.encode(portrait), audio)))


def test_an_interrupt_equals_a_session_that_received_only_the_required_audio(opened):
    old, new = noise_audio(12), noise_audio(4)
    eager, minimal = opened(), opened()
    eager.push(old)
    eager.interrupt(5 * STRIDE)
    minimal.push(old[: 5 * LATENT + FRAME + AUDIO.lookahead_samples])
    minimal.interrupt()
    assert torch.equal(streamed(eager, new, 500), streamed(minimal, new, 5000))


def test_an_interrupt_during_the_last_chunk_reopens_the_stream(opened):
    session, speech = opened(), noise_audio(5)
    frames = torch.cat([session.push(speech[: 4 * LATENT]), session.finish()], dim=1)
    assert frames.shape[1] == 4 * STRIDE
    assert session.interrupt() == 3 * STRIDE  # the truncated chunk is not complete
    assert torch.equal(session.push(speech[3 * LATENT :])[:, :0], frames[:, :0])
    assert session.finish().shape[1] == 2 * STRIDE


@pytest.mark.parametrize("shown, message", [(-1, "emitted frames"), (10_000, "emitted frames"), (4, "max_rollback")])
def test_an_interrupt_beyond_its_range_is_rejected(opened, shown, message):
    session = opened(max_rollback=2)
    session.push(noise_audio(12))
    with pytest.raises(ValueError, match=message):
        session.interrupt(shown)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.context)
def test_without_rollback_an_interrupt_reaches_only_the_last_emitted_frame(opened, plan):
    session, speech = opened(plan, max_rollback=0), noise_audio(12)
    frames = session.push(speech)
    with pytest.raises(ValueError, match="raise max_rollback"):
        session.interrupt(frames.shape[1] - 1)
    assert session.interrupt() == frames.shape[1]
    other = opened(plan)
    other.push(speech)
    other.interrupt()
    new = noise_audio(5)
    close(session.push(new), other.push(new))


def test_a_negative_rollback_is_rejected(opened):
    with pytest.raises(ValueError, match="max_rollback=-1"):
        opened(max_rollback=-1)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.context)
@pytest.mark.parametrize("control", ["prompt", "state", "emotion", "gesture", "reference"])
def test_a_control_changes_later_frames_only(opened, portrait, plan, control):
    speech = noise_audio(9)
    full = streamed(opened(plan), speech, len(speech))
    session = opened(plan)
    before = session.push(speech[: int(5.5 * LATENT)])
    change = {
        "prompt": lambda: session.set_prompt("furious"),
        "state": lambda: session.set_state("idle"),
        "emotion": lambda: session.set_emotion("angry"),
        "gesture": lambda: session.gesture("wave"),
        "reference": lambda: session.set_reference(-portrait),
    }[control]
    change()
    after = torch.cat([session.push(speech[int(5.5 * LATENT) :]), session.finish()], dim=1)
    n = before.shape[1]
    assert n == 5 * STRIDE
    assert torch.equal(before, full[:, :n])
    assert (after - full[:, n:]).abs().amax(dim=(0, 2, 3)).min() > 1e-4


def test_a_new_reference_is_the_same_with_merged_context(opened, portrait):
    """A pending context pass belongs to the old reference, the next chunk to the new one."""
    speech, frames = noise_audio(9), []
    for plan in PLANS[:2]:
        session = opened(plan)
        first = session.push(speech[: 4 * LATENT])
        session.set_reference(-portrait)
        frames.append(torch.cat([first, session.push(speech[4 * LATENT :])], dim=1))
    close(*frames)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.context)
def test_an_interrupt_keeps_controls(opened, portrait, plan):
    """Also one that was set after the frame to which the interrupt rolls back."""
    speech = noise_audio(11)
    late, early = opened(plan), opened(plan)
    early.push(speech[: 3 * LATENT + FRAME + AUDIO.lookahead_samples])
    early.set_reference(-portrait)
    late.push(speech[: 5 * LATENT + FRAME + AUDIO.lookahead_samples])
    late.set_reference(-portrait)
    late.push(speech[5 * LATENT + FRAME + AUDIO.lookahead_samples : 9 * LATENT])
    late.interrupt(3 * STRIDE)
    early.interrupt()
    assert torch.equal(late.push(speech[3 * LATENT :]), early.push(speech[3 * LATENT :]))


def test_a_gesture_ends_after_its_duration(opened):
    session = opened()
    session.gesture("wave", seconds=0.2)  # five frames: two latents
    audio = torch.zeros(2, 4, AUDIO.tokens(STRIDE), AUDIO.dim)
    wave = GESTURES.index("wave")
    assert session._conditioning(audio, 0).gesture.tolist() == [[wave, wave, 0, 0]]


def test_the_other_voice_is_unmasked_for_its_latents_only(opened):
    session, seen = opened(), []
    chunk = session.rollout.chunk
    session.rollout.chunk = lambda cond: (seen.extend(cond.audio_mask[0].T.tolist()), chunk(cond))[1]
    session.push(noise_audio(1.5))
    session.push(noise_audio(1), noise_audio(1))
    session.push(noise_audio(3))
    assert seen == [[True, False], [True, True], [True, True], [True, False], [True, False]]


def test_memory_stays_constant(opened):
    session, sizes = opened(Plan((1.0,), window=4, context="noisy")), []
    for packet in noise_audio(200).split(3 * LATENT):
        session.push(packet)
        held = [session.queued, *(part for w in session.windows for part in (w.samples, w.features))]
        held += [*session.cache.keys, *session.cache.values, *session.decoder.memory.values()]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in held))
        assert len(session.snapshots) <= 5 and len(session.other_voice) <= 8
    assert session.rollout.position > 190
    assert max(sizes[20:]) <= max(sizes[5:20])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.set_state("dancing"), "state='dancing'; choose one of unspecified, speaking"),
        (lambda s: s.set_emotion("hungry"), "emotion='hungry'"),
        (lambda s: s.set_emotion("happy", 1.5), "intensity=1.5"),
        (lambda s: s.gesture("bow"), "gesture='bow'"),
        (lambda s: s.gesture("wave", 0.0), "gesture of 0.0 seconds"),
        (lambda s: s.set_prompt("x" * 40), "expected at most 15"),
        (lambda s: s.set_reference(torch.zeros(1, 3, 1, 32, 32)), "crop it"),
        (lambda s: s.set_reference(torch.zeros(1, 3, 2, 16, 16)), "expected one frame"),
        (lambda s: s.set_reference(torch.zeros(1, 3, 1, 15, 16)), "multiples of 8"),
        (lambda s: s.set_reference(torch.zeros(1, 2, 1, 16, 16)), "can't encode"),
        (lambda s: s.set_reference(torch.full((1, 3, 1, 16, 16), torch.nan)), "not finite"),
        (lambda s: s.set_reference(), "give one of them"),
        (lambda s: s.push(torch.zeros(100), torch.zeros(99)), "100 samples of the avatar.s voice with 99"),
        (lambda s: s.push(torch.tensor([0.0, torch.nan])), "first at sample 1"),
        (lambda s: s.push(torch.zeros(2), torch.tensor([torch.inf, 0.0])), "audio `other` is not finite"),
    ],
)
def test_invalid_calls_are_rejected_and_change_nothing(opened, call, message):
    speech, session = noise_audio(3), opened()
    with pytest.raises(ValueError, match=message):
        call(session)
    assert torch.equal(streamed(session, speech, 700), streamed(opened(), speech, 700))


def test_none_is_the_unspecified_label(opened):
    session, speech = opened(), noise_audio(3)
    session.set_state("idle")
    session.set_state(None)
    session.set_emotion("unspecified")
    assert torch.equal(streamed(session, speech, 700), streamed(opened(), speech, 700))


def test_mismatched_components_are_rejected(net, autoencoder, portrait):
    with pytest.raises(ValueError, match="audio of 9 tokens"):
        Session(net, autoencoder, LogMel(2), TEXT, PLAN, portrait).push(noise_audio(1))
    with pytest.raises(ValueError, match="4 channels with an autoencoder of 8"):
        Session(net, randomised(CausalConvAutoencoder(8, (12, 24))), AUDIO, TEXT, PLAN, portrait)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.context)
def test_a_simulated_stream_equals_the_session(opened, plan):
    speech = noise_audio(7.4)
    records = list(stream(opened(plan), speech, packet=320))
    frames = torch.cat([record.frames for record in records], dim=1)
    assert torch.equal(frames, streamed(opened(plan), speech, 320))
    other = torch.cat([record.samples for record in records])
    assert len(other) == frames.shape[1] * FRAME
    assert torch.equal(other[: len(speech)], speech) and not other[len(speech) :].any()
    evaluations = len(plan.times) + (plan.context == "clean")
    assert all(record.evaluations == evaluations for record in records)


def test_controls_are_set_before_each_chunk_in_measured_time(opened, monkeypatch):
    clock, frames = [0.0], []
    monkeypatch.setattr(simulation, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def control(session: Session) -> None:
        clock[0] += 1.0
        frames.append(session.frames)

    records = list(stream(opened(), noise_audio(6), control=control))
    starts = [0, *accumulate(record.frames.shape[1] for record in records)]
    assert sorted(set(frames)) == starts
    assert sum(record.seconds for record in records) >= len(frames) - 1  # the last call is after the last chunk


@pytest.fixture
def ticking(monkeypatch):
    """Let every timed step take the same number of seconds."""

    def tick(seconds: float) -> None:
        monkeypatch.setattr(simulation, "time", SimpleNamespace(perf_counter=count(0.0, seconds).__next__))

    return tick


NEEDED = [((end * STRIDE + AUDIO.right_context) * FRAME + AUDIO.lookahead_samples) for end in (1, 3, 5)]


def test_a_fast_computer_is_limited_by_the_arrival_of_packets(opened, ticking):
    ticking(1e-4)
    records = list(stream(opened(), noise_audio(6), packet=700))
    for record, samples_needed in zip(records, NEEDED, strict=False):
        assert record.ready_at == pytest.approx(math.ceil(samples_needed / 700) * 700 / 16_000 + 1e-4)
    packets = [math.ceil(samples_needed / 700) for samples_needed in NEEDED]
    # one tick per packet, and one more per chunk
    assert records[0].seconds == pytest.approx(packets[0] * 1e-4)
    assert records[1].seconds == pytest.approx((1 + packets[1] - packets[0]) * 1e-4)


def test_a_slow_computer_falls_behind(opened, ticking):
    ticking(10.0)
    records = list(stream(opened(), noise_audio(6), packet=LATENT))
    assert records[0].ready_at == pytest.approx(LATENT / 16_000 + records[0].seconds)
    for before, after in pairwise(records):
        assert after.ready_at == pytest.approx(before.ready_at + after.seconds)


def test_an_empty_recording_and_a_used_session_are_rejected(opened):
    with pytest.raises(ValueError, match="0 samples"):
        next(stream(opened(), torch.zeros(0)))
    used = opened()
    used.push(noise_audio(1))
    with pytest.raises(ValueError, match="open a new one"):
        next(stream(used, noise_audio(1)))


def record(frames: int, seconds: float, ready_at: float, evaluations: int = 3) -> Emitted:
    return Emitted(torch.zeros(1, frames, 1, 1), torch.zeros(frames * FRAME), seconds, ready_at, evaluations)


def test_stream_statistics():
    # Frame 4 is due 0.16 s after the start and ready at 0.70 s; frame 12 is due after 0.48 s and ready at 0.90 s.
    records = [record(4, 0.1, 0.3, 2), record(8, 0.3, 0.7), record(8, 0.2, 0.9)]
    stats = StreamStats.of(records)
    assert stats.first_frame_s == pytest.approx(0.3)
    assert stats.stall_free_first_frame_s == pytest.approx(0.7 - 4 / 25)
    assert stats.chunk_p50_s == pytest.approx(0.2)
    assert stats.chunk_p99_s == pytest.approx(0.298)
    assert stats.real_time_factor == pytest.approx(0.6 / (20 / 25))
    assert stats.frames == 20
    assert stats.evaluations_per_chunk == pytest.approx(8 / 3)


def test_the_stall_free_start_is_the_earliest_one():
    records = [record(4, 0.1, 0.3 + 0.4 * i + 0.2 * (i % 3)) for i in range(9)]
    start = StreamStats.of(records).stall_free_first_frame_s

    def stalls(start: float) -> bool:
        return any(r.ready_at > start + 4 * i / 25 + 1e-9 for i, r in enumerate(records))

    assert not stalls(start)
    assert stalls(start - 1e-3)


def test_statistics_without_chunks_are_rejected():
    with pytest.raises(ValueError, match="no chunk"):
        StreamStats.of([])
