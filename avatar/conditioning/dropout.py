"""Conditioning dropout: modalities removed at random in training, so that guidance has unconditional branches."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from avatar.types import Conditioning


@dataclass(frozen=True)
class Dropout:
    """The probability of dropping each modality, independently (classifier-free guidance, arXiv:2207.12598)."""

    audio: float = 0.1
    text: float = 0.1
    labels: float = 0.1

    def __call__(self, cond: Conditioning, uniform: Callable[..., Tensor]) -> Conditioning:
        """The conditioning with modalities dropped per sample.

        Args:
            cond: of b samples.
            uniform: (b, device=…) -> uniform numbers in [0, 1), one per sample.
        """
        b, device = len(cond.reference), cond.reference.device
        return cond.without(
            **{name: uniform(b, device=device) < getattr(self, name) for name in ("audio", "text", "labels")}
        )
