"""Drift of synthetic streams with a known decay, and the robust slope."""

import numpy as np
import pytest

from avatar.metrics.drift import BLOCK, QUANTITIES, blocks, drift, slope
from avatar.types import EMOTIONS
from tests.acting import acted


def test_a_steady_stream_has_no_drift(estimated):
    found = drift([estimated(s, frames=2000, noise=0.05) for s in range(2)])
    assert set(found) == set(QUANTITIES)
    assert abs(found["lip_sync_r"]["slope_per_1000"]) < 0.02 and abs(found["lip_sync_r"]["change"]) < 0.03
    assert found["identity_delta_e"]["slope_per_1000"] == 0 and found["identity_delta_e"]["change"] == 0


def test_planted_decay_is_found_in_each_quantity(estimated):
    frames = np.arange(2000)
    stream = estimated(
        frames=2000,
        noise=0.3 * frames / 2000,
        delta_e=(2 + 3 * frames / 1000).astype(np.float32),
        motion=(0.04 * 0.5 ** (frames / 2000)).astype(np.float32),
    )
    found = drift([stream])
    assert found["identity_delta_e"]["slope_per_1000"] == pytest.approx(3, abs=0.01)
    assert found["identity_delta_e"]["first_tenth"] == pytest.approx(2.3, abs=0.01)
    assert found["identity_delta_e"]["change"] == pytest.approx((7.7 - 2.3) / 2.3, abs=0.01)
    assert found["motion"]["change"] == pytest.approx(0.5**0.9 - 1, abs=0.01)
    assert found["lip_sync_r"]["slope_per_1000"] < -0.1 and found["lip_sync_r"]["change"] < -0.2
    assert found["motion_of_truth"]["change"] == 0


def test_a_stream_whose_emotion_changes_against_its_label_drifts(estimated):
    """The second half shows another emotion than its label, and an unlabelled stream has no share."""
    states = np.concatenate([acted(seed, emotion, frames=1000) for seed, emotion in enumerate(("happy", "sad"))])
    label = np.full(2000, EMOTIONS.index("happy"))
    found = drift([estimated(frames=2000, states=states, emotion=label)])["emotion_as_labelled"]
    assert found["first_tenth"] == 1 and found["last_tenth"] == 0 and found["change"] == -1
    unlabelled = drift([estimated(frames=2000, states=states)])["emotion_as_labelled"]
    assert np.isnan(unlabelled["first_tenth"])


def test_short_streams_have_no_drift_and_longer_ones_no_tenths(estimated):
    assert all(np.isnan(list(values.values())).all() for values in drift([estimated(frames=120)]).values())
    medium = drift([estimated(frames=500)])["identity_delta_e"]
    assert medium["slope_per_1000"] == 0 and np.isnan(medium["change"])
    assert np.isnan(drift([])["motion"]["slope_per_1000"])


def test_blocks_have_middles_and_end_with_the_shortest_stream(estimated):
    middle, values = blocks([estimated(frames=350), estimated(1, frames=520)], "motion")
    np.testing.assert_array_equal(middle, np.array([0.5, 1.5, 2.5]) * BLOCK)
    np.testing.assert_allclose(values, 0.02, rtol=1e-6)


def test_the_slope_is_robust_to_outliers_and_missing_values():
    x = np.arange(40.0)
    y = 3.0 - 0.25 * x + np.random.default_rng(0).normal(0, 0.01, 40)
    y[::5] += 100
    y[3] = np.nan
    assert slope(x, y) == pytest.approx(-0.25, abs=0.02)
    assert abs(np.polyfit(x[4:], y[4:], 1)[0] + 0.25) > 0.1  # least squares is not robust


def test_the_slope_needs_three_measured_points():
    assert np.isnan(slope(np.arange(2.0), np.arange(2.0)))
    assert np.isnan(slope(np.arange(4.0), np.array([1.0, np.nan, np.nan, 2.0])))
