"""Clips of several lengths: one length per batch, drawn from (seed, step) alone, so that all ranks draw the same."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from avatar.errors import UserError


@dataclass(frozen=True)
class LengthBuckets:
    """Lengths in latents with their weights; a batch holds as many clips as its budget allows, and never more.

    A batch is global: it is what one update learns from, that of all ranks together and of all passes whose gradients
    are accumulated. So it stays the same on another number of either.

    Args:
        max_latents_per_batch: the size of a global batch in latents; where clips differ in height and width, in latent
            pixels (l·h·w).
        batch_multiple_of: of which a batch's clips are; it must be one of ranks × accumulate.
        accumulate: passes, one after the other, that a batch is shared out among.
    """

    lengths: Sequence[int]
    weights: Sequence[float]
    max_latents_per_batch: int
    batch_multiple_of: int = 1
    accumulate: int = 1

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "weights", tuple(self.weights))
        counts = {
            "max_latents_per_batch": self.max_latents_per_batch,
            "batch_multiple_of": self.batch_multiple_of,
            "accumulate": self.accumulate,
        }
        counts |= {f"lengths[{n}]": length for n, length in enumerate(self.lengths)}
        if strange := [f"{name}={value}" for name, value in counts.items() if not isinstance(value, int)]:
            raise UserError(f"buckets.{', '.join(strange)}; wanted whole numbers")
        if len(self.lengths) != len(self.weights) or not self.lengths or min(self.lengths) < 1:
            raise UserError(f"lengths {self.lengths} with weights {self.weights}; give one weight per length ≥ 1")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(f"weights {self.weights}; give one weight per length, none below 0 and one above")
        if self.batch_multiple_of < 1 or self.accumulate < 1:
            raise UserError(
                f"batches in multiples of {self.batch_multiple_of}, accumulated over {self.accumulate} passes; give "
                "integers >= 1"
            )
        self.check_area(1)

    def check_area(self, area: int) -> None:
        """Raise UserError where the budget has no room for `multiple` clips, of latents of `area` pixels each."""
        longest = max(self.lengths)
        if self.max_latents_per_batch < (needed := longest * area * self.batch_multiple_of):
            size = f"{longest} latents" + (f" of {area} pixels" if area > 1 else "")
            raise UserError(
                f"a global batch of buckets.max_latents_per_batch={self.max_latents_per_batch} can't hold "
                f"{self.batch_multiple_of} clip(s) of {size}; raise "
                f"it to buckets.max_latents_per_batch={needed}, or make buckets.lengths shorter"
            )

    def shares(self) -> np.ndarray:
        """How often each length is drawn; they sum to 1."""
        weights = np.array(self.weights, float)
        return weights / weights.sum()

    def count(self, length: int, area: int = 1) -> int:
        """Clips in a batch, of so many latents of `area` pixels each; none where `check_area` would object."""
        return self.max_latents_per_batch // (length * area) // self.batch_multiple_of * self.batch_multiple_of

    def describe_batch(self, ranks: int, areas: Collection[int] = (1,)) -> str:
        """What an update learns from, in words; areas of the latents where the budget counts their pixels."""
        counts = [sorted({self.count(length, area) for area in (max(areas), min(areas))}) for length in self.lengths]
        spans = (" to ".join(map(str, span)) for span in counts)
        clips = [f"{span} clips of {length} latents" for span, length in zip(spans, self.lengths, strict=True)]
        parts = f", shared out among {ranks} ranks × {self.accumulate} passes" if ranks * self.accumulate > 1 else ""
        return f"an update learns from {' or '.join(clips)}{parts}"

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """The length of a batch's clips, and how many there are."""
        length = int(rng.choice(self.lengths, p=self.shares()))
        return length, self.count(length)


@dataclass(frozen=True)
class BatchShard:
    """What one rank takes of every batch, in each of the passes that a batch is accumulated over."""

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    def locate(self, index: int) -> tuple[int, slice]:
        """The batch that the index-th pass is over, and which of its clips are this rank's."""
        step, turn = divmod(index, self.accumulate)
        return step, slice(turn * self.ranks + self.rank, None, self.ranks * self.accumulate)


def check_ranks(buckets: LengthBuckets, ranks: int, samples: int | None = None) -> None:
    """Raise UserError where batches can't be shared out evenly, or there are more ranks than samples."""
    if buckets.batch_multiple_of % (parts := ranks * buckets.accumulate):
        passes = f" in {buckets.accumulate} passes" if buckets.accumulate > 1 else ""
        raise UserError(
            f"batches in multiples of {buckets.batch_multiple_of} clips, on {ranks} ranks{passes}; all take as many "
            "clips: set "
            f"buckets.batch_multiple_of={parts} (a batch is global, that of all ranks and passes together: so is "
            "buckets.max_latents_per_batch)"
        )
    if samples is not None and ranks > samples:
        raise UserError(f"{ranks} ranks for {samples} samples; use fewer, or prepare more")
