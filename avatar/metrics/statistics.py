"""Statistics that ignore missing values: means, bootstrap intervals, jackknife biases, relative changes.

NaN means "not measured": it is left out of every statistic.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

DRAWS = 1000  # resamples of a bootstrap
LEVEL = 0.95  # of its intervals


def mean(values: Float[np.ndarray, " n"]) -> float:
    """Mean of the finite values; NaN if there are none."""
    measured = values[np.isfinite(values)]
    return float(measured.mean()) if len(measured) else float("nan")


def interval(rows: Float[np.ndarray, "n k"], statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """Bootstrap interval (percentiles, LEVEL) of `statistic(rows)`; deterministic.

    Resamples in which the statistic is NaN are left out. NaN for fewer than two rows, or if more than half of the
    resamples are left out.

    Args:
        rows: independent samples; one per clip, since the frames of a clip are not independent.
        statistic: of a resample of the rows.
    """
    if len(rows) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(rows), size=(DRAWS, len(rows)))
    values = np.array([statistic(rows[i]) for i in drawn])
    values = values[np.isfinite(values)]
    if len(values) < DRAWS / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def jackknife(rows: Float[np.ndarray, "n k"], statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """Jackknife estimates of the bias of `statistic(rows)` and of its standard error; NaN for fewer than two rows.

    It finds the part of the bias that falls as 1/n. Quenouille 1956, Tukey 1958.

    Args:
        rows: independent samples, as in `interval`.
        statistic: of all rows but one.
    """
    n = len(rows)
    if n < 2:
        return float("nan"), float("nan")
    left = np.array([statistic(np.delete(rows, i, axis=0)) for i in range(n)])
    bias = (n - 1) * (left.mean() - statistic(rows))
    return float(bias), float(np.sqrt((n - 1) * left.var()))


def relative_change(first: float, last: float) -> float:
    """(last - first) / |first|; NaN if `first` is 0 or either is not measured."""
    return (last - first) / abs(first) if np.isfinite(first) and abs(first) > 1e-9 else float("nan")
