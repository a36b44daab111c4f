"""ODE solvers of the probability flow dx/dt = v(x, t), from noise at t = 1 along decreasing timesteps to data."""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.diffusion import path
from avatar.errors import UserError
from avatar.types import Latents, Times

Field = Callable[[Latents, Times], Latents]
Schedule = Float[Tensor, " steps"]  # decreasing timesteps


def euler(field: Field, x: Latents, times: Schedule) -> Latents:
    """Euler's method, first order: one evaluation per step."""
    for t, r in pairwise(_per_latent(times, x)):
        x = path.step(x, field(x, t), t, r)
    return x


def heun(field: Field, x: Latents, times: Schedule) -> Latents:
    """Heun's method, second order: the mean velocity of both ends of a step; the last step, to 0, is Euler's."""
    for t, r in pairwise(_per_latent(times, x)):
        v = field(x, t)
        ahead = path.step(x, v, t, r)
        if bool((r > 0).all()):
            ahead = path.step(x, (v + field(ahead, r)) / 2, t, r)
        x = ahead
    return x


def _per_latent(times: Schedule, x: Latents) -> list[Times]:
    if bool((times.diff() >= 0).any()):
        raise UserError(
            f"got timesteps {times.tolist()}; expected decreasing ones, from noise at t = 1 to data at t = 0"
        )
    return [torch.full((x.shape[0], x.shape[2]), t.item(), device=x.device, dtype=x.dtype) for t in times]
