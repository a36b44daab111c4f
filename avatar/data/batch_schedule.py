"""Deterministic batch schedule: the samples and crops of each batch as a function of (seed, step).

Batches are global: rank r of n takes every n-th clip from the r-th on. The order does not depend on the numbers of
ranks, workers or files, and runs resume exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from avatar.data.bucketing import LengthBuckets
from avatar.errors import UserError

ANYWHERE, AT_START, ON_CHANGE = range(3)

# Purposes of random numbers, as the first word of their seeds: it separates their streams.
_BUCKETS, _ORDER, _CROP, _SUBSTITUTE = range(1, 5)


@dataclass(frozen=True)
class Placement:
    """Placement of crops in their clips: shares with a purpose, the rest uniform.

    Args:
        starts: share of short crops at the start of their clip, as at the start of a stream.
        short: maximum length of a short crop, in latents.
        transitions: share of crops of two latents or more over a change of a label (state; for puppets also emotion and
            gesture), in clips that have one.

    Raises:
        UserError: shares below 0 or with a sum above 1.
    """

    starts: float = 0.0
    short: int = 3
    transitions: float = 0.0

    def __post_init__(self):
        if min(self.starts, self.transitions) < 0 or self.starts + self.transitions > 1:
            raise UserError(
                f"got placement.starts={self.starts}, transitions={self.transitions}; expected shares of at least 0 "
                "with a sum of at most 1"
            )

    def kinds(self, rng: np.random.Generator, length: int, count: int) -> Int[np.ndarray, " count"]:
        """Draw the kind of each of `count` crops; without shares for this length, no random number is drawn."""
        starts = self.starts if length <= self.short else 0.0
        transitions = self.transitions if length > 1 else 0.0
        if not starts + transitions:
            return np.full(count, ANYWHERE)
        drawn = rng.random(count)
        return np.select([drawn < starts, drawn < starts + transitions], [AT_START, ON_CHANGE], ANYWHERE)


UNIFORM = Placement()


def changes(labels: Int[np.ndarray, "*kinds l"]) -> Int[np.ndarray, " m"]:
    """The latents at which a label of any kind changes."""
    different = np.diff(labels.astype(int)) != 0
    return 1 + np.flatnonzero(different.reshape(-1, different.shape[-1]).any(axis=0))


def place(
    kind: int, rng: np.random.Generator, length: int, latents: int, at: Int[np.ndarray, " m"], anywhere: int
) -> int:
    """Draw the first latent of a crop.

    Args:
        kind: ANYWHERE, AT_START or ON_CHANGE; a crop over a change has at least one latent before and after it.
        length, latents: of the crop and of its clip.
        at: the latents at which the clip's labels change.
        anywhere: the result for ANYWHERE, and for ON_CHANGE in clips without a change.
    """
    if kind == AT_START:
        return 0
    if kind == ON_CHANGE and len(at):
        change = int(rng.choice(at))
        return int(rng.integers(max(change - length + 1, 0), min(change - 1, latents - length) + 1))
    return anywhere


@dataclass(frozen=True)
class Draw:
    """One clip of a batch; `entropy` seeds the random numbers of its crop."""

    sample: int
    length: int  # latents
    kind: int  # ANYWHERE, AT_START or ON_CHANGE
    entropy: tuple[int, ...]
    pool: Int[np.ndarray, " n"]  # samples of its bucket

    def rng(self) -> np.random.Generator:
        """The generator of its crop, always in the same state."""
        return np.random.default_rng([_CROP, *self.entropy])

    def substitute(self, attempt: int) -> "Draw":
        """Another draw of the bucket, if this sample is unreadable; attempts count from 1."""
        rng = np.random.default_rng([_SUBSTITUTE, *self.entropy, attempt])
        return Draw(int(rng.choice(self.pool)), self.length, self.kind, self.entropy, self.pool)


class BatchSchedule:
    """Batch schedule of a run, for samples of several sizes.

    A bucket is a (length, height, width). Its samples are shuffled in epochs, and its batches are consecutive slices of
    that order. Lengths are drawn by their weights; among the sizes with samples of this length, buckets are drawn so
    that all samples are drawn equally often.

    Args:
        sizes: length, height and width of each sample, in latents and latent pixels.
        buckets: lengths, weights and sizes of batches.
        placement: of crops in their clips.
        seed: of the schedule.
        steps: number of batches.

    Raises:
        UserError: a length that no sample reaches.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "n 3"],
        buckets: LengthBuckets,
        placement: Placement,
        seed: int,
        steps: int,
    ):
        self.placement, self.seed = placement, seed
        self.pools: list[np.ndarray] = []
        self.lengths: list[int] = []
        counts, chances = [], []
        for length, share in zip(buckets.lengths, buckets.shares(), strict=True):
            if length > sizes[:, 0].max():
                raise UserError(
                    f"got crops of {length} latents; expected at most {sizes[:, 0].max()}, the longest sample: shorten "
                    "buckets.lengths"
                )
            long_enough = np.flatnonzero(sizes[:, 0] >= length)
            pools = [long_enough[group] for group in _groups(sizes[long_enough, 1:])]
            count = [buckets.count(length, int(sizes[pool[0], 1:].prod())) for pool in pools]
            often = np.array([len(pool) / n for pool, n in zip(pools, count, strict=True)])
            self.pools += pools
            self.lengths += [length] * len(pools)
            counts += count
            chances.append(share * often / often.sum())
        # With more steps, the first draws stay the same.
        drawn = np.random.default_rng([_BUCKETS, seed]).random(steps)
        edges = np.cumsum(np.concatenate(chances))
        self.bucket = np.searchsorted(edges / edges[-1], drawn, side="right")
        self.counts = np.array(counts)
        self.before = np.empty(steps, int)  # samples of the same bucket in earlier batches
        for bucket, count in enumerate(counts):
            own = self.bucket == bucket
            self.before[own] = count * np.arange(own.sum())
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> its last epoch and order

    def batch(self, step: int) -> list[Draw]:
        """The clips of a global batch."""
        bucket = int(self.bucket[step])
        length, count, pool = self.lengths[bucket], int(self.counts[bucket]), self.pools[bucket]
        kinds = self.placement.kinds(np.random.default_rng([_CROP, self.seed, step]), length, count)
        draws = []
        for slot in range(count):
            epoch, place = divmod(int(self.before[step]) + slot, len(pool))
            sample = int(self._order(bucket, epoch)[place])
            draws.append(Draw(sample, length, int(kinds[slot]), (self.seed, step, slot, 1), pool))
        return draws

    def _order(self, bucket: int, epoch: int) -> Int[np.ndarray, " n"]:
        known = self._orders.get(bucket)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([_ORDER, self.seed, bucket, epoch])
            known = self._orders[bucket] = (epoch, rng.permutation(self.pools[bucket]))
        return known[1]


def _groups(sizes: Int[np.ndarray, "n 2"]) -> Sequence[np.ndarray]:
    """Indices of equal rows, for each different row."""
    _, which = np.unique(sizes, axis=0, return_inverse=True)
    return [np.flatnonzero(which == group) for group in range(which.max() + 1)]
