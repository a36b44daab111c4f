"""Streams of image-to-video networks equal offline generation with the same conditioning of the reference."""

from dataclasses import replace

import pytest
import torch

from avatar.conditioning import image_to_video
from avatar.diffusion.generation import BidirectionalSampler
from avatar.diffusion.plan import Plan
from avatar.models.autoencoders.wan import WanAutoencoder
from avatar.models.image_encoders.clip import CLIP
from avatar.nn.embeddings import ImageProjection
from avatar.streaming.session import Session
from avatar.types import Conditioning
from tests.conftest import make_net
from tests.models import speech_networks
from tests.streaming.test_session import (
    AUDIO,
    LATENT,
    SEED,
    STRIDE,
    TEXT,
    close,
    conditioning,
    noise_audio,
    offline,
    randomised,
    streamed,
    windows,
)

PLAN = Plan((1.0, 0.6), chunk=2, first_chunk=1, window=4, context="merged")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> CLIP:
    torch.manual_seed(1)
    return CLIP(speech_networks.clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def net(image):
    more = {"extra_in_channels": STRIDE + 4, "image": ImageProjection(image.dim, 24)}
    return make_net(channels=4, audio_features=AUDIO.dim, audio_tokens=AUDIO.tokens(STRIDE), **more)


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Repeat the grey latents from the fourth on, so that a short stream reaches them."""
    monkeypatch.setattr(image_to_video, "MAX_GREY_LATENTS", 4)


@pytest.fixture
def autoencoder():
    """An autoencoder whose latents of grey frames keep changing."""
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return randomised(WanAutoencoder({"base_dim": 2, "z_dim": 4, "num_res_blocks": 1} | statistics))


@pytest.fixture
def reference(autoencoder):
    return autoencoder.encode(torch.rand(1, 3, 1, 16, 16) * 2 - 1).detach()


@pytest.fixture
def opened(net, autoencoder, image, reference):
    def make() -> Session:
        return Session(net, autoencoder, AUDIO, TEXT, PLAN, latent=reference, seed=SEED, prompt="calm", image=image)

    return make


@pytest.fixture
def clip_conditioning(autoencoder, image, reference):
    """The conditioning of a complete clip with this speech."""

    def make(speech: torch.Tensor, latents: int) -> Conditioning:
        return image_to_video.with_image_conditioning(
            conditioning(reference, windows(speech, latents)), autoencoder, image
        )

    return make


def test_streamed_equals_offline_where_grey_latents_repeat(opened, clip_conditioning):
    session, speech = opened(), noise_audio(7)
    close(streamed(session, speech, 3001), offline(session, clip_conditioning(speech, 7)))


def test_the_conditioning_changes_the_output(opened, clip_conditioning):
    session, cond = opened(), clip_conditioning(noise_audio(3), 3)
    plain = offline(session, cond)
    for change in ({"image": -cond.image}, {"concat_latents": cond.concat_latents.roll(1, 2)}):
        assert (offline(session, replace(cond, **change)) - plain).abs().max() > 1e-3


def test_a_new_reference_holds_from_the_next_chunk_on(opened, autoencoder, reference):
    speech, session, other = noise_audio(6), opened(), torch.randn_like(reference)
    seen, chunk = [], session.rollout.chunk
    session.rollout.chunk = lambda cond: (seen.append(cond), chunk(cond))[1]
    session.push(speech[: 4 * LATENT])
    session.set_reference(latent=other)
    session.push(speech[4 * LATENT :])
    for cond, latent, start in zip(seen, (reference, reference, other), (0, 1, 3), strict=True):
        expected = image_to_video.encode_reference(latent, autoencoder, session.image, 4).apply(cond, start)
        assert torch.equal(cond.reference, latent)
        assert torch.equal(cond.image, expected.image) and torch.equal(cond.concat_latents, expected.concat_latents)
    assert not torch.equal(seen[1].image, seen[2].image)


def test_an_interrupt_restores_the_reference_of_its_chunk(opened, reference):
    """The first reference is set again: the restored sink is its own, and it is not encoded again."""
    speech, session = noise_audio(6), opened()
    full = streamed(opened(), speech, 1 << 20)
    session.push(speech[: 2 * LATENT])
    session.set_reference(latent=torch.randn_like(reference))
    session.push(speech[2 * LATENT :])
    session.set_reference(latent=reference)
    assert session.interrupt(STRIDE) == STRIDE
    assert torch.equal(streamed(session, speech[LATENT:], 700), full[:, STRIDE:])


def test_each_window_of_a_long_clip_follows_the_reference(net, clip_conditioning):
    cond, seen = clip_conditioning(noise_audio(5), 5), []

    class Spy(torch.nn.Module):
        def tokens(self, height, width):
            return net.tokens(height, width)

        def check_guidance(self, scale):
            pass

        def forward(self, x, t, cond, view, r=None):
            seen.append(cond.concat_latents[:, :, 1:])  # after those of the sink
            return torch.zeros_like(x)

    BidirectionalSampler(steps=1, window=2)(Spy(), cond, (0,))
    assert [part.shape[2] for part in seen] == [2, 2, 1]
    assert all(torch.equal(part, cond.concat_latents[:, :, : part.shape[2]]) for part in seen)


@pytest.mark.parametrize("changes", [{"image": None}, {"extra_in_channels": STRIDE}, {"image": ImageProjection(8, 24)}])
def test_a_network_with_other_conditioning_is_rejected(autoencoder, image, reference, changes):
    given = {"extra_in_channels": STRIDE + 4, "image": ImageProjection(image.dim, 24)} | changes
    net = make_net(channels=4, audio_features=AUDIO.dim, audio_tokens=AUDIO.tokens(STRIDE), **given)
    with pytest.raises(ValueError, match=r"image features of width 16 and 8 extra channels.*image_encoder=clip"):
        Session(net, autoencoder, AUDIO, TEXT, PLAN, latent=reference, image=image)
