"""Conversions along the path invert each other; samplers and guidance keep their conventions."""

import math

import pytest
import torch

from avatar.diffusion import path
from avatar.diffusion.guidance import Guidance, guided
from avatar.diffusion.samplers import euler, heun
from avatar.diffusion.timesteps import LogitNormal, ShiftedUniform, schedule, shifted
from tests.conftest import make_cond


def test_clean_and_velocity_invert_noised_with_one_timestep_per_latent():
    x0, eps, t = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5), 0.1 + 0.9 * torch.rand(2, 3)
    x_t, v = path.noised(x0, eps, t), path.velocity(x0, eps)
    torch.testing.assert_close(path.clean(x_t, v, t), x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path.velocity_towards(x_t, x0, t), v, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(path.step(x_t, v, t, torch.zeros_like(t)), x0, rtol=1e-4, atol=1e-5)


def test_time_one_is_noise():
    x0, eps = torch.randn(2, 1, 4, 3, 5, 5).unbind(0)
    torch.testing.assert_close(path.noised(x0, eps, torch.ones(1, 3)), eps)


@pytest.mark.parametrize(
    "scales, evaluations",
    [
        ((1.0, 1.0, 1.0), 1),
        ((0.0, 0.0, 0.0), 1),
        ((0.0, 1.0, 1.0), 1),
        ((2.0, 1.0, 1.0), 2),
        ((3.0, 3.0, 3.0), 2),
        ((2.0, 1.0, 3.0), 3),
        ((2.0, 4.0, 3.0), 4),
    ],
)
def test_guidance_adds_text_then_labels_then_audio(scales, evaluations):
    cond, x = make_cond(latents=5), torch.randn(2, 3, 5, 4, 4)
    calls = []

    def velocity(y, c):
        calls.append(len(y) // len(x))
        audio = c.audio_mask.any(dim=(1, 2)).float()
        text = c.text_mask.any(dim=(1, 2)).float()
        labels = (c.emotion > 0).any(dim=1).float()
        return (1 + 10 * audio + 100 * text + 1000 * labels)[:, None, None, None, None].expand_as(y)

    guidance = Guidance(*scales)
    v = guided(velocity, x, cond, guidance)
    none, text, labels, everything = 1.0, 101.0, 1101.0, 1111.0
    expected = none + scales[1] * (text - none) + scales[2] * (labels - text) + scales[0] * (everything - labels)
    torch.testing.assert_close(v, torch.full_like(x, expected))
    assert calls == [evaluations]


@pytest.mark.parametrize("sampler", [euler, heun])
def test_samplers_follow_the_exact_flow_of_a_gaussian(sampler):
    # data N(0, s²): v = d/dt of x_t given x_t, linear in x, so the exact map from noise is x0 = s · eps
    s = 0.5

    def field(x, t):
        t = path.per_latent(t)
        return x * (t - (1 - t) * s**2) / (t**2 + (1 - t) ** 2 * s**2)

    eps = torch.randn(1, 2, 3, 4, 4)
    errors = [(sampler(field, eps, schedule(n, 1.0)) - s * eps).abs().max().item() for n in (16, 64)]
    assert errors[1] < 0.05 and errors[1] < errors[0] / (2.5 if sampler is euler else 6)


@pytest.mark.parametrize("shift", [0.0, [], [1.0, -1.0]])
def test_invalid_shifts_are_rejected(shift):
    with pytest.raises(ValueError, match="expected numbers above 0"):
        LogitNormal(shift=shift)


def test_timesteps_that_do_not_decrease_are_rejected():
    with pytest.raises(ValueError, match="expected decreasing"):
        euler(lambda x, t: x, torch.zeros(1, 1, 1, 2, 2), torch.tensor([0.0, 1.0]))


def test_time_distributions_stay_inside_and_shift_towards_noise():
    for sampler in (LogitNormal(), ShiftedUniform()):
        assert 0.45 < sampler(4000, 1).mean() < 0.55
    assert LogitNormal(shift=3.0)(4000, 1).mean() > 0.6
    torch.manual_seed(0)
    mixed = torch.logit(LogitNormal(std=0.01, shift=[1.0, 3.0])(4000, 1))  # the shift adds log 3
    near = [((mixed - at).abs() < 0.1).float().mean() for at in (0.0, math.log(3.0))]
    assert sum(near) == 1 and 0.45 < near[0] < 0.55
    t = ShiftedUniform(shift=5.0, low=0.02, high=0.98)(4000, 1)
    assert t.min() >= 0.02 and t.max() <= 0.98 and t.mean() > 0.65
    assert shifted(torch.tensor([0.0, 1.0]), 7.0).tolist() == [0.0, 1.0]
    assert schedule(4, 3.0)[0] == 1 and schedule(4, 3.0)[-1] == 0
