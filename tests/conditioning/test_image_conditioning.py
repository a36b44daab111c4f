"""Image-to-video conditioning equals that of Wan's pipeline, at any position of a stream."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPImageProcessorPil

from avatar.conditioning import image_to_video
from avatar.models.autoencoders.wan import WanAutoencoder
from avatar.models.bundle import Origin
from avatar.models.image_encoders.clip import CLIP
from avatar.types import join
from tests.conftest import CHANNELS, make_cond
from tests.models import speech_networks

# Of the depth of Wan 2.1's, so with the same receptive field, but narrow.
CONFIG = {"base_dim": 2, "z_dim": CHANNELS, "latents_mean": [0.1, 0.2, -0.3], "latents_std": [2.0, 1.0, 0.5]}
LONG_CLIP = 34  # latents: longer than the receptive field


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> CLIP:
    torch.manual_seed(1)
    return CLIP(speech_networks.clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKLWan:
    torch.manual_seed(2)
    return AutoencoderKLWan(**CONFIG).eval()


@pytest.fixture(scope="module")
def autoencoder(theirs) -> WanAutoencoder:
    net = WanAutoencoder(CONFIG)
    net._take(theirs)
    net.origin = Origin({})  # as loaded ones have
    return net.eval()


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(2, CHANNELS, 1, 2, 3)


def conditioning(reference: torch.Tensor, latents: int):
    return replace(make_cond(latents=latents), reference=reference)


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(theirs, autoencoder, reference) -> torch.Tensor:
    """Latents of a long grey video after the references, encoded at once by diffusers."""
    picture = autoencoder.decode(reference)
    video = torch.cat([picture, torch.zeros(2, 3, 4 * LONG_CLIP, *picture.shape[-2:])], dim=2)
    mean, std = (torch.tensor(CONFIG[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    return (theirs.encode(video).latent_dist.mode() - mean) / std


@pytest.mark.parametrize("latents", [1, 5])
def test_timeline_channels_are_grey_latents_with_mask_0(autoencoder, image, reference, expected, latents):
    cond = image_to_video.with_image_conditioning(conditioning(reference, latents), autoencoder, image)
    assert cond.concat_latents.shape == (2, 4 + CHANNELS, latents, 2, 3) and not cond.concat_latents[:, :4].any()
    torch.testing.assert_close(cond.concat_latents[:, 4:], expected[:, :, 1 : 1 + latents], rtol=1e-4, atol=1e-5)
    assert torch.equal(cond.image, image.encode(autoencoder.decode(reference)))


def test_conditioning_of_a_stream_equals_that_of_a_full_clip(autoencoder, image, reference, expected):
    conditions = image_to_video.encode_reference(reference, autoencoder, image, LONG_CLIP)
    assert conditions.channels.shape[2] == image_to_video.MAX_GREY_LATENTS < LONG_CLIP
    for start in (0, 3, image_to_video.MAX_GREY_LATENTS - 1, LONG_CLIP - 2, 10_000):
        channels = conditions.apply(conditioning(reference, 2), start).concat_latents
        place = 1 + min(start, LONG_CLIP - 2)
        torch.testing.assert_close(channels[:, 4:], expected[:, :, place : place + 2], rtol=1e-4, atol=1e-5)


def test_max_grey_latents_is_the_receptive_field_of_wans_encoder(expected):
    """Latents differ before it and are equal from it on."""
    change = (expected[:, :, 1:] - expected[:, :, -1:]).abs().amax((0, 1, 3, 4))
    assert (
        change[image_to_video.MAX_GREY_LATENTS - 1 :].max() < 1e-6
        and change[image_to_video.MAX_GREY_LATENTS - 7] > 1e-4
    )


def test_sink_channels_are_the_reference_with_mask_1(autoencoder, image, reference):
    cond = image_to_video.with_image_conditioning(conditioning(reference, 3), autoencoder, image)
    channels = join([cond.blank(1), cond], "l").concat_latents
    assert torch.equal(channels[:, :4, 0], torch.ones(2, 4, 2, 3)) and torch.equal(
        channels[:, 4:, 0], reference[:, :, 0]
    )
    assert torch.equal(channels[:, :, 1:], cond.concat_latents)


def test_other_networks_have_no_conditioning_and_no_cost(autoencoder, reference, monkeypatch):
    cond = conditioning(reference, 3)
    for work in ("decode", "encoder_stream", "to"):
        monkeypatch.setattr(autoencoder, work, lambda *_: pytest.fail("the autoencoder was used"))
    assert image_to_video.with_image_conditioning(cond, autoencoder, None) is cond
    assert (
        image_to_video.encode_reference(reference, autoencoder, None, 3).apply(cond) is cond
        and cond.blank(1).concat_latents is None
    )


@pytest.mark.slow  # importing diffusers' pipelines is slow
def test_conditioning_equals_that_of_wans_pipeline(theirs, autoencoder, image, reference):
    from diffusers import WanImageToVideoPipeline

    processor = CLIPImageProcessorPil(**image.processor.to_dict())
    pipeline = SimpleNamespace(
        vae=theirs,
        image_encoder=image.net,
        image_processor=processor,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        config=SimpleNamespace(expand_timesteps=False),
        _execution_device="cpu",
    )
    with torch.no_grad():
        cond = image_to_video.with_image_conditioning(conditioning(reference, 20), autoencoder, image)
        picture = autoencoder.decode(reference)[:1]
        _, channels = WanImageToVideoPipeline.prepare_latents(
            pipeline, picture[:, :, 0], 1, CHANNELS, 16, 24, 81, torch.float32, "cpu"
        )
        shown = ((picture[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        features = WanImageToVideoPipeline.encode_image(pipeline, shown, "cpu")
    torch.testing.assert_close(cond.concat_latents[:1], channels[:, :, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cond.image[:1], features, rtol=1e-4, atol=1e-5)
    sink = cond.blank(1).concat_latents[:1]
    assert torch.equal(sink[:, :4], channels[:, :4, :1])
    # Wan encodes the image; here the reference is a latent, and its image is decoded.
    torch.testing.assert_close(autoencoder.encode(picture), channels[:, 4:, :1], rtol=1e-4, atol=1e-5)
