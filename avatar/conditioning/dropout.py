"""Conditioning dropout: combinations of modalities removed at random in training, as branches for guidance."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avatar.errors import UserError
from avatar.types import Conditioning

MODALITIES = ("audio", "text", "labels")
COMBINATIONS = {
    "none": (),
    "audio": ("audio",),
    "text": ("text",),
    "labels": ("labels",),
    "audio_text": ("audio", "text"),
    "audio_labels": ("audio", "labels"),
    "text_labels": ("text", "labels"),
}


@dataclass(frozen=True)
class Dropout:
    """Joint dropout of modalities (classifier-free guidance, arXiv:2207.12598).

    Guidance evaluates combinations: none, text, and text with labels. Independent dropout of a tenth each would train
    the network without any condition in 0.1 % of samples; here each combination has its probability.

    Args:
        kept: the modalities that are kept → probability; the other samples keep all.

    Raises:
        UserError: an unknown combination, or probabilities below 0 or with a sum above 1.
    """

    kept: Mapping[str, float] = field(
        default_factory=lambda: {
            "none": 0.05,
            "text": 0.05,
            "text_labels": 0.05,
            "audio_text": 0.1,
            "audio_labels": 0.1,
        }
    )

    def __post_init__(self):
        if unknown := sorted(set(self.kept) - COMBINATIONS.keys()):
            raise UserError(f"got dropout.kept.{unknown[0]}; expected one of {', '.join(COMBINATIONS)}: rename it")
        if min(self.kept.values(), default=0.0) < 0 or not math.fsum(self.kept.values()) <= 1 + 1e-9:
            raise UserError(f"got dropout.kept={dict(self.kept)}; expected probabilities with a sum of at most 1")

    def __call__(self, cond: Conditioning, uniform: Callable[..., Tensor]) -> Conditioning:
        """The conditioning with modalities dropped per sample.

        Args:
            cond: of b samples.
            uniform: (b, device=…) -> uniform numbers in [0, 1), one per sample.
        """
        device = cond.reference.device
        edges = torch.tensor(list(self.kept.values()), device=device).cumsum(0)
        drawn = torch.bucketize(uniform(len(cond.reference), device=device), edges, right=True)
        combinations = [*(COMBINATIONS[name] for name in self.kept), MODALITIES]
        dropped = {
            name: torch.tensor([name not in combination for combination in combinations], device=device)[drawn]
            for name in MODALITIES
        }
        return cond.without(**dropped)
