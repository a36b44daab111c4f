"""Does a stream get worse as it goes on? Each quantity along the stream, its slope, and its end against its beginning.

Several streams are laid side by side and pooled block by block. A stream's own ups and downs (a pause, a blink) are not
drift: see the same figures of the ground truth.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from avatar.metrics import identity, lip_sync, statistics
from avatar.metrics.state_estimation import EstimatedClip

BLOCK = 100  # frames: 4 s, enough speech for a correlation
LEAST_BLOCKS = 4  # for a slope


def motion(readings: Sequence[EstimatedClip]) -> float:
    """The mean motion per frame, in shares of the channels' ranges; frames that can't be read are left out."""
    return statistics.mean(np.concatenate([r.motion for r in readings])) if readings else float("nan")


def motion_of_truth(readings: Sequence[EstimatedClip]) -> float:
    """`motion` of the true puppet over the same frames."""
    return statistics.mean(np.concatenate([r.truth_motion for r in readings])) if readings else float("nan")


QUANTITIES: Mapping[str, Callable[[Sequence[EstimatedClip]], float]] = {
    "lip_sync_r": lip_sync.correlation,
    "identity_delta_e": identity.delta_e,
    "motion": motion,
    "motion_of_truth": motion_of_truth,
    "undecodable_rate": identity.undecodable_rate,
}


def blocks(readings: Sequence[EstimatedClip], quantity: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The middle frame of each block of BLOCK frames and the quantity there, as far as the shortest stream goes."""
    starts = range(0, _shared(readings) - BLOCK + 1, BLOCK)
    values = [QUANTITIES[quantity]([r.between(start, start + BLOCK) for r in readings]) for start in starts]
    return np.array([start + BLOCK / 2 for start in starts], float), np.array(values, float)


def drift(readings: Sequence[EstimatedClip]) -> dict[str, dict[str, float]]:
    """For each of QUANTITIES: its Theil–Sen slope per 1000 frames, its value in the first tenth and in the last one.

    `change` is relative to the first tenth. NaN where streams are too short: slopes want four blocks of 100 frames,
    tenths as many frames as a block each.
    """
    return {name: _drift(readings, name) for name in QUANTITIES}


def _drift(readings: Sequence[EstimatedClip], quantity: str) -> dict[str, float]:
    frames = _shared(readings)
    middle, values = blocks(readings, quantity)
    slope = statistics.theil_sen(middle / 1000, values) if len(values) >= LEAST_BLOCKS else float("nan")
    tenth = frames // 10
    first = last = float("nan")
    if tenth >= BLOCK:
        first = QUANTITIES[quantity]([r.between(0, tenth) for r in readings])
        last = QUANTITIES[quantity]([r.between(frames - tenth, frames) for r in readings])
    change = statistics.relative_change(first, last)
    return {"slope_per_1000": slope, "first_tenth": first, "last_tenth": last, "change": change}


def _shared(readings: Sequence[EstimatedClip]) -> int:
    """How many frames all streams have."""
    return min(map(len, readings), default=0)
