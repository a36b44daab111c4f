"""The straight path between data and noise, and all conversions along it.

    x_t = (1 - t) x0 + t eps,    v = dx_t/dt = eps - x0,    t = 0: data, t = 1: noise

Rectified flow (arXiv:2209.03003). No other module decides what t means.
"""

from jaxtyping import Float
from torch import Tensor

from avatar.types import Latents, Times


def noised(x0: Latents, eps: Latents, t: Times) -> Latents:
    """The point x_t between clean latents and noise."""
    t = per_latent(t)
    return (1 - t) * x0 + t * eps


def velocity(x0: Latents, eps: Latents) -> Latents:
    """The direction of the path, from data to noise: v = eps - x0."""
    return eps - x0


def clean(x_t: Latents, v: Latents, t: Times) -> Latents:
    """The clean latents that a velocity points back to: x0 = x_t - t v."""
    return x_t - per_latent(t) * v


def velocity_towards(x_t: Latents, x0: Latents, t: Times) -> Latents:
    """The velocity at t > 0 that points back to given clean latents: v = (x_t - x0) / t, the inverse of `clean`."""
    return (x_t - x0) / per_latent(t)


def step(x_t: Latents, v: Latents, t: Times, r: Times) -> Latents:
    """One Euler step along a velocity, from time t to time r."""
    return x_t + per_latent(r - t) * v


def snr(t: Times) -> Times:
    """The signal-to-noise ratio of x_t: ((1 - t) / t)², from infinite at data to 0 at noise."""
    return ((1 - t) / t).square()


def per_latent(t: Times) -> Float[Tensor, "b 1 l 1 1"]:
    """Times, broadcastable against latents."""
    return t[:, None, :, None, None]
