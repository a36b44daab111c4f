"""Distribution of motion: Fréchet distance, coverage, amount and roughness, against true states of *other* clips.

Motion that audio does not determine (blinks, gaze, sway of the head) has no single truth to compare with, and a model
with correct lips may still freeze, average, over-smooth, tremble or collapse to few modes. Windows of WINDOW valid
frames are compared, with each channel in units of the reference's standard deviation:

    features     of a window: mean and standard deviation of each channel, d = 2 × channels
    Fréchet      |m - m'|² + tr(C + C' - 2 (C C')^½), means m and covariances C of the features
    coverage     share of the reference's windows with a generated window within the distance of the k-th nearest clip
    amount       mean over channels of s / s', s: standard deviation within windows
    roughness    geometric mean over channels of (1 - r) / (1 - r'), r: autocorrelation within windows at LAG frames

Fréchet distance and coverage respond to any change; coverage is low if modes are missing. Amount is 0 for a frozen
puppet and below 1 for an averaged one. Roughness is above 1 for a trembling puppet and below 1 for an over-smoothed
one. None depends on the audio, so late motion has the same scores.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from numpy.lib.stride_tricks import sliding_window_view
from scipy.spatial.distance import cdist

from avatar.metrics import statistics
from avatar.metrics.state_estimation import EstimatedClip
from avatar.puppet.motion import HIGH, LOW

WINDOW, HOP = 24, 12  # frames: about a second, half overlapping
LAG = 2  # frames
MIN_SCALE = 0.05  # of a channel's range: the smallest unit of a channel
MIN_MOTION = 0.005  # of its range: channels with less motion in the reference's windows have no amount
MIN_ROUGH = 0.01  # of the reference's motion: channels with less have no roughness
MIN_CLIPS = 8  # for a Fréchet distance or coverage
COVERED = 0.95  # expected coverage of equal distributions, which determines k
MEASURES = (
    "frechet",
    "frechet_ci",
    "coverage",
    "motion_amount",
    "motion_amount_ci",
    "motion_roughness",
    "motion_roughness_ci",
)

Trajectory = Float[np.ndarray, "f s"]  # rows of motion.CHANNELS; NaN: unknown
Windows = Float[np.ndarray, "w s t"]
Motion = Float[np.ndarray, "2 s"]  # per channel: variance within windows, half the mean squared step over LAG
Gaussian = tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]


def distribution(clips: Sequence[EstimatedClip], reference: Sequence[Trajectory]) -> dict[str, float | list[float]]:
    """The MEASURES of the motion of clips, with 95 % intervals (`_ci`), on the channels that are known in every clip.

    `frechet` is corrected for the bias of few clips, so it may be below 0. `coverage` is in [0, 1]. `motion_amount` and
    `motion_roughness` are ratios, 1 for equal distributions. NaN without windows; for the first two also for fewer than
    MIN_CLIPS clips or 2 d windows on either side.

    Args:
        clips: estimated from videos.
        reference: true states of other clips.
    """
    ours, theirs = [clip.trajectory for clip in clips if clip.valid.any()], list(reference)
    channels = _known_channels(ours)
    ours, theirs = ([windows(t[:, channels]) for t in side] for side in (ours, theirs))
    ours, theirs = ([w for w in side if len(w)] for side in (ours, theirs))
    if not (ours and theirs and channels.any()):
        return dict.fromkeys(MEASURES, float("nan"))
    values = np.concatenate([w.swapaxes(1, 2).reshape(-1, channels.sum()) for w in theirs])
    ranges = (HIGH - LOW)[channels]
    scale = np.maximum(values.std(0), MIN_SCALE * ranges)[:, None]
    moving = np.concatenate(theirs).var(2).mean(0) > (MIN_MOTION * ranges) ** 2
    x, y = ([features(w / scale) for w in side] for side in (ours, theirs))
    sums, others_sums = (np.stack([_motion_sums(w[:, moving]) for w in side]) for side in (ours, theirs))
    a, b = _pooled_motion(sums), _pooled_motion(others_sums)
    distance, low, high = frechet(x, y)
    measures = (
        distance,
        [low, high],
        coverage(x, y),
        amount(a, b),
        list(statistics.interval(sums, lambda rows: amount(_pooled_motion(rows), b))),
        roughness(a, b),
        list(statistics.interval(sums, lambda rows: roughness(_pooled_motion(rows), b))),
    )
    return dict(zip(MEASURES, measures, strict=True))


def windows(states: Trajectory) -> Windows:
    """The windows of a trajectory without NaN: w windows, s channels, t frames."""
    if len(states) < WINDOW:
        return np.zeros((0, states.shape[1], WINDOW))
    cut = sliding_window_view(states.astype(np.float64), WINDOW, axis=0)[::HOP]
    return cut[np.isfinite(cut).all((1, 2))]


def features(cut: Windows) -> Float[np.ndarray, "w d"]:
    """Mean and standard deviation of each channel of each window."""
    return np.concatenate([cut.mean(2), cut.std(2)], axis=1)


def frechet_distance(x: Gaussian, y: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, each a mean and a covariance (Dowson & Landau 1982).

    The trace of (C C')^½ is that of (C^½ C' C^½)^½, which is symmetric, so covariances may be singular.
    """
    (mean_x, cov_x), (mean_y, cov_y) = x, y
    values, vectors = np.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)


def frechet(x: Sequence[Float[np.ndarray, "_ d"]], y: Sequence[Float[np.ndarray, "_ d"]]) -> tuple[float, float, float]:
    """Fréchet distance of two sets of clips and its 95 % interval, corrected for the bias of a finite number of clips.

    The plain distance of few samples is too large (Chong & Forsyth, arXiv:1911.07023). Bias and standard error come
    from a jackknife over the clips of each side, since the windows of a clip are not independent. NaN for fewer than
    MIN_CLIPS clips or 2 d windows on either side.

    Args:
        x, y: features of the windows of each clip.

    Returns:
        The distance, and the ends of its interval; each may be below 0.
    """
    if not (_enough(x) and _enough(y)):
        return float("nan"), float("nan"), float("nan")
    rows_x, rows_y = _moments(x), _moments(y)
    gaussian_x, gaussian_y = _gaussian(rows_x), _gaussian(rows_y)
    bias_x, error_x = statistics.jackknife(rows_x, lambda rows: frechet_distance(_gaussian(rows), gaussian_y))
    bias_y, error_y = statistics.jackknife(rows_y, lambda rows: frechet_distance(gaussian_x, _gaussian(rows)))
    distance = frechet_distance(gaussian_x, gaussian_y) - bias_x - bias_y
    half_width = 1.96 * float(np.hypot(error_x, error_y))
    return distance, distance - half_width, distance + half_width


def coverage(x: Sequence[Float[np.ndarray, "_ d"]], y: Sequence[Float[np.ndarray, "_ d"]]) -> float:
    """Coverage: share of y's windows with a window of x within the distance of the k-th nearest other clip of y.

    Naeem et al., arXiv:2002.09797, with two changes. The neighbours are clips, at the distance of their nearest window,
    since the windows of a clip are not independent. And k is the smallest for which equal distributions have a coverage
    of COVERED, for any number of clips. NaN for fewer than MIN_CLIPS clips or 2 d windows on either side.

    Args:
        x, y: features of the windows of each clip.

    Returns:
        A share in [0, 1].
    """
    if not (_enough(x) and _enough(y)):
        return float("nan")
    owner = np.repeat(np.arange(len(y)), list(map(len, y)))
    ours, theirs = np.concatenate(x), np.concatenate(y)
    starts = np.cumsum([0, *map(len, y)])[:-1]
    distances = np.minimum.reduceat(cdist(theirs, theirs), starts, axis=1)  # of windows to clips
    distances[np.arange(len(theirs)), owner] = np.inf
    k = _neighbours(len(y), len(x))
    radius = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return float((cdist(theirs, ours).min(1) <= radius).mean())


def amount(ours: Motion, theirs: Motion) -> float:
    """Amount of motion relative to the reference's."""
    return float(np.sqrt(ours[0] / theirs[0]).mean())


def roughness(ours: Motion, theirs: Motion) -> float:
    """Roughness of motion, per amount, relative to the reference's; channels that do not move are left out."""
    moves = ours[0] > MIN_ROUGH**2 * theirs[0]
    ratio = ours[1, moves] / ours[0, moves] / (theirs[1, moves] / theirs[0, moves])
    return float(np.exp(np.log(ratio).mean())) if moves.any() else float("nan")


def _known_channels(trajectories: Sequence[Trajectory]) -> Bool[np.ndarray, " s"]:
    """The channels that are known in all valid frames of every trajectory."""
    known = np.ones(len(LOW), bool)
    for states in trajectories:
        finite = np.isfinite(states)
        known &= finite[finite.any(1)].all(0)
    return known


def _enough(groups: Sequence[Float[np.ndarray, "_ d"]]) -> bool:
    return len(groups) >= MIN_CLIPS and sum(map(len, groups)) >= 2 * groups[0].shape[1]


def _moments(groups: Sequence[Float[np.ndarray, "_ d"]]) -> Float[np.ndarray, "n k"]:
    """Per clip: the number of windows, the sum of their features, and the sum of the outer products."""
    return np.stack([np.concatenate([[len(x)], x.sum(0), (x.T @ x).ravel()]) for x in groups])


def _gaussian(rows: Float[np.ndarray, "n k"]) -> Gaussian:
    count, *sums = rows.sum(0)
    d = int(np.sqrt(len(sums)))
    mean = np.array(sums[:d]) / count
    return mean, np.array(sums[d:]).reshape(d, d) / count - np.outer(mean, mean)


def _motion_sums(cut: Windows) -> Float[np.ndarray, " k"]:
    """Sums over a clip's windows, per channel, of variance and half the mean squared step, then their number."""
    steps = cut[:, :, LAG:] - cut[:, :, :-LAG]
    return np.concatenate([cut.var(2).sum(0), (steps**2).mean(2).sum(0) / 2, [len(cut)]])


def _pooled_motion(rows: Float[np.ndarray, "n k"]) -> Motion:
    """Motion of several clips from their `_motion_sums`."""
    total = rows.sum(0)
    return total[:-1].reshape(2, -1) / total[-1]


def _neighbours(reference: int, generated: int) -> int:
    """The smallest k with an expected coverage of COVERED, for two sets of clips from one distribution.

    A window is not covered if its k nearest clips, of both sets without its own clip, all belong to the reference set.
    """
    missed, k = 1.0, 0
    while missed > 1 - COVERED and k < reference - 1:
        missed *= (reference - 1 - k) / (reference - 1 - k + generated)
        k += 1
    return k
