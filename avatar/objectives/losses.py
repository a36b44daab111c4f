"""Losses: pure functions, one equation each, without networks; targets are detached here."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from avatar.diffusion import path
from avatar.types import Latents, Pixels

Scalar = Float[Tensor, ""]
Weights = Float[Tensor, "b 1 #l #h #w"]


def flow_matching(v: Latents, x0: Latents, eps: Latents, weight: Weights) -> Scalar:
    """E w |v - (eps - x0)|², rectified flow (arXiv:2209.03003, Eq. 1)."""
    return (weight * (v - path.velocity(x0, eps)).square()).mean()


def consistency(x0: Latents, target: Latents, weight: Weights) -> Scalar:
    """E w |f(x_t) - f(x_r)|², the target detached (arXiv:2303.01469, Eq. 10, with the l2 metric)."""
    return (weight * (x0 - target.detach()).square()).mean()


def distribution_matching(x: Latents, real: Latents, fake: Latents, weight: Weights) -> Scalar:
    """A loss whose gradient with respect to `x` is `fake - real`, divided per sample by the mean of |x - real|.

    `real` and `fake` are the teacher's and the critic's predictions of the clean latents for one noised copy of `x`;
    both are detached. DMD, arXiv:2311.18828, Eqs. 7-8; the normalisation as in DMD2, arXiv:2405.14867.
    """
    with torch.no_grad():
        size = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
        target = x - weight * (fake - real) / size
    return 0.5 * mse_loss(x, target)


def reconstruction(video: Pixels, target: Pixels, weight: Weights) -> Scalar:
    """E w |x - y| of the frames, plus E |∇(x - y)|, the L1 norm of the error's differences in time and space."""
    error = video - target
    differences = sum((error.diff(dim=axis).abs().sum() for axis in (2, 3, 4)), torch.zeros_like(error[0, 0, 0, 0, 0]))
    return (weight * error.abs()).mean() + differences / error.numel()
