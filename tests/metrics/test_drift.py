"""Drift against planted decay."""

import numpy as np
import pytest

from avatar.metrics.drift import BLOCK, QUANTITIES, blocks, drift


def test_a_steady_stream_has_no_drift(reading):
    found = drift([reading(s, frames=2000, noise=0.05) for s in range(2)])
    assert set(found) == set(QUANTITIES)
    assert abs(found["lip_sync_r"]["slope_per_1000"]) < 0.02 and abs(found["lip_sync_r"]["change"]) < 0.03
    assert found["identity_delta_e"]["slope_per_1000"] == 0 and found["identity_delta_e"]["change"] == 0


def test_planted_decay_is_found_in_each_quantity(reading):
    frames = np.arange(2000)
    stream = reading(
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


def test_short_clips_have_no_drift_and_middling_ones_no_tenths(reading):
    assert all(np.isnan(list(values.values())).all() for values in drift([reading(frames=120)]).values())
    middling = drift([reading(frames=500)])["identity_delta_e"]
    assert middling["slope_per_1000"] == 0 and np.isnan(middling["change"])
    assert np.isnan(drift([])["motion"]["slope_per_1000"])


def test_blocks_stand_at_their_middles_and_end_with_the_shortest_stream(reading):
    middle, values = blocks([reading(frames=350), reading(1, frames=520)], "motion")
    np.testing.assert_array_equal(middle, np.array([0.5, 1.5, 2.5]) * BLOCK)
    np.testing.assert_allclose(values, 0.02, rtol=1e-6)
