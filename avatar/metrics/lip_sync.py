"""Lip synchronisation: correlation of the estimated mouth aperture x with the true one y, its lag, and lip closures.

    r(k) = sum x'[i + k] y'[i] / sqrt(sum x'² sum y'²),    x' = x - mean of its clip, y' likewise

The sums are over the frames of all clips. Each clip is centred by itself, because only the timing of the mouth counts:
a mouth that opens more in clips with more speech must not raise the correlation. Pooling before the division weighs a
clip by its amount of speech, so a silent clip, whose own correlation is undefined, has no weight.

An invalid frame counts as an error: x' = 0 there, which explains nothing, while its y' stays in the sum.

The main score is r(0). A best lag exists even for unrelated sentences, so r at the best lag is only an addition to it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.interpolate import CubicSpline

from avatar.metrics import statistics
from avatar.metrics.state_estimation import EstimatedClip
from avatar.types import FRAME_RATE

MAX_LAG = 15  # frames in both directions: 600 ms
GRID_MS = 5.0
MIN_DEVIATION = 1e-3  # root mean square deviation of an aperture that moves
CLOSED, OPEN = 0.15, 0.3  # largest aperture of closed lips, smallest of open ones
CLOSED_WITHIN_S, OPEN_WITHIN_S = 0.04, 0.25  # from the middle of a p, b or m


def correlation(clips: Sequence[EstimatedClip]) -> float:
    """r(0), in [-1, 1]; 0 if no frame is valid, NaN if the mouth never moves or there is no speech."""
    return _pooled_correlation(_moments(clips, 0))


def correlation_interval(clips: Sequence[EstimatedClip]) -> tuple[float, float]:
    """The 95 % interval of r(0), by a bootstrap over clips."""
    return statistics.interval(_moments(clips, 0), _pooled_correlation)


def best_lag(clips: Sequence[EstimatedClip]) -> tuple[float, float]:
    """The lag in ms with the highest r, and that r; positive if the lips are late.

    r is computed at lags of up to 15 frames and interpolated by a cubic spline on a grid of 5 ms. Clips shorter than 30
    frames are left out. NaN if no clip is left, or if r is nowhere above 0.
    """
    long_enough = [clip for clip in clips if len(clip) >= 2 * MAX_LAG]
    frames = np.arange(-MAX_LAG, MAX_LAG + 1)
    r = np.array([_pooled_correlation(_moments(long_enough, int(k))) for k in frames])
    if not np.isfinite(r).all():
        return float("nan"), float("nan")
    end = 1000 / FRAME_RATE * MAX_LAG
    grid = np.arange(-end, end + GRID_MS / 2, GRID_MS)
    curve = CubicSpline(1000 / FRAME_RATE * frames, r)(grid)
    best = int(np.argmax(curve))
    if curve[best] <= 0:
        return float("nan"), float("nan")
    return float(grid[best]), float(np.clip(curve[best], -1, 1))


def silence_motion(clips: Sequence[EstimatedClip]) -> float:
    """Mean change of the aperture between consecutive silent frames, in [0, 1]; invalid frames are left out."""
    changes = []
    for clip in clips:
        silent = clip.silent & clip.valid
        changes.append(np.abs(np.diff(clip.mouth_open))[silent[1:] & silent[:-1]])
    return statistics.mean(np.concatenate(changes)) if changes else float("nan")


def closure_recall(clips: Sequence[EstimatedClip]) -> float:
    """Share of p, b and m at which the lips close, and are open before or after, in [0, 1]; NaN without any.

    Only those count at which the true lips do. A mouth that is always closed, or invalid, has a recall of 0.
    """
    total, recalled = 0, 0
    for clip in clips:
        true = _closes(clip.truth_mouth, np.ones(len(clip), bool), clip.closures_s)
        total += true.sum()
        recalled += (true & _closes(clip.mouth_open, clip.valid, clip.closures_s)).sum()
    return float(recalled / total) if total else float("nan")


def _closes(
    mouth: Float[np.ndarray, " f"], valid: Bool[np.ndarray, " f"], times: Float[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether the mouth is closed at each of these times (in seconds) and open around it."""
    distance = np.abs((np.arange(len(mouth)) + 0.5) / FRAME_RATE - times[:, None])
    closed = (distance <= CLOSED_WITHIN_S) & (valid & (mouth <= CLOSED))
    opened = (distance <= OPEN_WITHIN_S) & (valid & (mouth >= OPEN))
    return np.logical_and(closed.any(1), opened.any(1))


def _moments(clips: Sequence[EstimatedClip], lag: int) -> Float[np.ndarray, "n 4"]:
    """Per clip: sum x'y', sum x'², sum y'² and the number of valid frames, with x `lag` frames later than y."""
    rows = np.zeros((len(clips), 4))
    for row, clip in zip(rows, clips, strict=True):
        later, earlier = slice(max(lag, 0), len(clip) + min(lag, 0)), slice(max(-lag, 0), len(clip) - max(lag, 0))
        valid = clip.valid[later]
        x = _deviation(clip.mouth_open[later], valid)
        y = _deviation(clip.truth_mouth[earlier], np.ones(len(valid), bool))
        row[:] = x @ y, x @ x, y @ y, valid.sum()
    return rows


def _deviation(values: Float[np.ndarray, " f"], valid: Bool[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
    """Deviation of the valid values from their mean; 0 for the others, and for all if the mouth does not move."""
    if not valid.any():
        return np.zeros(len(values))
    out = np.where(valid, values - values[valid].mean(dtype=np.float64), 0)
    return out if np.sqrt((out**2).sum() / valid.sum()) > MIN_DEVIATION else np.zeros(len(values))


def _pooled_correlation(moments: Float[np.ndarray, "n 4"]) -> float:
    xy, xx, yy, valid = moments.sum(0)
    if yy > 0 and valid == 0:
        return 0.0
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")
