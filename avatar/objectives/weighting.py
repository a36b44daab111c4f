"""Loss weights by image region and by timestep.

    pixels    w = (1 + Σ_m a_m mask_m) / its mean over the clip
    timesteps min(SNR, γ) |x0 - x0'|² = t² min(SNR, γ) |v - v'|²,    SNR = ((1 - t) / t)²

The second line is Min-SNR (arXiv:2303.09556, Eq. 7) on the straight path, for both parameterisations: since
x0 = x_t - t v, an error of the clean latents is t times an error of the velocity.
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
    """Region loss weights: the added weight of a pixel that is completely inside of a region.

    Overlapping regions add up. Weights have mean 1 over each clip, independent of the batch; a clip without known
    regions has uniform weights.

    Args:
        face, lips, eyes: added weight, at least 0; 0: none.

    Raises:
        UserError: a negative or infinite weight.
    """

    face: float = 0.0
    lips: float = 0.0
    eyes: float = 0.0

    def __post_init__(self):
        for name, added in asdict(self).items():
            if not 0 <= added < math.inf:
                raise UserError(
                    f"got region_weights.{name}={added}; expected a number of at least 0, such as 4.0, or 0.0 for none"
                )

    @property
    def regions(self) -> tuple[str, ...]:
        """The regions with an added weight."""
        return tuple(name for name in REGIONS if getattr(self, name) > 0)

    def __call__(
        self, regions: Float[Tensor, "b m n h w"], of_time: Float[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b 1 n h w"]:
        """The weight of each pixel of n frames or latents.

        Args:
            regions: share of each of REGIONS in the pixel, 0 to 1.
            of_time: factor of each latent, by its timestep; None: 1.
        """
        added = regions.new_tensor([getattr(self, name) for name in REGIONS])[:, None, None, None]
        weight = 1 + (added * regions).sum(dim=1, keepdim=True)
        weight = weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)
        return weight if of_time is None else weight * path.per_latent(of_time)


@runtime_checkable
class Weighting(Protocol):
    """Interface of timestep weightings: the weight of a squared error of the clean latents or of the velocity."""

    def of_clean(self, t: Times) -> Times: ...

    def of_velocity(self, t: Times) -> Times: ...


@dataclass(frozen=True)
class Uniform:
    """Weight 1 at every timestep."""

    def of_clean(self, t: Times) -> Times:
        return torch.ones_like(t)

    def of_velocity(self, t: Times) -> Times:
        return torch.ones_like(t)


@dataclass(frozen=True)
class MinSNR:
    """Min-SNR weighting: min(SNR, gamma) for errors of the clean latents.

    Args:
        gamma: upper bound of the signal-to-noise ratio, above 0.

    Raises:
        UserError: a gamma that is not positive and finite.
    """

    gamma: float = 5.0

    def __post_init__(self):
        if not 0 < self.gamma < math.inf:
            raise UserError(f"got gamma={self.gamma}; expected a finite bound of the SNR above 0, such as 5.0")

    def of_clean(self, t: Times) -> Times:
        return path.snr(t).clamp(max=self.gamma)

    def of_velocity(self, t: Times) -> Times:
        return t.square() * self.of_clean(t)
