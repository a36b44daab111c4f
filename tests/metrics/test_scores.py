"""Every score puts the controls in their order, on real puppets at 64 pixels."""

import json
import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from avatar.metrics.reading import PixelReader
from avatar.metrics.scores import measured, score


def worn(video):
    """Frames as a poor autoencoder returns them."""
    blurred = torch.from_numpy(gaussian_filter(video.numpy(), (0, 0, 1.5, 1.5)))
    return (blurred + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def late(reading, frames: int = 2):
    """The same lips, some frames later."""
    mouth = reading.mouth_open
    return replace(reading, mouth_open=np.concatenate([np.repeat(mouth[:1], frames), mouth[:-frames]]))


def beside(reading, other):
    """The lips of one sentence beside the truth of another."""
    return replace(reading, truth_mouth=other.truth_mouth, silent=other.silent, closures_s=other.closures_s)


@pytest.fixture(scope="module")
def scores(clips, videos, true_readings):
    def read(made):
        return [PixelReader(64).read(clip, video) for clip, video in zip(clips, made, strict=True)]

    readings = {
        "truth": true_readings,
        "worn": read([worn(video) for video in videos]),
        "late": [late(reading) for reading in true_readings],
        "shuffled": [beside(a, b) for a, b in permutations(true_readings, 2)],
        "frozen": read([video[:, :1].expand_as(video) for video in videos]),
        "wrong identity": read([video[:, :10] for video in videos[1:] + videos[:1]]),
    }
    return {name: score(part) for name, part in readings.items()}


def test_lip_sync_puts_truth_before_worn_before_late_before_shuffled(scores):
    r = [scores[name]["lip_sync_r"] for name in ("truth", "worn", "late", "shuffled")]
    assert r == sorted(r, reverse=True) and r[0] > 0.995 and r[1] > 0.97 and 0.1 < r[2] < 0.8 and abs(r[3]) < 0.2
    assert r[0] - r[1] > 1e-3 and r[2] - r[3] > 0.05


def test_the_lag_of_late_lips_is_80_ms_and_that_of_truth_none(scores):
    assert scores["truth"]["lip_sync_lag_ms"] == pytest.approx(0, abs=5)
    assert scores["late"]["lip_sync_lag_ms"] == pytest.approx(80, abs=5)


def test_a_frozen_puppet_does_not_move_and_has_no_lip_sync(scores):
    frozen = scores["frozen"]
    assert frozen["lip_sync_r"] is None and frozen["lip_sync_lag_ms"] is None
    assert frozen["motion"] == 0 and frozen["silence_motion"] == 0 and frozen["closure_recall"] == 0
    assert frozen["undecodable_rate"] == 0


def test_another_puppet_is_of_another_colour_and_undecodable(scores):
    assert scores["truth"]["identity_delta_e"] < 0.5 < scores["worn"]["identity_delta_e"] < 6
    assert scores["wrong identity"]["identity_delta_e"] > 15
    assert scores["wrong identity"]["undecodable_rate"] == 1 and scores["wrong identity"]["lip_sync_r"] == 0


def test_closures_and_silence_tell_truth_from_shuffled(scores):
    assert scores["truth"]["closure_recall"] == 1 > scores["shuffled"]["closure_recall"] + 0.4
    assert scores["truth"]["silence_motion"] < 0.01 < scores["shuffled"]["silence_motion"]


def test_scores_are_json_without_nan_even_of_nothing(scores):
    wanted = {"lip_sync_r", "lip_sync_lag_ms", "identity_delta_e", "undecodable_rate", "drift", "clips"}
    for result in (*scores.values(), score([])):
        assert wanted <= set(result)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert score([])["lip_sync_r"] is None and score([])["clips"] == 0


def test_measured_finds_what_is_not_a_number_at_any_depth():
    nested = {"a": math.nan, "b": [1.0, math.inf, {"c": np.float64("nan")}], "d": "nan"}
    assert measured(nested) == {"a": None, "b": [1.0, None, {"c": None}], "d": "nan"}
