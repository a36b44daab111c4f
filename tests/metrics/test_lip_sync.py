"""Lip-sync scores for known lags, noise, undecodable frames and mouths that do not move."""

import math
from dataclasses import replace

import numpy as np
import pytest

from avatar.metrics import lip_sync


def test_the_correlation_of_one_clip_is_pearsons(estimated):
    clip = estimated(noise=0.2)
    assert lip_sync.correlation([clip]) == pytest.approx(np.corrcoef(clip.mouth_open, clip.truth_mouth)[0, 1], abs=1e-6)


def test_every_clip_is_centred_separately(estimated):
    """Two unrelated clips of different mean opening: pooled without centring they would correlate."""
    clips = [estimated(s) for s in range(4)]
    unrelated = [replace(a, mouth_open=b.mouth_open) for a, b in zip(clips, clips[1:] + clips[:1], strict=True)]
    raised = [
        replace(r, mouth_open=r.mouth_open + k, truth_mouth=r.truth_mouth + k)
        for r, k in zip(unrelated, (0, 0, 3, 3), strict=True)
    ]
    assert abs(lip_sync.correlation(raised)) < 0.15
    assert lip_sync.correlation(raised) == pytest.approx(lip_sync.correlation(unrelated), abs=1e-5)


def test_a_silent_clip_has_no_weight(estimated):
    clip, silent = estimated(noise=0.2), estimated(1, truth_mouth=np.zeros(400, np.float32))
    r = lip_sync.correlation([clip])
    pooled = lip_sync.correlation([clip, replace(silent, mouth_open=np.zeros(400, np.float32))])
    assert pooled == pytest.approx(r)
    assert math.isnan(lip_sync.correlation([silent]))


@pytest.mark.parametrize("shift", [-3, 0, 2])
def test_a_lag_is_found_with_its_sign(estimated, shift):
    """A shift of +2 frames makes the lips late by 80 ms."""
    lag, r = lip_sync.best_lag([estimated(s, shift=shift, noise=0.03) for s in range(3)])
    assert lag == pytest.approx(40 * shift, abs=5) and r > 0.95


def test_a_lag_of_half_a_frame_is_found_between_frames(estimated):
    lags = []
    for offset in (0.0, 0.5, -0.25):
        time = np.arange(300.0)
        track = sum(np.sin(2 * np.pi * f * time + f) for f in (0.03, 0.07, 0.11)).astype(np.float32)
        late = sum(np.sin(2 * np.pi * f * (time - offset) + f) for f in (0.03, 0.07, 0.11)).astype(np.float32)
        lags.append(lip_sync.best_lag([estimated(frames=300, mouth_open=late, truth_mouth=track)])[0])
    np.testing.assert_allclose(lags, (0, 20, -10), atol=5)


def test_undecodable_frames_count_as_errors_for_every_estimate(estimated):
    clip = estimated(frames=2000)
    half = np.random.default_rng(0).random(2000) < 0.5
    changed = replace(clip, valid=half)
    assert lip_sync.correlation([clip]) == pytest.approx(1)
    assert lip_sync.correlation([changed]) == pytest.approx(np.sqrt(0.5), abs=0.03)
    missing = replace(changed, mouth_open=np.where(half, clip.mouth_open, np.nan).astype(np.float32))
    assert lip_sync.correlation([missing]) == pytest.approx(lip_sync.correlation([changed]))
    assert lip_sync.correlation([replace(clip, valid=np.zeros(2000, bool))]) == 0
    assert math.isnan(lip_sync.best_lag([replace(clip, valid=np.zeros(2000, bool))])[0])


def test_a_still_mouth_has_no_correlation(estimated):
    still = 0.4 + 1e-5 * estimated().truth_mouth
    assert math.isnan(lip_sync.correlation([estimated(mouth_open=still.astype(np.float32))]))
    assert math.isnan(lip_sync.best_lag([estimated(mouth_open=still.astype(np.float32))])[0])


def test_the_interval_contains_the_correlation_and_narrows_with_more_clips(estimated):
    few, many = ([estimated(s, frames=100, noise=0.05 * (1 + s % 4)) for s in range(n)] for n in (5, 60))
    (a, b), (c, d) = lip_sync.correlation_interval(few), lip_sync.correlation_interval(many)
    assert a < lip_sync.correlation(few) < b and c < lip_sync.correlation(many) < d
    assert d - c < 0.6 * (b - a)


def test_clips_shorter_than_the_lags_have_no_lag(estimated):
    assert math.isnan(lip_sync.best_lag([estimated(frames=20)])[0])
    assert math.isnan(lip_sync.best_lag([])[0]) and math.isnan(lip_sync.correlation([]))


def test_silence_motion_is_that_of_silent_frames(estimated):
    silent = np.arange(400) < 200
    mouth = np.where(silent, 0.05 * (np.arange(400) % 2), np.arange(400) % 2).astype(np.float32)
    assert lip_sync.silence_motion([estimated(silent=silent, mouth_open=mouth)]) == pytest.approx(0.05)
    assert math.isnan(lip_sync.silence_motion([estimated(mouth_open=mouth)]))


def test_closure_recall_needs_valid_lips_that_close_and_open(estimated):
    truth = np.full(100, 0.6, np.float32)
    truth[[24, 25, 49, 50, 74, 75]] = 0
    base = estimated(frames=100, mouth_open=truth, truth_mouth=truth, closures_s=np.array([1.0, 2.0, 3.0]))
    missed = truth.copy()
    missed[49:51] = 0.5
    assert lip_sync.closure_recall([base]) == 1
    assert lip_sync.closure_recall([replace(base, mouth_open=missed)]) == pytest.approx(2 / 3)
    assert lip_sync.closure_recall([replace(base, mouth_open=np.zeros(100, np.float32))]) == 0
    assert lip_sync.closure_recall([replace(base, mouth_open=np.full(100, 0.6, np.float32))]) == 0
    assert lip_sync.closure_recall([replace(base, valid=np.zeros(100, bool))]) == 0
    assert lip_sync.closure_recall([replace(base, valid=truth > 0)]) == 0  # invalid at the closures
    assert lip_sync.closure_recall([replace(base, mouth_open=np.roll(truth, 6))]) == 0
    assert math.isnan(lip_sync.closure_recall([estimated()]))
