"""Batches depend only on (seed, step), crops are slices of clips, and cached clips equal encoded ones."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from avatar import files
from avatar.data import clip_encoding, puppet_frames
from avatar.data.bucketing import LengthBuckets
from avatar.data.clip_encoding import ClipSet, encode_clips
from avatar.data.puppet_frames import FrameBatches, PuppetFrames
from avatar.data.puppet_latents import LatentBatches, PuppetLatents
from avatar.models import bundle
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.puppet import speech
from avatar.puppet.clip import make_clip
from avatar.puppet.motion import CHANNELS
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import PixelWorld, StateWorld
from avatar.types import REGIONS, SAMPLES_PER_FRAME

AUDIO, TEXT, LATENTS, STRIDE = LogMel(mels=8), ByteTokenizer(96), 6, 4
CLIPS = ClipSet("train", "mixed", 3, LATENTS)
BUCKETS = LengthBuckets((2, 5), (0.5, 0.5), 10)


def autoencoder(mean: float = 0.0):
    target = "avatar.models.autoencoders.state.StateAutoencoder"
    return bundle.new({"_target_": target, "mean": [mean] * len(CHANNELS), "std": [1.0] * len(CHANNELS)})


def encode(cache, mean: float = 0.0):
    return encode_clips(CLIPS, StateWorld(), autoencoder(mean), AUDIO, ByteTokenizer(96), cache, 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clips(cache):
    return encode(cache)


def batches(clips, seed: int = 1, start: int = 0, stop: int = 40) -> LatentBatches:
    return LatentBatches(clips, BUCKETS, AUDIO, TEXT, seed, start, stop)


def full_clip(clips, n: int):
    return clips.batch(torch.tensor([n]), torch.tensor([0]), LATENTS, AUDIO, TEXT)


def test_a_batch_depends_only_on_seed_and_step(clips):
    assert batches(clips)[7].keys == batches(clips)[7].keys
    assert torch.equal(batches(clips)[7].latents, batches(clips)[7].latents)
    first, second = ([batches(clips, seed)[i].keys for i in range(4)] for seed in (1, 2))
    assert first != second and len(set(map(tuple, first))) == 4


def test_resumed_batches_equal_those_of_an_uninterrupted_run(clips):
    assert [batches(clips, start=5)[i].keys for i in range(3)] == [batches(clips)[i].keys for i in (5, 6, 7)]


def test_resumed_frames_equal_those_of_an_uninterrupted_run(cache):
    place = cache / "speech"
    started, first = (FrameBatches(StateWorld(), Scene(), "train", 1, 4, start, 2, 5, place) for start in (1, 0))
    assert started[0].keys == first[1].keys and torch.equal(started[0].video, first[1].video)
    assert not torch.equal(first[0].video, first[1].video)


def test_references_of_frame_crops_are_of_any_clip_of_the_batch(cache, monkeypatch):
    """Else a decoder that takes the reference learns that its expression is the crop's."""

    def constant(number: int, *args, **settings):
        clip = make_clip(number, *args, **settings)
        return replace(clip, states=np.full_like(clip.states, number % 1000))

    monkeypatch.setattr(puppet_frames, "make_clip", constant)
    batches = FrameBatches(StateWorld(), Scene(), "train", 1, 3, 0, 12, 5, cache / "speech")
    same = [
        float(v.mean()) == float(r.mean())
        for b in map(batches.__getitem__, range(3))
        for v, r in zip(b.video, b.reference, strict=True)
    ]
    assert 0.1 < np.mean(same) < 0.6  # 1/3 expected


def test_a_batch_without_crops_is_rejected(cache):
    with pytest.raises(ValueError, match="batch=0; expected"):
        PuppetFrames(StateWorld(), Scene(), frames=5, batch=0, steps=1, seed=1, workers=0, cache=str(cache))


def test_batches_have_all_lengths_and_a_bounded_size(clips):
    shapes = Counter(
        (batch.latents.shape[2], len(batch.latents)) for batch in map(batches(clips).__getitem__, range(40))
    )
    assert set(shapes) == {(2, 5), (5, 2)} and min(shapes.values()) >= 8


def test_lengths_follow_their_weights():
    rng, buckets = np.random.default_rng(0), LengthBuckets((1, 2), (1.0, 3.0), 4)
    drawn = Counter(buckets.draw(rng) for _ in range(2000))
    assert set(drawn) == {(1, 4), (2, 2)} and 0.7 < drawn[2, 2] / 2000 < 0.8


@pytest.mark.parametrize(
    "wrong",
    [((2, 3), (1.0,), 8), ((), (), 8), ((0,), (1.0,), 8), ((9,), (1.0,), 8)],
    ids=["one", "none", "0", "max_latents_per_batch"],
)
def test_invalid_buckets_are_rejected(wrong):
    with pytest.raises(ValueError, match=r"expected one weight|expected numbers|raise it"):
        LengthBuckets(*wrong)


@pytest.mark.parametrize("start, length", [(0, 2), (2, 3), (4, 2)])
def test_a_crop_is_a_slice_of_its_clip(clips, start, length):
    crop = clips.batch(torch.tensor([1]), torch.tensor([start]), length, AUDIO, TEXT)
    part = slice(start, start + length)
    full = full_clip(clips, 1)
    assert torch.equal(crop.latents, full.latents[:, :, part]) and torch.equal(crop.regions, full.regions[:, :, part])
    expected = full.conditioning.at(part)
    for name in ("audio", "audio_mask", "text", "text_event", "state", "emotion", "emotion_intensity", "gesture"):
        assert torch.equal(getattr(crop.conditioning, name), getattr(expected, name)), name


@pytest.mark.parametrize("start", range(4))
def test_the_reference_is_outside_of_the_crop(clips, start):
    crop = clips.batch(torch.tensor([2]), torch.tensor([start]), 3, AUDIO, TEXT)
    same = [torch.equal(crop.conditioning.reference[0, :, 0], r.float()) for r in clips.references[2]]
    places = {int(at) for at, chosen in zip(clips.reference_at[2], same, strict=True) if chosen}
    assert places and not places & set(range(start, start + 3))


def test_swapped_references_show_the_same_puppet_with_another_emotion(cache, tmp_path):
    directed = ClipSet("train", "mixed", 6, LATENTS)
    clips = encode_clips(directed, StateWorld(), autoencoder(), AUDIO, ByteTokenizer(96), cache, 0)
    frames = 1 + STRIDE * LATENTS
    made = [
        directed.make(n, frames + clip_encoding.frames_beyond(AUDIO, frames - 1), cache / "speech") for n in range(6)
    ]
    for n, clip in enumerate(made):
        later = [made[(n + step) % 6] for step in range(1, 6)]
        other = next(other for other in later if other.emotion[0] != clip.emotion[0])
        for i, at in enumerate(clip_encoding.reference_frames(frames)):
            video = StateWorld().video(replace(clip, states=other.states), at, at + 1)
            expected = autoencoder().encode(video[None])[0, :, 0].half()
            assert torch.equal(clips.swapped[n, i], expected)
            assert torch.equal(
                clips.references[n, i], autoencoder().encode(StateWorld().video(clip, at, at + 1)[None])[0, :, 0].half()
            )
    which, start = torch.tensor([0, 0]), torch.tensor([0, 0])
    batch = clips.batch(which, start, 3, AUDIO, TEXT, torch.tensor([False, True]))
    assert any(torch.equal(batch.conditioning.reference[1, :, 0], image.float()) for image in clips.swapped[0])
    assert any(torch.equal(batch.conditioning.reference[0, :, 0], image.float()) for image in clips.references[0])


def test_swapped_references_have_their_share_of_training_crops(clips):
    def share(swapped: float) -> float:
        loader = LatentBatches(clips, BUCKETS, AUDIO, TEXT, 1, 0, 200, swapped=swapped)
        own = [
            any(torch.equal(reference[:, 0], image.float()) for image in clips.references[int(key.split("@")[0])])
            for batch in (loader[i] for i in range(200))
            for reference, key in zip(batch.conditioning.reference, batch.keys, strict=True)
        ]
        return 1 - float(np.mean(own))

    assert share(0.0) == 0 and share(0.5) == pytest.approx(0.5, abs=0.06) and share(1.0) == 1


@pytest.mark.parametrize("swapped", [-0.1, 1.5, float("nan")])
def test_an_invalid_share_of_swapped_references_is_rejected(swapped):
    with pytest.raises(ValueError, match="expected a share in"):
        PuppetLatents(
            StateWorld(), autoencoder(), AUDIO, TEXT, CLIPS, CLIPS, BUCKETS, 1, 1, 0, "x", swapped_references=swapped
        )


def test_latents_and_audio_are_aligned(clips, cache):
    """Latent l has frames 1 + 4l … 4 + 4l, and the features of these frames with their contexts."""
    n, l = 0, 3
    clip = CLIPS.make(n, 1 + STRIDE * LATENTS + AUDIO.right_context + 1, cache / "speech")
    first = 1 + STRIDE * l
    states = torch.from_numpy(clip.states[first : first + STRIDE]).float()
    torch.testing.assert_close(clips.latents[n, :, l, 0, 0].float().view(-1, STRIDE), states.T, rtol=1e-3, atol=1e-3)
    expected = AUDIO.encode(torch.from_numpy(clip.own))[first - AUDIO.left_context :][: AUDIO.tokens(STRIDE)]
    torch.testing.assert_close(full_clip(clips, n).conditioning.audio[0, 0, l], expected, rtol=1e-3, atol=1e-3)
    assert len(clip.own) == len(clip.states) * SAMPLES_PER_FRAME


def test_cached_clips_equal_encoded_ones(clips, cache, monkeypatch):
    monkeypatch.setattr(clip_encoding, "_encode_clip", None)  # a second encoding would fail
    again = encode(cache)
    for name, tensor in vars(clips).items():
        assert torch.equal(getattr(again, name), tensor), name


@pytest.mark.usefixtures("unchecked")
def test_the_cache_key_does_not_change_with_use_of_the_encoder(monkeypatch):
    """Cached properties of an encoder, such as its silence, do not change its fingerprint."""

    def key() -> str:
        return clip_encoding.encoding_key(CLIPS, StateWorld(), autoencoder(), audio, ByteTokenizer(96))

    audio = LogMel(mels=8)
    before = key()
    assert audio.silence.shape == (1, audio.dim)
    assert key() == before
    other = next(name for name in speech.BACKENDS if name != speech.best_backend())
    monkeypatch.setattr(speech, "best_backend", lambda: other)
    assert key() != before


@pytest.mark.parametrize("other", [LogMel(mels=8, left_context=4, right_context=1), LogMel(mels=10)])
def test_clips_of_another_encoder_have_another_cache_key(other):
    first, second = (
        clip_encoding.encoding_key(CLIPS, StateWorld(), autoencoder(), audio, ByteTokenizer(96))
        for audio in (AUDIO, other)
    )
    assert first != second


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"can't write .*encoded-.*No space left.*free some space"):
        encode(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["speech"]


@pytest.mark.parametrize("short", ["train", "dev"])
def test_buckets_longer_than_clips_are_rejected(short):
    sets = {name: replace(CLIPS, split=name, latents=4 if name == short else 6) for name in ("train", "dev")}

    def data(lengths: tuple[int, ...]) -> PuppetLatents:
        buckets = LengthBuckets(lengths, (1.0,) * len(lengths), 10)
        return PuppetLatents(
            StateWorld(),
            autoencoder(),
            AUDIO,
            ByteTokenizer(96),
            **sets,
            buckets=buckets,
            steps=1,
            seed=1,
            workers=0,
            cache="nowhere",
        )

    data((2, 4))
    with pytest.raises(ValueError, match=f"crops of 5 latents; expected at most 4, the length of the {short} clips"):
        data((2, 5))


class Padding:
    """Features of words, padded to 64 and attended to with their padding, like UMT5's; counts its calls."""

    fingerprint = "padding"

    asked = 0

    def encode(self, prompts):
        Padding.asked += len(prompts)
        rows = [self.padded(torch.tensor([[len(word), 1 / 3] for word in prompt.split()])) for prompt in prompts]
        return torch.stack([features for features, _ in rows]), torch.stack([mask for _, mask in rows])

    def check(self, prompt):
        pass

    def padded(self, tokens):
        return torch.nn.functional.pad(tokens.float(), (0, 0, 0, 64 - len(tokens))), torch.ones(64, dtype=torch.bool)


def test_captions_are_stored_once_without_padding_in_half_precision(cache):
    text, directed = (
        Padding(),
        ClipSet("train", "mixed", 4, LATENTS, identities=1),
    )  # of one puppet, with equal captions
    made = encode_clips(directed, StateWorld(), autoencoder(), AUDIO, text, cache, 0)
    whole_clips = [directed.make(n, 1 + STRIDE * LATENTS + AUDIO.right_context + 1, cache / "speech") for n in range(4)]
    said = {c.captions[i] for c in whole_clips for i in c.captioned[1 + STRIDE // 2 :: STRIDE][:LATENTS]}
    assert made.text.dtype == torch.float16 and Padding.asked == len(made.text) == len(said) < 4 * LATENTS
    assert made.text.shape[1:] == (max(len(caption.split()) for caption in said), 2)
    cond = made.batch(torch.arange(4), torch.zeros(4, dtype=torch.long), LATENTS, AUDIO, text).conditioning
    for n, clip in enumerate(whole_clips):
        features, mask = text.encode([clip.captions[clip.captioned[1 + STRIDE // 2]]])
        event = cond.text_event[n, 0]
        torch.testing.assert_close(cond.text[n, event], features[0], rtol=1e-3, atol=1e-3)
        assert torch.equal(cond.text_mask[n, event], mask[0]) and cond.text.dtype == torch.float32


def test_prompts_of_a_batch_are_a_power_of_two(tmp_path):
    """Batches with other numbers of prompts would need a compiled graph each."""
    scene = Scene(framings={"half": 1.0}, commands_hz=2.0, moods=1.0)
    clips = ClipSet("train", "speaking", 4, 20, scene=scene)
    encoded = encode_clips(clips, StateWorld(), autoencoder(), AUDIO, TEXT, tmp_path, 0)
    own = {len(set(row.tolist())) for row in encoded.captioned}
    assert own - {1, 2, 4, 8}
    for n in range(4):
        cond = encoded.batch(torch.tensor([n]), torch.tensor([0]), 20, AUDIO, TEXT).conditioning
        used = len(set(encoded.captioned[n].tolist()))
        assert cond.text.shape[1] == cond.text_mask.shape[1] == 2 ** math.ceil(math.log2(used))
        assert cond.text_mask[0, :used].any(1).all() and not cond.text_mask[0, used:].any()


def test_regions_are_pooled_to_latents_in_space_and_time(tmp_path):
    target = "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder"
    net = bundle.new({"_target_": target, "channels": 4, "widths": [4, 4]}).eval()
    few = replace(CLIPS, count=1, latents=2)
    made = encode_clips(few, PixelWorld(64), net, AUDIO, TEXT, tmp_path, 0)
    clip = few.make(0, 1 + 2 * STRIDE + clip_encoding.frames_beyond(AUDIO, 2 * STRIDE), tmp_path / "speech")
    assert made.regions.shape == (1, len(REGIONS), 2, 8, 8) == (1, len(REGIONS), *made.latents.shape[2:])

    def pooled(start: int) -> np.ndarray:
        return clip.regions(64, start, start + STRIDE).reshape(len(REGIONS), STRIDE, 8, 8, 8, 8).mean(axis=(1, 3, 5))

    found = made.regions[0, :, 1].float().numpy()
    np.testing.assert_allclose(found, pooled(5), atol=1e-3)  # frames 5 to 8 are of the second latent
    assert min(np.abs(found - pooled(start)).max() for start in (4, 6)) > 3e-3


def test_latents_of_another_autoencoder_have_another_cache_key(clips, cache):
    before = set(cache.glob("encoded-*"))
    other = encode(cache, mean=0.5)
    assert len(set(cache.glob("encoded-*")) - before) == 1
    assert not torch.equal(other.latents, clips.latents)
    assert all(path.name == "speech" or path.suffix == ".safetensors" for path in cache.iterdir())  # no temporary files


def test_each_latent_has_the_caption_of_its_moment(cache):
    """Captions change within a clip; a crop has only its own, in its own order."""
    directed = ClipSet("train", "speaking", 4, LATENTS, scene=Scene(moods=1.0))
    made = encode_clips(directed, StateWorld(), autoencoder(), AUDIO, TEXT, cache, 0)
    whole_clips = [directed.make(n, 1 + STRIDE * LATENTS + AUDIO.right_context + 1, cache / "speech") for n in range(4)]
    assert any(len(set(clip.captioned[1 : 1 + STRIDE * LATENTS])) == 2 for clip in whole_clips)
    starts = torch.tensor([0, 1, 2, 3])
    cond = made.batch(torch.arange(4), starts, 3, AUDIO, TEXT).conditioning
    for n, clip in enumerate(whole_clips):
        for k in range(3):
            frame = 1 + STRIDE * (int(starts[n]) + k) + STRIDE // 2
            ids, mask = TEXT.encode([clip.captions[clip.captioned[frame]]])
            event = cond.text_event[n, k]
            assert torch.equal(cond.text[n, event], ids[0]) and torch.equal(cond.text_mask[n, event], mask[0])
