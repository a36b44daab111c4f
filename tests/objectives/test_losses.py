"""Losses against closed forms, and which tensors their gradients reach."""

import torch

from avatar.diffusion import path
from avatar.objectives import losses


def test_flow_matching_is_zero_at_the_true_velocity_and_weighted():
    x0, eps = torch.randn(2, 2, 3, 4, 5, 5)
    weight = torch.zeros(2, 1, 4, 5, 5)
    weight[:, :, 0] = 1
    assert losses.flow_matching(path.velocity(x0, eps), x0, eps, torch.ones_like(weight)) == 0
    off = path.velocity(x0, eps)
    off[:, :, 1:] += 1
    assert losses.flow_matching(off, x0, eps, weight) == 0
    assert losses.flow_matching(off, x0, eps, torch.ones_like(weight)) > 0


def test_distribution_matching_gradient_is_the_normalised_score_difference():
    x, real, fake = torch.randn(3, 2, 3, 4, 5, 5).unbind(0)
    x.requires_grad_(), real.requires_grad_(), fake.requires_grad_()
    weight = torch.ones(2, 1, 4, 5, 5)
    losses.distribution_matching(x, real, fake, weight).backward()
    size = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x.grad, ((fake - real) / size / x.numel()).detach())
    assert real.grad is None and fake.grad is None


def test_distribution_matching_drives_a_gaussian_to_the_teachers():
    # x ~ N(m, 1) against N(2, 1): the scores' estimates of x0 are known in closed form at every t.
    mean = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=0.1)
    for _ in range(100):
        x = torch.randn(64, 1, 1, 4, 4) + mean
        t = torch.rand(64, 1) * 0.9 + 0.05
        x_t = path.noised(x.detach(), torch.randn_like(x), t)
        s = path.per_latent(t)

        def estimate(m, x_t=x_t, s=s):
            return m + (1 - s) / ((1 - s) ** 2 + s**2) * (x_t - (1 - s) * m)

        loss = losses.distribution_matching(x, estimate(2.0), estimate(mean.detach()), torch.ones(64, 1, 1, 4, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(mean.item() - 2) < 0.2


def test_consistency_target_is_detached():
    x0, target = torch.randn(2, 2, 3, 4, 5, 5).unbind(0)
    x0.requires_grad_(), target.requires_grad_()
    losses.consistency(x0, target, torch.ones(2, 1, 4, 5, 5)).backward()
    assert x0.grad is not None and target.grad is None


def test_reconstruction_weighs_flicker_and_edges():
    """A constant error costs its size; one that alternates in time or space also costs its differences."""
    target, one = torch.zeros(1, 3, 5, 4, 4), torch.ones(1, 1, 5, 4, 4)
    constant = losses.reconstruction(target + 1, target, one)
    torch.testing.assert_close(constant, torch.tensor(1.0))
    for axis, differences in ((2, 4 / 5), (3, 3 / 4), (4, 3 / 4)):
        sign = torch.ones(target.shape[axis]).cumsum(0) % 2 * 2 - 1
        video = target + sign.view([-1 if i == axis else 1 for i in range(5)])
        torch.testing.assert_close(losses.reconstruction(video, target, one), torch.tensor(1 + 2 * differences))
    torch.testing.assert_close(losses.reconstruction(target[:, :, :1] + 1, target[:, :, :1], one[:, :, :1]), constant)
