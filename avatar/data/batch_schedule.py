"""Which clips make a batch, and where they are cropped: functions of (seed, step), whatever has been before.

A batch is drawn for all ranks together; rank r of n takes every n-th clip of it from the r-th on. So the order doesn't
depend on how many ranks, workers or files there are, and a run goes on exactly where another one stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from avatar.data.bucketing import LengthBuckets
from avatar.errors import UserError

ANYWHERE, AT_START, ON_CHANGE = range(3)

# What random numbers are for: it keeps their streams apart.
_BUCKETS, _ORDER, _CROP, _SUBSTITUTE = range(1, 5)


@dataclass(frozen=True)
class Placement:
    """Where crops are laid in their clips: so many on purpose, all others anywhere.

    Args:
        starts: share of the crops of at most `short` latents that begin where their clip does, as a stream does.
        short: in latents.
        transitions: share of the crops of two latents or more that the state changes in, where it does in their clip.
    """

    starts: float = 0.0
    short: int = 3
    transitions: float = 0.0

    def __post_init__(self):
        if min(self.starts, self.transitions) < 0 or self.starts + self.transitions > 1:
            raise UserError(
                f"shares of {self.starts} at starts and {self.transitions} on transitions; wanted two that sum to at "
                "most 1"
            )

    def kinds(self, rng: np.random.Generator, length: int, count: int) -> Int[np.ndarray, " count"]:
        """What each of so many crops of this length is meant to be. Takes no number where all may lie anywhere."""
        starts = self.starts if length <= self.short else 0.0
        transitions = self.transitions if length > 1 else 0.0
        if not starts + transitions:
            return np.full(count, ANYWHERE)
        drawn = rng.random(count)
        return np.select([drawn < starts, drawn < starts + transitions], [AT_START, ON_CHANGE], ANYWHERE)


EVENLY = Placement()


def changes(state: Int[np.ndarray, " l"]) -> Int[np.ndarray, " m"]:
    """The latents at which another state begins."""
    return 1 + np.flatnonzero(np.diff(state.astype(int)))


def place(
    kind: int, rng: np.random.Generator, length: int, latents: int, at: Int[np.ndarray, " m"], anywhere: int
) -> int:
    """The first latent of a crop from a clip of so many latents whose state changes `at` some of them.

    `anywhere` is where it lies if it is not to lie, or can't lie, on purpose. A crop over a change has at least one
    latent before and one after it.
    """
    if kind == AT_START:
        return 0
    if kind == ON_CHANGE and len(at):
        change = int(rng.choice(at))
        return int(rng.integers(max(change - length + 1, 0), min(change - 1, latents - length) + 1))
    return anywhere


@dataclass(frozen=True)
class Draw:
    """One clip of a batch; the rest of its randomness is in `entropy`, which is its own."""

    sample: int
    length: int  # latents
    kind: int  # ANYWHERE, AT_START or ON_CHANGE
    entropy: tuple[int, ...]
    pool: Int[np.ndarray, " n"]  # the samples of its bucket

    def rng(self) -> np.random.Generator:
        """For its crop; always the same numbers."""
        return np.random.default_rng([_CROP, *self.entropy])

    def substitute(self, attempt: int) -> "Draw":
        """What to take when this draw's sample can't be read: another one of the bucket, by attempts counted from 1."""
        rng = np.random.default_rng([_SUBSTITUTE, *self.entropy, attempt])
        return Draw(int(rng.choice(self.pool)), self.length, self.kind, self.entropy, self.pool)


class BatchSchedule:
    """The batches of a run from samples of several sizes.

    A bucket is a (length, height, width). Each has an order of its own, in which all of its samples stand once before
    any comes again, every time shuffled anew, and its batches are cut from that order without a gap. Lengths are drawn
    by their weights; of the sizes that have clips so long, each so often that all samples are drawn alike often.

    Args:
        sizes: latents, height and width of each sample, in latent pixels.
        steps: batches that can be asked for.

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
                    f"crops of {length} latents, but the longest sample has {sizes[:, 0].max()}; make the lengths of "
                    "the buckets shorter"
                )
            long_enough = np.flatnonzero(sizes[:, 0] >= length)
            pools = [long_enough[group] for group in _groups(sizes[long_enough, 1:])]
            count = [buckets.count(length, int(sizes[pool[0], 1:].prod())) for pool in pools]
            often = np.array([len(pool) / n for pool, n in zip(pools, count, strict=True)])
            self.pools += pools
            self.lengths += [length] * len(pools)
            counts += count
            chances.append(share * often / often.sum())
        # A prefix of these is the same whatever `steps` is.
        drawn = np.random.default_rng([_BUCKETS, seed]).random(steps)
        edges = np.cumsum(np.concatenate(chances))
        self.bucket = np.searchsorted(edges / edges[-1], drawn, side="right")
        self.counts = np.array(counts)
        self.before = np.empty(steps, int)  # samples of the same bucket in earlier batches
        for bucket, count in enumerate(counts):
            own = self.bucket == bucket
            self.before[own] = count * np.arange(own.sum())
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each bucket, the last one asked for

    def batch(self, step: int) -> list[Draw]:
        """The clips of a batch, of all ranks."""
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
    """Indices of the rows that are equal, for each different one, in their order."""
    _, which = np.unique(sizes, axis=0, return_inverse=True)
    return [np.flatnonzero(which == group) for group in range(which.max() + 1)]
