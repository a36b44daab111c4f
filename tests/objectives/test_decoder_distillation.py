"""A small decoder learns what a large one draws, leaves its encoder alone, and goes by the large one's name."""

import pytest
import torch

from avatar.models import bundle
from avatar.models.autoencoders.distilled import DistilledAutoencoder, new_distilled
from avatar.models.autoencoders.state import StateAutoencoder
from avatar.objectives.decoder_distillation import DecoderDistillation
from avatar.objectives.optim import WarmupDecay
from avatar.objectives.weighting import RegionWeights
from avatar.protocols import VideoAutoencoder
from avatar.types import REGIONS, Bundle, Frames
from tests.stages import FILTERS, FRAMES, fitted, random_autoencoder

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]


@pytest.fixture
def teacher(tmp_path):
    return bundle.load(str(random_autoencoder(tmp_path / "teacher.safetensors")))


def make_module(teacher) -> DecoderDistillation:
    module = DecoderDistillation(
        new_distilled(teacher, 8), teacher, torch.optim.Adam, 0.1, RegionWeights(lips=4.0), schedule=WarmupDecay(100)
    )
    module.log = lambda *_, **__: None
    module.net.train()
    return module


def make_frames(batch: int = 4) -> Frames:
    """Smooth images with a little motion."""
    small = torch.randn(batch, 3, 4, 3, 4)
    video = torch.nn.functional.interpolate(small, (10, 24, 32), mode="trilinear").clamp(-1, 1)
    return Frames(video[:, :, :9], video[:, :, 9:], torch.rand(batch, len(REGIONS), 9, 24, 32), ["a"] * batch)


def learn(module: DecoderDistillation, batch: Frames, steps: int) -> list[float]:
    optimizer = torch.optim.Adam([p for p in module.net.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_falls(teacher):
    losses = learn(make_module(teacher), make_frames(2), 40)
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


@torch.no_grad()
def test_a_linear_decoder_is_fitted_at_the_start(teacher):
    """The teacher's convolutions silenced, its decoder is a linear map of each latent pixel: so is the start."""
    for parameter in teacher.decoder[-1].parameters():
        parameter.zero_()
    net, latents = new_distilled(teacher, 8).eval(), torch.randn(4, 4, 3, 4, 4)
    net.start_from(latents, teacher.decode(latents))
    other = torch.randn(2, 4, 3, 4, 4)
    other_frames = teacher.decode(other)
    assert (net.decode(other) - other_frames).abs().max() < 1e-2 * other_frames.std()


def test_the_encoder_and_its_statistics_do_not_change(teacher):
    module, batch = make_module(teacher), make_frames(2)
    before = {name: w.clone() for name, w in module.net.state_dict().items()}
    learn(module, batch, 2)
    changed = {name for name, w in module.net.state_dict().items() if not torch.equal(w, before[name])}
    assert changed and not any(name.startswith("encoder.") for name in changed)
    assert torch.equal(module.net.encode(batch.video), teacher.encode(batch.video))


def test_another_teacher_is_rejected(teacher, tmp_path):
    weights = {name: w + 0.01 for name, w in teacher.state_dict().items()}
    bundle.write(Bundle("autoencoder", weights, teacher.origin.config), tmp_path / "other.safetensors")
    other = bundle.load(str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="whose latents the decoder is for"):
        DecoderDistillation(
            new_distilled(teacher, 8), other, torch.optim.Adam, 0.1, RegionWeights(lips=4.0), schedule=WarmupDecay(100)
        )


def test_untrained_or_state_autoencoder_is_rejected(teacher):
    with pytest.raises(ValueError, match="load it from a bundle"):
        new_distilled(bundle.new(teacher.origin.network), 8)
    with pytest.raises(ValueError, match="autoencoder of images"):
        DistilledAutoencoder(StateAutoencoder([0.0], [1.0]), 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The teacher and the small decoder of a tiny run, as loaded from their bundles."""
    folder = tmp_path_factory.mktemp("distillation")
    path = random_autoencoder(folder / "teacher.safetensors")
    small = ("model.width=4", "callbacks.export.precision=float16", "steps=2")
    stage = ("objective=decoder_distillation", f"autoencoder.path='{path}'", "puppet.size=64")
    made = fitted("train", folder / "run", *stage, *small, tiny=FRAMES)
    return bundle.load(str(path)), bundle.load(str(made), ["autoencoder"])


@torch.no_grad()
def test_its_bundle_has_bitwise_the_teachers_latents(trained):
    """Although it is stored in half precision: that is for what was learned."""
    teacher, net = trained
    video = make_frames().video
    assert torch.equal(net.encode(video), teacher.encode(video))
    assert net.origin.fingerprint == teacher.origin.fingerprint
    assert net.origin.components == {"autoencoder": teacher.origin.fingerprint}


def test_its_bundle_fits_only_networks_of_the_teachers_latents(trained, tmp_path):
    teacher, net = trained
    for name, made_for in (("same", teacher.origin.fingerprint), ("other", "0" * 16)):
        network = Bundle("teacher", teacher.state_dict(), teacher.origin.config, {"autoencoder": made_for})
        bundle.write(network, tmp_path / f"{name}.safetensors")
    bundle.check_latents(bundle.load(str(tmp_path / "same.safetensors")), net)
    with pytest.raises(ValueError, match="trained on latents of autoencoder 0000"):
        bundle.check_latents(bundle.load(str(tmp_path / "other.safetensors")), net)


def test_its_bundle_has_no_decoder_of_the_teacher(trained):
    teacher, net = trained
    kept = {name.removeprefix("encoder.") for name in net.state_dict() if name.startswith("encoder.")}
    assert kept == {name for name in teacher.state_dict() if not name.startswith(("decoder.", "linear_out."))}


@torch.no_grad()
def test_its_bundle_streams(trained):
    _, net = trained
    assert isinstance(net, VideoAutoencoder) and not net.training
    latents = torch.randn(1, 4, 4, 3, 2)
    stream = net.decoder_stream()
    frames = torch.cat([stream.push(piece) for piece in latents.split([1, 2, 1], dim=2)], dim=2)
    torch.testing.assert_close(frames, net.decode(latents))
    assert frames.shape == (1, 3, 13, 24, 16)
