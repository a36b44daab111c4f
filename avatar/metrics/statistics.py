"""Slopes, intervals, biases and means. What can't be measured is NaN, and NaN is never counted."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

DRAWS = 1000  # resamplings of a bootstrap
LEVEL = 0.95  # of its intervals


def mean(values: Float[np.ndarray, " n"]) -> float:
    """The mean of what was measured; NaN if nothing was."""
    measured = values[np.isfinite(values)]
    return float(measured.mean()) if len(measured) else float("nan")


def theil_sen(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """The median slope of y over x among all pairs of points: right up to 29 % of wild values; NaN below 3 points.

    Theil 1950, Sen 1968.
    """
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    i, j = i[apart], j[apart]
    return float(np.median((y[j] - y[i]) / (x[j] - x[i]))) if len(x) >= 3 and len(i) else float("nan")


def interval(rows: Float[np.ndarray, "n k"], statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """The LEVEL bootstrap interval (percentiles) of `statistic(rows)`, drawing whole rows; deterministic.

    A row is what is independent: a clip, not a frame. NaN for fewer than two rows. Resamplings that can't be measured
    are left out, and if those are the most, the interval is NaN.
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
    """The bias of `statistic(rows)` and its standard error, from leaving out one row at a time; NaN below two rows.

    A row is what is independent, as in `interval`. The bias that falls as 1/n is found; what remains falls as 1/n².
    Quenouille 1956, Tukey 1958.
    """
    n = len(rows)
    if n < 2:
        return float("nan"), float("nan")
    left = np.array([statistic(np.delete(rows, i, axis=0)) for i in range(n)])
    bias = (n - 1) * (left.mean() - statistic(rows))
    return float(bias), float(np.sqrt((n - 1) * left.var()))


def relative_change(first: float, last: float) -> float:
    """(last - first) / |first|; NaN where the first is nought or either is unknown."""
    return (last - first) / abs(first) if np.isfinite(first) and abs(first) > 1e-9 else float("nan")
