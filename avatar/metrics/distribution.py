"""Do the puppets move as puppets do? What was read, as a distribution, beside the true states of *other* clips.

What the sound doesn't settle (when to blink, where to look, how the head sways) has no one truth to be compared with,
and a model that gets the lips right may still freeze, average, smear, tremble, or know one way to move. Hence, on
windows of WINDOW frames that could be read throughout, with every channel in units of the others' standard deviation:

    features     of a window: mean and standard deviation of each channel, d = 2 × channels
    Fréchet      |m - m'|² + tr(C + C' - 2 (C C')^½), means m and covariances C of the features
    coverage     share of the others' windows that one of ours is as near to as the k-th nearest other clip
    amount       mean over channels of s / s', s: standard deviation within windows
    roughness    geometric mean over channels of (1 - r) / (1 - r'), r: autocorrelation within windows at LAG frames

Fréchet distance and coverage see any change and don't say which; coverage is low where ways to move are missing. Amount
is 0 for a frozen puppet and below 1 for an averaged one. Roughness is above 1 for a trembling puppet and below 1 for an
over-smoothed one. None of them knows of the sound: motion may come late and be just as likely.
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
LEAST_SPREAD = 0.05  # of a channel's range: the least that a channel is divided by
MOVES = 0.005  # of its range: a channel with less motion in the others' windows has no amount to speak of
STILL = 0.01  # of the others' motion: a channel with less has no roughness
LEAST_CLIPS = 8  # for a Fréchet distance or coverage
COVERED = 0.95  # that coverage expects of equal distributions; k follows from it
MEASURES = (
    "frechet",
    "frechet_ci",
    "coverage",
    "motion_amount",
    "motion_amount_ci",
    "motion_roughness",
    "motion_roughness_ci",
)

Trajectory = Float[np.ndarray, "f s"]  # rows of motion.CHANNELS; NaN where unknown
Windows = Float[np.ndarray, "w s t"]
Motion = Float[np.ndarray, "2 s"]  # of each channel: variance within windows, and half the mean squared step over LAG
Gaussian = tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]


def distribution(readings: Sequence[EstimatedClip], others: Sequence[Trajectory]) -> dict[str, float | list[float]]:
    """Fréchet distance, coverage, amount and roughness of readings beside the true states of other clips.

    `frechet` and `frechet_ci` are without the bias of few clips (`frechet`), so they may fall below 0; `coverage` lies
    in [0, 1]; `motion_amount` and `motion_roughness` are ratios, right at 1, with bootstrap intervals over clips
    (`_ci`, 95 %). Only channels are looked at that were read in every clip. NaN for what can't be said: without
    windows, and for the first two below LEAST_CLIPS clips or 2 d windows on either side.
    """
    ours, theirs = [r.trajectory for r in readings if r.valid.any()], list(others)
    channels = _known(ours)
    ours, theirs = ([windows(t[:, channels]) for t in side] for side in (ours, theirs))
    ours, theirs = ([w for w in side if len(w)] for side in (ours, theirs))
    if not (ours and theirs and channels.any()):
        return dict.fromkeys(MEASURES, float("nan"))
    every = np.concatenate([w.swapaxes(1, 2).reshape(-1, channels.sum()) for w in theirs])
    reach = (HIGH - LOW)[channels]
    scale = np.maximum(every.std(0), LEAST_SPREAD * reach)[:, None]
    moving = np.concatenate(theirs).var(2).mean(0) > (MOVES * reach) ** 2
    x, y = ([features(w / scale) for w in side] for side in (ours, theirs))
    sums, others_sums = (np.stack([_sums(w[:, moving]) for w in side]) for side in (ours, theirs))
    a, b = _pooled(sums), _pooled(others_sums)
    distance, low, high = frechet(x, y)
    values = (
        distance,
        [low, high],
        coverage(x, y),
        amount(a, b),
        list(statistics.interval(sums, lambda rows: amount(_pooled(rows), b))),
        roughness(a, b),
        list(statistics.interval(sums, lambda rows: roughness(_pooled(rows), b))),
    )
    return dict(zip(MEASURES, values, strict=True))


def windows(states: Trajectory) -> Windows:
    """The windows of a trajectory in which everything is known."""
    if len(states) < WINDOW:
        return np.zeros((0, states.shape[1], WINDOW))
    cut = sliding_window_view(states.astype(np.float64), WINDOW, axis=0)[::HOP]
    return cut[np.isfinite(cut).all((1, 2))]


def features(cut: Windows) -> Float[np.ndarray, "w d"]:
    """Mean and standard deviation of each channel."""
    return np.concatenate([cut.mean(2), cut.std(2)], axis=1)


def frechet_distance(x: Gaussian, y: Gaussian) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians, each a mean and a covariance.

    Dowson & Landau 1982. The trace of (C C')^½ is that of (C^½ C' C^½)^½, which is symmetric: singular covariances do.
    """
    (mean_x, cov_x), (mean_y, cov_y) = x, y
    values, vectors = np.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)


def frechet(x: Sequence[Float[np.ndarray, "_ d"]], y: Sequence[Float[np.ndarray, "_ d"]]) -> tuple[float, float, float]:
    """The Fréchet distance of two sets of clips' features, and its 95 % interval, without the bias of their numbers.

    Few samples look farther apart than they are (Chong & Forsyth, arXiv:1911.07023). Bias and error are found by a
    jackknife over clips of either side, since a clip's windows are alike. An estimate may fall below 0. NaN for fewer
    than LEAST_CLIPS clips or 2 d windows on a side.
    """
    if not (_enough(x) and _enough(y)):
        return float("nan"), float("nan"), float("nan")
    rows_x, rows_y = _moments(x), _moments(y)
    gaussian_x, gaussian_y = _gaussian(rows_x), _gaussian(rows_y)
    bias_x, error_x = statistics.jackknife(rows_x, lambda rows: frechet_distance(_gaussian(rows), gaussian_y))
    bias_y, error_y = statistics.jackknife(rows_y, lambda rows: frechet_distance(gaussian_x, _gaussian(rows)))
    distance = frechet_distance(gaussian_x, gaussian_y) - bias_x - bias_y
    reach = 1.96 * float(np.hypot(error_x, error_y))
    return distance, distance - reach, distance + reach


def coverage(x: Sequence[Float[np.ndarray, "_ d"]], y: Sequence[Float[np.ndarray, "_ d"]]) -> float:
    """The share of y's windows that have a window of x as near as the k-th nearest other clip of y, in [0, 1].

    Naeem et al., arXiv:2002.09797, with two changes. Neighbours are clips, each as near as its nearest window, for the
    windows of one clip are alike. And k is the least for which clips of one distribution cover COVERED of each other,
    however many there are on either side. NaN for fewer than LEAST_CLIPS clips or 2 d windows on a side.
    """
    if not (_enough(x) and _enough(y)):
        return float("nan")
    owner = np.repeat(np.arange(len(y)), list(map(len, y)))
    ours, theirs = np.concatenate(x), np.concatenate(y)
    starts = np.cumsum([0, *map(len, y)])[:-1]
    apart = np.minimum.reduceat(cdist(theirs, theirs), starts, axis=1)  # a window from a clip
    apart[np.arange(len(theirs)), owner] = np.inf
    k = _neighbours(len(y), len(x))
    radius = np.partition(apart, k - 1, axis=1)[:, k - 1]
    return float((cdist(theirs, ours).min(1) <= radius).mean())


def amount(ours: Motion, theirs: Motion) -> float:
    """How much it moves, relative to the others."""
    return float(np.sqrt(ours[0] / theirs[0]).mean())


def roughness(ours: Motion, theirs: Motion) -> float:
    """How abruptly it moves for how much it does, relative to the others; channels that don't move are left out."""
    moves = ours[0] > STILL**2 * theirs[0]
    ratio = ours[1, moves] / ours[0, moves] / (theirs[1, moves] / theirs[0, moves])
    return float(np.exp(np.log(ratio).mean())) if moves.any() else float("nan")


def _known(trajectories: Sequence[Trajectory]) -> Bool[np.ndarray, " s"]:
    """The channels that were read in every trajectory, wherever its frames could be read."""
    known = np.ones(len(LOW), bool)
    for states in trajectories:
        read = np.isfinite(states)
        known &= read[read.any(1)].all(0)
    return known


def _enough(groups: Sequence[Float[np.ndarray, "_ d"]]) -> bool:
    return len(groups) >= LEAST_CLIPS and sum(map(len, groups)) >= 2 * groups[0].shape[1]


def _moments(groups: Sequence[Float[np.ndarray, "_ d"]]) -> Float[np.ndarray, "n k"]:
    """Per clip: its number of windows, their sum, and the sum of their outer products."""
    return np.stack([np.concatenate([[len(x)], x.sum(0), (x.T @ x).ravel()]) for x in groups])


def _gaussian(rows: Float[np.ndarray, "n k"]) -> Gaussian:
    count, *sums = rows.sum(0)
    d = int(np.sqrt(len(sums)))
    mean = np.array(sums[:d]) / count
    return mean, np.array(sums[d:]).reshape(d, d) / count - np.outer(mean, mean)


def _sums(cut: Windows) -> Float[np.ndarray, " k"]:
    """Of one clip: per channel the sums over windows of variance and half the mean squared step, and their number."""
    steps = cut[:, :, LAG:] - cut[:, :, :-LAG]
    return np.concatenate([cut.var(2).sum(0), (steps**2).mean(2).sum(0) / 2, [len(cut)]])


def _pooled(rows: Float[np.ndarray, "n k"]) -> Motion:
    """The motion of clips together, from their sums (`_sums`)."""
    total = rows.sum(0)
    return total[:-1].reshape(2, -1) / total[-1]


def _neighbours(wanted: int, found: int) -> int:
    """The least k with which `wanted` clips are covered by `found` ones of their distribution to COVERED.

    A clip's window is not covered if the k clips nearest to it, of all the others, are all of its own set.
    """
    missed, k = 1.0, 0
    while missed > 1 - COVERED and k < wanted - 1:
        missed *= (wanted - 1 - k) / (wanted - 1 - k + found)
        k += 1
    return k
