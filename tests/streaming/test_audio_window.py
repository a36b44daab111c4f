"""Streaming audio windows: equal to offline features for every cut of the audio; rewinding; bounded memory."""

import pytest
import torch

from avatar.models.audio_encoders.log_mel import LogMel
from avatar.streaming.audio_window import AudioWindow

STRIDE, LATENT = 4, 4 * 640


def noise_audio(samples: int) -> torch.Tensor:
    return torch.randn(samples) * 0.2


def offline(encoder: LogMel, samples: torch.Tensor, latents: int) -> torch.Tensor:
    """As in training: the complete track encoded at once, after the silence of the encoder."""
    frames = latents * STRIDE + encoder.right_context
    padded = torch.nn.functional.pad(samples, (0, 640 * (frames + 1) - len(samples)))
    features = torch.cat([encoder.silence.expand(encoder.left_context, -1), encoder.encode(padded)[:frames]])
    return encoder.window(features, STRIDE)


def pushed(window: AudioWindow, samples: torch.Tensor, packet: int) -> torch.Tensor:
    return torch.cat([window.push(part) for part in samples.split(packet)])


@pytest.mark.parametrize(
    "packet, contexts", [(1, (1, 1)), (7, (3, 2)), (639, (9, 5)), (640, (3, 2)), (5000, (1, 1)), (1 << 20, (9, 5))]
)
def test_every_cut_gives_the_same_windows_as_training(packet, contexts):
    samples, encoder = noise_audio(LATENT + 900), LogMel(8, *contexts)
    window, reference = AudioWindow(encoder, STRIDE), AudioWindow(encoder, STRIDE)
    windows = torch.cat([pushed(window, samples, packet), window.finish()])
    assert torch.equal(windows, torch.cat([reference.push(samples), reference.finish()]))
    torch.testing.assert_close(windows, offline(encoder, samples, 2), rtol=1e-4, atol=1e-5)


def test_a_window_is_returned_with_the_sample_that_completes_it():
    encoder = LogMel(8)
    window = AudioWindow(encoder, STRIDE)
    samples_needed = window.samples_needed(1)
    assert samples_needed == (4 + 2) * 640 + 120
    samples = noise_audio(samples_needed)
    assert len(window.push(samples[:-1])) == 0
    assert len(window.push(samples[-1:])) == 1


def test_later_samples_than_needed_have_no_effect():
    encoder, samples = LogMel(8), noise_audio(2 * LATENT)
    samples_needed = AudioWindow(encoder, STRIDE).samples_needed(1)

    def first(change: slice) -> torch.Tensor:
        changed = samples.clone()
        changed[change] += 1.0
        return AudioWindow(encoder, STRIDE).push(changed)[0]

    plain = first(slice(0, 0))
    assert not torch.equal(first(slice(samples_needed - 20, samples_needed)), plain)
    assert torch.equal(first(slice(samples_needed, None)), plain)


@pytest.mark.parametrize("samples, latents", [(0, 0), (1, 1), (LATENT, 1), (LATENT + 1, 2)])
def test_finish_returns_a_window_for_every_started_latent(samples, latents):
    window = AudioWindow(LogMel(8), STRIDE)
    emitted = len(window.push(noise_audio(samples)))
    assert emitted + len(window.finish()) == latents


@pytest.mark.parametrize("back", [0, 1, 3])
def test_rewound_audio_has_no_effect(back):
    encoder, first, second = LogMel(8), noise_audio(5 * LATENT + 300), noise_audio(4 * LATENT)
    window = AudioWindow(encoder, STRIDE, history=3)
    latents = len(pushed(window, first, 500))
    window.rewind(latents - back)
    spliced = torch.cat([first[: (latents - back) * LATENT], second])
    fresh = AudioWindow(encoder, STRIDE)
    assert torch.equal(pushed(window, second, 333), fresh.push(spliced)[latents - back :])


def test_rewinding_to_the_start_restores_the_silence():
    encoder, samples = LogMel(8), noise_audio(3 * LATENT)
    window = AudioWindow(encoder, STRIDE, history=3)
    window.push(noise_audio(2 * LATENT))
    window.rewind(0)
    assert torch.equal(window.push(samples), AudioWindow(encoder, STRIDE).push(samples))


def test_a_rewind_beyond_the_history_is_rejected():
    window = AudioWindow(LogMel(8), STRIDE, history=1)
    window.push(noise_audio(5 * LATENT))
    with pytest.raises(ValueError, match="history of 1"):
        window.rewind(2)


def test_memory_stays_bounded():
    window = AudioWindow(LogMel(8), STRIDE, history=2)
    for _ in range(20):
        window.push(noise_audio(4000))
        held = window.samples.untyped_storage().nbytes() + window.features.untyped_storage().nbytes()
        assert held < 200_000
    window.push(noise_audio(20 * LATENT))
    assert window.samples.untyped_storage().nbytes() < 200_000  # not a view that keeps all of it alive
