"""How much each pixel and each time counts in a loss.

    pixels    w = (1 + Σ_m a_m mask_m) / its mean over the clip
    times     min(SNR, γ) |x0 - x0'|² = t² min(SNR, γ) |v - v'|²,    SNR = ((1 - t) / t)²

The second line is Min-SNR (arXiv:2303.09556, Eq. 7) on the straight path, for both things that are compared: since
x0 = x_t - t v, an error of the clean latents is t times one of the velocity.
"""

import math
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.diffusion import path
from avatar.errors import UserError
from avatar.types import REGIONS, Times


@dataclass(frozen=True)
class RegionWeights:
    """What is added to the weight of a pixel that is all of a region; where regions overlap, it is their sum.

    Weights have mean 1 over each clip, whatever else is in its batch. A clip whose regions are not known counts evenly.

    Raises:
        UserError: what is added is below 0, or no number.
    """

    face: float = 0.0
    lips: float = 0.0

    def __post_init__(self):
        for name, added in asdict(self).items():
            if not 0 <= added < math.inf:
                raise UserError(
                    f"region_weights.{name}={added}; wanted a number from 0 on, such as 4.0, or 0.0 for none"
                )

    @property
    def regions(self) -> tuple[str, ...]:
        """Those that count more."""
        return tuple(name for name in REGIONS if getattr(self, name) > 0)

    def __call__(self, regions: Float[Tensor, "b m n h w"]) -> Float[Tensor, "b 1 n h w"]:
        """The weight of each pixel of n frames or latents, by its share of each of REGIONS."""
        added = regions.new_tensor([getattr(self, name) for name in REGIONS])[:, None, None, None]
        weight = 1 + (added * regions).sum(dim=1, keepdim=True)
        return weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)


@runtime_checkable
class Weighting(Protocol):
    """The weight of a squared error, by the time of its latent and by what is compared."""

    def of_clean(self, t: Times) -> Times: ...

    def of_velocity(self, t: Times) -> Times: ...


@dataclass(frozen=True)
class Uniform:
    """1 at every time, of whatever is compared."""

    def of_clean(self, t: Times) -> Times:
        return torch.ones_like(t)

    def of_velocity(self, t: Times) -> Times:
        return torch.ones_like(t)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) of the clean latents: times with little noise don't count more than gamma.

    Raises:
        UserError: gamma isn't above 0, or no number.
    """

    gamma: float = 5.0

    def __post_init__(self):
        if not 0 < self.gamma < math.inf:
            raise UserError(f"gamma={self.gamma}; wanted a bound of the signal-to-noise ratio above 0, such as 5.0")

    def of_clean(self, t: Times) -> Times:
        return path.snr(t).clamp(max=self.gamma)

    def of_velocity(self, t: Times) -> Times:
        return t.square() * self.of_clean(t)
