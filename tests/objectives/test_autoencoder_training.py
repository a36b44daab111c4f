"""Autoencoder training: a new network starts from principal components, a loaded one goes on from its weights."""

import pytest
import torch

from avatar.models import bundle
from avatar.objectives.autoencoder import after_references
from avatar.types import Frames
from tests.stages import FILTERS, FRAMES, fitted, random_autoencoder

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]


def trained(folder, *overrides: str):
    """The autoencoder of a run of one update with a learning rate of zero."""
    still = ("objective=autoencoder", "objective.optimizer.lr=0", "objective.optimizer.weight_decay=0", "steps=1")
    return bundle.load(str(fitted("train", folder / "run", *still, *overrides, tiny=FRAMES)))


def test_a_loaded_autoencoder_goes_on_from_its_weights(tmp_path):
    path = random_autoencoder(tmp_path / "first.safetensors")
    before = bundle.load(str(path))
    after = trained(tmp_path, "model=bundle", f"model.path='{path}'", "latent.channels=4")
    for name, weight in before.named_parameters():
        assert torch.equal(weight, after.get_parameter(name)), name
    assert not torch.equal(before.normalise.mean, after.normalise.mean)  # the statistics follow


def test_a_new_autoencoder_starts_from_principal_components(tmp_path):
    net = trained(tmp_path, "model.network.channels=4", "model.network.widths=[4,4]", "latent.channels=4")
    gram = net.linear_in.weight @ net.linear_out.weight
    torch.testing.assert_close(gram, torch.eye(4), atol=1e-3, rtol=0)


def test_clips_are_decoded_after_their_references(tmp_path):
    net = bundle.load(str(random_autoencoder(tmp_path / "first.safetensors")))
    video, reference = torch.rand(3, 3, 9, 16, 16), torch.rand(3, 3, 1, 16, 16)
    latents = after_references(net, Frames(video, reference, torch.ones(3, 3, 9, 16, 16), ["a", "b", "c"]))
    torch.testing.assert_close(latents[:, :, :1], net.encode(reference))
    torch.testing.assert_close(latents[:, :, 1:], net.encode(video)[:, :, 1:])
