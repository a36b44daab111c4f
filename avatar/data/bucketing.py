"""Clips of several lengths: one length per batch, drawn from (seed, step) alone, so that all ranks draw the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LengthBuckets:
    """Lengths in latents with their weights; a batch holds as many clips as its budget of latents allows."""

    lengths: Sequence[int]
    weights: Sequence[float]
    budget: int  # latents per batch

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.lengths) != len(self.weights) or not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths {self.lengths} with weights {self.weights}; give one weight per length ≥ 1")
        if self.budget < max(self.lengths):
            raise ValueError(f"a budget of {self.budget} latents can't hold a clip of {max(self.lengths)}; raise it")

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """The length of a batch's clips, and how many there are."""
        weights = np.array(self.weights, float)
        length = int(rng.choice(self.lengths, p=weights / weights.sum()))
        return length, self.budget // length
