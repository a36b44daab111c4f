"""Weights of pixels and of times: what regions add, a mean of 1 over each clip, and one SNR for every target."""

from dataclasses import fields

import pytest
import torch

from avatar.diffusion import path
from avatar.objectives import losses
from avatar.objectives.weighting import MinSNR, RegionWeights, Uniform
from avatar.types import REGIONS


def test_every_region_has_a_weight():
    assert [field.name for field in fields(RegionWeights)] == list(REGIONS)


def test_region_weights_add_up():
    regions = torch.rand(2, len(REGIONS), 3, 4, 5)
    weight = RegionWeights(face=1.5, lips=4.0)(regions)
    face, lips = (regions[:, REGIONS.index(name)] for name in ("face", "lips"))
    plain = 1 + 1.5 * face + 4 * lips
    torch.testing.assert_close(weight / weight[:, :, :1, :1, :1], (plain / plain[:, :1, :1, :1])[:, None])


def test_weights_have_mean_1_per_clip():
    """Else sharing a batch out among ranks and passes would change the loss."""
    regions = torch.rand(3, len(REGIONS), 3, 4, 5) * torch.tensor([1.0, 0.1, 0.0])[:, None, None, None, None]
    weight = RegionWeights(face=1.0, lips=8.0)(regions)
    torch.testing.assert_close(weight.mean(dim=(1, 2, 3, 4)), torch.ones(3))
    assert torch.equal(weight[1:2], RegionWeights(face=1.0, lips=8.0)(regions[1:2]))
    assert torch.equal(weight[2], torch.ones_like(weight[2]))  # where nothing is known, all counts alike


@pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("inf")])
def test_invalid_region_weights_are_rejected(wrong):
    with pytest.raises(ValueError, match=r"region_weights\.lips=.*expected"):
        RegionWeights(lips=wrong)


def test_min_snr_is_bounded_and_defined_at_every_timestep():
    t = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    torch.testing.assert_close(MinSNR(5.0).of_clean(t), torch.tensor([[5.0, 5.0, 1.0, 0.0]]))
    torch.testing.assert_close(MinSNR(5.0).of_velocity(t), torch.tensor([[0.0, 0.3125, 0.25, 0.0]]))
    assert torch.equal(Uniform().of_clean(t), torch.ones_like(t)) and torch.equal(
        Uniform().of_velocity(t), torch.ones_like(t)
    )


def test_min_snr_of_velocities_equals_that_of_clean_latents():
    x0, eps, v = torch.randn(3, 2, 3, 4, 5, 5).unbind(0)
    t, weighting = torch.rand(2, 4) * 0.98 + 0.01, MinSNR(5.0)
    snr = ((1 - t) / t).square()
    assert 0 < (snr > 5).float().mean() < 1  # some are bounded, some aren't
    clean = path.clean(path.noised(x0, eps, t), v, t)
    of_velocity, of_clean = (path.per_latent(w) for w in (weighting.of_velocity(t), weighting.of_clean(t)))
    torch.testing.assert_close(losses.flow_matching(v, x0, eps, of_velocity), losses.consistency(clean, x0, of_clean))
    expected = (path.per_latent(snr.clamp(max=5.0)) * (clean - x0).square()).mean()
    torch.testing.assert_close(losses.consistency(clean, x0, of_clean), expected)


@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf")])
def test_an_invalid_bound_is_rejected(wrong):
    with pytest.raises(ValueError, match=f"gamma={wrong}"):
        MinSNR(wrong)
