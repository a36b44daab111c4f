"""Timesteps: sampling schedules, and the distributions of training, callables `(*shape, device) -> t in (0, 1)`."""

from dataclasses import dataclass

import torch
from torch import Tensor


def shifted(t: Tensor, shift: float) -> Tensor:
    """Timesteps shifted towards noise: s t / (1 + (s - 1) t); s = 1 is the identity (SD3, arXiv:2403.03206, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float) -> Tensor:
    """The `steps + 1` timesteps of a solver from 1 to 0, evenly spaced before the shift."""
    return shifted(torch.linspace(1, 0, steps + 1), shift)


@dataclass(frozen=True)
class LogitNormal:
    """Logit-normal timesteps, sigmoid(N(mean, std)) (arXiv:2403.03206, Eq. 19), then shifted."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __call__(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return shifted(torch.sigmoid(self.mean + self.std * torch.randn(*shape, device=device)), self.shift)


@dataclass(frozen=True)
class ShiftedUniform:
    """Uniform timesteps, shifted towards noise and clamped to [low, high]."""

    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __call__(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return shifted(torch.rand(*shape, device=device), self.shift).clamp(self.low, self.high)
