"""Length buckets: clips of several lengths, with one length per batch that all ranks draw alike."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from avatar.errors import UserError


@dataclass(frozen=True)
class LengthBuckets:
    """Clip lengths with their weights, and the size of a global batch.

    A batch is global: that of one update, over all ranks and all micro-batches whose gradients are accumulated. It does
    not depend on the number of either.

    Args:
        lengths: of clips, in latents.
        weights: relative frequency of each length.
        max_latents_per_batch: maximum size of a global batch in latents, or in latent pixels (l·h·w) if clips differ in
            height and width.
        batch_multiple_of: divisor of the number of clips; a multiple of ranks × accumulate.
        accumulate: micro-batches per global batch.

    Raises:
        UserError: values that are not integers or too small, or no room for `batch_multiple_of` clips.
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
        if wrong := [f"{name}={value}" for name, value in counts.items() if not isinstance(value, int)]:
            raise UserError(f"got buckets.{', '.join(wrong)}; expected integers")
        if len(self.lengths) != len(self.weights) or not self.lengths or min(self.lengths) < 1:
            raise UserError(f"got lengths {self.lengths}, weights {self.weights}; expected one weight per length ≥ 1")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(f"got weights {self.weights}; expected numbers of at least 0, with one above")
        if self.batch_multiple_of < 1 or self.accumulate < 1:
            raise UserError(
                f"got buckets.batch_multiple_of={self.batch_multiple_of}, accumulate={self.accumulate}; expected at "
                "least 1 each"
            )
        self.check_area(1)

    def check_area(self, area: int) -> None:
        """Raise UserError if a batch has no room for `batch_multiple_of` clips with `area` pixels per latent."""
        longest = max(self.lengths)
        if self.max_latents_per_batch < (needed := longest * area * self.batch_multiple_of):
            size = f"{longest} latents" + (f" of {area} pixels" if area > 1 else "")
            raise UserError(
                f"got buckets.max_latents_per_batch={self.max_latents_per_batch}; expected at least {needed} for "
                f"{self.batch_multiple_of} clip(s) of {size}: raise it, or shorten buckets.lengths"
            )

    def shares(self) -> np.ndarray:
        """The probability of each length."""
        weights = np.array(self.weights, float)
        return weights / weights.sum()

    def count(self, length: int, area: int = 1) -> int:
        """Number of clips in a batch, with `area` pixels per latent."""
        return self.max_latents_per_batch // (length * area) // self.batch_multiple_of * self.batch_multiple_of

    def describe_batch(self, ranks: int, areas: Collection[int] = (1,)) -> str:
        """The size of the global batch in words, for latents of these areas."""
        counts = [sorted({self.count(length, area) for area in (max(areas), min(areas))}) for length in self.lengths]
        spans = (" to ".join(map(str, span)) for span in counts)
        clips = [f"{span} clips of {length} latents" for span, length in zip(spans, self.lengths, strict=True)]
        parts = f", on {ranks} ranks × {self.accumulate} micro-batches" if ranks * self.accumulate > 1 else ""
        return f"global batch: {' or '.join(clips)}{parts}"

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw the length of a batch's clips, and return it with their number."""
        length = int(rng.choice(self.lengths, p=self.shares()))
        return length, self.count(length)


@dataclass(frozen=True)
class BatchShard:
    """The shard of one rank in each micro-batch of a global batch."""

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    def locate(self, index: int) -> tuple[int, slice]:
        """The batch of a micro-batch, and this rank's clips in it."""
        step, turn = divmod(index, self.accumulate)
        return step, slice(turn * self.ranks + self.rank, None, self.ranks * self.accumulate)


def check_ranks(buckets: LengthBuckets, ranks: int, samples: int | None = None) -> None:
    """Raise UserError if batches can't be split evenly, or there are more ranks than samples."""
    if buckets.batch_multiple_of % (parts := ranks * buckets.accumulate):
        raise UserError(
            f"got buckets.batch_multiple_of={buckets.batch_multiple_of}; expected a multiple of {ranks} ranks × "
            f"{buckets.accumulate} micro-batches, the parts of a global batch: set buckets.batch_multiple_of={parts}"
        )
    if samples is not None and ranks > samples:
        raise UserError(f"got {ranks} ranks; expected at most {samples}, the number of samples: use fewer ranks")
