"""Timesteps: sampling schedules, and the distributions of training, callables `(*shape, device) -> t in (0, 1)`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avatar.errors import UserError


def shifted(t: Tensor, shift: float) -> Tensor:
    """Timesteps shifted towards noise: s t / (1 + (s - 1) t); s = 1 is the identity (SD3, arXiv:2403.03206, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float) -> Tensor:
    """The `steps + 1` timesteps of a solver from 1 to 0, evenly spaced before the shift."""
    return shifted(torch.linspace(1, 0, steps + 1), shift)


@dataclass(frozen=True)
class LogitNormal:
    """Logit-normal timesteps, sigmoid(N(mean, std)) (arXiv:2403.03206, Eq. 19), then shifted.

    Args:
        mean, std: of the normal distribution.
        shift: of `shifted`; of several, each timestep has one at random.

    Raises:
        UserError: no shift, or one that is not above 0.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float | Sequence[float] = 1.0

    def __post_init__(self):
        if not self.shifts or min(self.shifts) <= 0:
            raise UserError(f"got timesteps.shift={self.shift}; expected numbers above 0, such as 3.0 or [1.0, 3.0]")

    @property
    def shifts(self) -> tuple[float, ...]:
        """All shifts."""
        return (self.shift,) if isinstance(self.shift, int | float) else tuple(self.shift)

    def __call__(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        t = torch.sigmoid(self.mean + self.std * torch.randn(*shape, device=device))
        if len(self.shifts) == 1:
            return shifted(t, self.shifts[0])
        each = torch.stack([shifted(t, shift) for shift in self.shifts])
        return each.gather(0, torch.randint(len(each), (1, *shape), device=device))[0]


@dataclass(frozen=True)
class Uniform:
    """Uniform timesteps in [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def __call__(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(*shape, device=device)


@dataclass(frozen=True)
class ShiftedUniform:
    """Uniform timesteps, shifted towards noise and clamped to [low, high]."""

    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __call__(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return shifted(torch.rand(*shape, device=device), self.shift).clamp(self.low, self.high)
