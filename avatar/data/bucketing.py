"""Clips of several lengths: one length per batch, drawn from (seed, step) alone, so that all ranks draw the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LengthBuckets:
    """Lengths in latents with their weights; a batch holds as many clips as its budget allows, and at least one.

    A batch is that of all ranks together, so that it stays the same on another number of them.

    Args:
        budget: latents per batch; where clips differ in height and width, pixels of latents (l·h·w).
        multiple: of which a batch's clips are; a run on several ranks needs one of their number.
    """

    lengths: Sequence[int]
    weights: Sequence[float]
    budget: int
    multiple: int = 1

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.lengths) != len(self.weights) or not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths {self.lengths} with weights {self.weights}; give one weight per length ≥ 1")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights {self.weights}; give one weight per length, none below 0 and one above")
        if self.budget < max(self.lengths):
            raise ValueError(f"a budget of {self.budget} latents can't hold a clip of {max(self.lengths)}; raise it")
        if self.multiple < 1:
            raise ValueError(f"batches in multiples of {self.multiple}; give a whole number ≥ 1")

    def shares(self) -> np.ndarray:
        """How often each length is drawn; they sum to 1."""
        weights = np.array(self.weights, float)
        return weights / weights.sum()

    def count(self, length: int, area: int = 1) -> int:
        """Clips in a batch, of so many latents of `area` pixels each."""
        return max(self.budget // (length * area) // self.multiple, 1) * self.multiple

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """The length of a batch's clips, and how many there are."""
        length = int(rng.choice(self.lengths, p=self.shares()))
        return length, self.count(length)


def check_ranks(buckets: LengthBuckets, ranks: int) -> None:
    """Raise ValueError where batches can't be shared out evenly."""
    if buckets.multiple % ranks:
        raise ValueError(
            f"batches in multiples of {buckets.multiple} clips, on {ranks} ranks; all ranks take as many clips: set "
            f"buckets.multiple={ranks} (a batch is that of all ranks together, and so is buckets.budget)"
        )
