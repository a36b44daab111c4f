"""Bootstrap intervals, jackknife biases, means and changes with missing values."""

import math

import numpy as np
import pytest

from avatar.metrics.statistics import interval, jackknife, mean, relative_change


def test_the_interval_of_a_mean_has_the_theoretical_width():
    rows = np.random.default_rng(1).normal(5, 2, (100, 1))
    low, high = interval(rows, lambda drawn: float(drawn.mean()))
    assert low < rows.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * rows.std() / 10, rel=0.1)
    assert (low, high) == interval(rows, lambda drawn: float(drawn.mean()))


def test_one_row_or_an_undefined_statistic_has_no_interval():
    assert np.isnan(interval(np.ones((1, 1)), lambda drawn: 1.0)).all()
    assert np.isnan(interval(np.ones((5, 1)), lambda drawn: float("nan"))).all()


def test_the_jackknife_finds_the_bias_of_a_variance_and_the_error_of_a_mean():
    rows = np.random.default_rng(2).normal(5, 2, (30, 1))
    bias, _ = jackknife(rows, lambda kept: float(kept.var()))
    assert rows.var() - bias == pytest.approx(rows.var(ddof=1))  # as for a division by n - 1
    bias, error = jackknife(rows, lambda kept: float(kept.mean()))
    assert bias == pytest.approx(0, abs=1e-9) and error == pytest.approx(rows.std(ddof=1) / np.sqrt(30))
    assert np.isnan(jackknife(rows[:1], lambda kept: float(kept.mean()))).all()


def test_missing_values_have_no_mean_and_no_change():
    assert mean(np.array([1.0, np.nan, 3.0])) == 2
    assert math.isnan(mean(np.array([np.nan]))) and math.isnan(mean(np.zeros(0)))
    assert relative_change(-2.0, -1.0) == 0.5  # a negative correlation that rises is an improvement
    assert math.isnan(relative_change(0.0, 1.0)) and math.isnan(relative_change(float("nan"), 1.0))
