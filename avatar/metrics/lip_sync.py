"""Do the lips say what is heard? The aperture that was read, x, against the true one, y.

    r(k) = sum x'[i + k] y'[i] / sqrt(sum x'² sum y'²),    x' = x - mean of its clip, y' likewise

Sums run over the frames of all clips. Each clip is centred by itself: what counts is when the mouth moves, and a model
must not earn a correlation by opening it more in the clips where more is said. Pooling before dividing weighs a clip by
how much it says, and a silent one, which has no correlation of its own, by nothing.

A frame that can't be read counts as wrong: x' = 0 there, which explains nothing, while its y' stays in the sum.

The headline is r(0). A best lag is always found, even between unrelated sentences, so r at the best lag stands only
beside it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.interpolate import CubicSpline

from avatar.metrics import statistics
from avatar.metrics.state_estimation import EstimatedClip
from avatar.types import FRAME_RATE

REACH = 15  # frames to either side in which the best lag is looked for: 600 ms
GRID_MS = 5.0
STILL = 1e-3  # a mouth whose aperture strays by less (rms) doesn't move
SHUT, OPEN = 0.15, 0.3  # apertures of closed lips, and of parted ones
AT_S, AROUND_S = 0.04, 0.25  # how near to the middle of a p the lips must be shut, and parted


def correlation(readings: Sequence[EstimatedClip]) -> float:
    """r(0), in [-1, 1]; 0 if no frame can be read, NaN if the mouth never moves or nothing is said."""
    return _pooled(_moments(readings, 0))


def correlation_interval(readings: Sequence[EstimatedClip]) -> tuple[float, float]:
    """The 95 % interval of r(0), by a bootstrap over clips."""
    return statistics.interval(_moments(readings, 0), _pooled)


def best_lag(readings: Sequence[EstimatedClip]) -> tuple[float, float]:
    """The lag in ms at which r is highest, and that r; a positive lag means that the lips come too late.

    r is measured at whole frames within 600 ms and interpolated by a cubic spline on a grid of 5 ms. Clips shorter than
    twice the reach don't take part; NaN if none is left, or if r is nowhere above 0.
    """
    long_enough = [reading for reading in readings if len(reading) >= 2 * REACH]
    frames = np.arange(-REACH, REACH + 1)
    r = np.array([_pooled(_moments(long_enough, int(k))) for k in frames])
    if not np.isfinite(r).all():
        return float("nan"), float("nan")
    end = 1000 / FRAME_RATE * REACH
    grid = np.arange(-end, end + GRID_MS / 2, GRID_MS)
    curve = CubicSpline(1000 / FRAME_RATE * frames, r)(grid)
    best = int(np.argmax(curve))
    if curve[best] <= 0:
        return float("nan"), float("nan")
    return float(grid[best]), float(np.clip(curve[best], -1, 1))


def silence_motion(readings: Sequence[EstimatedClip]) -> float:
    """How far the aperture moves from one silent frame to the next, on average, in [0, 1], unread ones left out."""
    moved = []
    for reading in readings:
        still = reading.silent & reading.valid
        moved.append(np.abs(np.diff(reading.mouth_open))[still[1:] & still[:-1]])
    return statistics.mean(np.concatenate(moved)) if moved else float("nan")


def closure_recall(readings: Sequence[EstimatedClip]) -> float:
    """The share of p, b and m at which the lips shut, and are parted before or after, in [0, 1].

    Only those count at which the true lips do; a mouth that is always shut, or can't be read, meets none. NaN if there
    are none.
    """
    wanted, met = 0, 0
    for reading in readings:
        due = _shuts(reading.truth_mouth, np.ones(len(reading), bool), reading.closures_s)
        wanted += due.sum()
        met += (due & _shuts(reading.mouth_open, reading.valid, reading.closures_s)).sum()
    return float(met / wanted) if wanted else float("nan")


def _shuts(
    mouth: Float[np.ndarray, " f"], valid: Bool[np.ndarray, " f"], times: Float[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether the mouth is seen shut at each of these times (s) and seen open around it."""
    away = np.abs((np.arange(len(mouth)) + 0.5) / FRAME_RATE - times[:, None])
    shut = (away <= AT_S) & (valid & (mouth <= SHUT))
    parted = (away <= AROUND_S) & (valid & (mouth >= OPEN))
    return np.logical_and(shut.any(1), parted.any(1))


def _moments(readings: Sequence[EstimatedClip], lag: int) -> Float[np.ndarray, "n 4"]:
    """Per clip: sum x'y', sum x'², sum y'² and the number of frames that could be read, x being `lag` frames later."""
    rows = np.zeros((len(readings), 4))
    for row, reading in zip(rows, readings, strict=True):
        later, earlier = slice(max(lag, 0), len(reading) + min(lag, 0)), slice(max(-lag, 0), len(reading) - max(lag, 0))
        valid = reading.valid[later]
        x = _deviation(reading.mouth_open[later], valid)
        y = _deviation(reading.truth_mouth[earlier], np.ones(len(valid), bool))
        row[:] = x @ y, x @ x, y @ y, valid.sum()
    return rows


def _deviation(values: Float[np.ndarray, " f"], valid: Bool[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
    """How far the valid values are from their mean; 0 for the others, and for all if they don't move."""
    if not valid.any():
        return np.zeros(len(values))
    out = np.where(valid, values - values[valid].mean(dtype=np.float64), 0)
    return out if np.sqrt((out**2).sum() / valid.sum()) > STILL else np.zeros(len(values))


def _pooled(moments: Float[np.ndarray, "n 4"]) -> float:
    """r of the clips together."""
    xy, xx, yy, read = moments.sum(0)
    if yy > 0 and read == 0:
        return 0.0
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")
