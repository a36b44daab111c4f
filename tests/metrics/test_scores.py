"""Order of the controls under every score: puppets at 64 pixels, and trajectories of many puppets."""

import json
import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from avatar.metrics.scores import measured, score
from avatar.metrics.state_estimation import PixelReader
from avatar.puppet.motion import HIGH, LOW
from avatar.types import EMOTIONS, GESTURES, STATES
from tests.acting import acted

VOCABULARIES = EMOTIONS, STATES, GESTURES


def degraded(video):
    """Frames as a poor autoencoder decodes them: blurred and noisy."""
    blurred = torch.from_numpy(gaussian_filter(video.numpy(), (0, 0, 1.5, 1.5)))
    return (blurred + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def late(estimated, frames: int = 2):
    """The clip with lips that are late by some frames."""
    mouth = estimated.mouth_open
    return replace(estimated, mouth_open=np.concatenate([np.repeat(mouth[:1], frames), mouth[:-frames]]))


def with_truth_of(estimated, other):
    """The lips of one sentence with the truth of another."""
    return replace(estimated, truth_mouth=other.truth_mouth, silent=other.silent, closures_s=other.closures_s)


@pytest.fixture(scope="module")
def scores(clips, videos, true_estimates, few_draws):
    def read(changed):
        return [PixelReader(64).read(clip, video) for clip, video in zip(clips, changed, strict=True)]

    estimates = {
        "truth": true_estimates,
        "degraded": read([degraded(video) for video in videos]),
        "late": [late(estimated) for estimated in true_estimates],
        "shuffled": [with_truth_of(a, b) for a, b in permutations(true_estimates, 2)],
        "frozen": read([video[:, :1].expand_as(video) for video in videos]),
        "wrong_identity": read([video[:, :10] for video in videos[1:] + videos[:1]]),
    }
    return {name: score(part) for name, part in estimates.items()}


@pytest.fixture(scope="module")
def motion_scores(estimated, few_draws):
    """Scores of the motion of many puppets with all emotions, states and gestures as labels."""
    moods, states, gestures = EMOTIONS[1:], STATES[1:], GESTURES[1:]

    def motion(seed: int):
        labels = moods[seed % 5], states[seed // 2 % 3], gestures[seed % 7]
        return acted(seed, *labels), [names.index(name) for names, name in zip(VOCABULARIES, labels, strict=True)]

    def read(motions, labels, noise: float = 0.0):
        rng, estimates = np.random.default_rng(0), []
        for number, (states, (emotion, state, gesture)) in enumerate(zip(motions, labels, strict=True)):
            noisy = states + noise * (HIGH - LOW) * rng.standard_normal(states.shape)
            given = {"emotion": emotion, "state": state, "gesture": gesture * (number % 2), "doing": gesture}
            tracks = {name: np.full(len(states), label) for name, label in given.items()}
            estimates.append(estimated(frames=len(states), states=noisy.astype(np.float32), **tracks))
        return estimates

    motions, labels = zip(*map(motion, range(28)), strict=True)
    others = [motion(seed)[0] for seed in range(28, 76)]
    estimates = {
        "truth": read(motions, labels),
        "degraded": read(motions, labels, 0.04),
        "poor": read(motions, labels, 0.1),
        "late": read([np.roll(states, 2, axis=0) for states in motions], labels),
        "shuffled": read(motions, labels[1:] + labels[:1]),
        "frozen": read([np.repeat(states[:1], len(states), axis=0) for states in motions], labels),
    }
    return {name: score(part, others) for name, part in estimates.items()}


# score → its error, and the controls in the order of increasing error; "≤" marks a control whose error may be equal.
ON_PIXELS = {
    "lip_sync_r": (lambda r: 1 - r, "truth degraded late shuffled"),
    "lip_sync_lag_ms": (abs, "truth late"),
    "closure_recall": (lambda share: 1 - share, "truth ≤degraded late ≤shuffled ≤frozen"),
    "silence_motion": (lambda moved: moved, "truth degraded shuffled"),
    "identity_delta_e": (lambda error: error, "truth degraded wrong_identity"),
    "undecodable_rate": (lambda share: share, "truth ≤degraded wrong_identity"),
}
ON_MOTION = {
    "frechet": (lambda distance: distance, "truth degraded poor frozen"),
    "coverage": (lambda share: 1 - share, "truth ≤degraded poor"),
    "motion_amount": (lambda ratio: abs(1 - ratio), "truth degraded poor"),
    "motion_roughness": (lambda ratio: abs(math.log(ratio)), "truth degraded poor"),
    "emotion_accuracy": (lambda share: 1 - share, "truth ≤degraded ≤poor shuffled"),
    "state_accuracy": (lambda share: 1 - share, "truth ≤degraded ≤poor shuffled"),
    "gesture_accuracy": (lambda share: 1 - share, "truth ≤degraded poor shuffled"),
    "unprompted_accuracy": (lambda share: 1 - share, "truth ≤degraded poor shuffled"),
}


@pytest.mark.parametrize("metric", ON_PIXELS)
def test_the_scores_of_pixels_order_the_controls(scores, metric):
    check_order(scores, metric, *ON_PIXELS[metric])


@pytest.mark.parametrize("metric", ON_MOTION)
def test_the_scores_of_motion_order_the_controls(motion_scores, metric):
    check_order(motion_scores, metric, *ON_MOTION[metric])


def check_order(table, metric, error, order):
    names = [name.removeprefix("≤") for name in order.split()]
    found = dict(zip(names, (error(table[name][metric]) for name in names), strict=True))
    for right, wrong, sign in zip(names, names[1:], order.split()[1:], strict=False):
        assert found[right] < found[wrong] or (sign.startswith("≤") and found[right] == found[wrong]), found


def test_every_score_has_an_order(scores):
    others = {"motion", "lip_sync_r_at_lag", "drift", "clips"}  # without a better or worse value
    assert {name for name in scores["truth"] if not name.endswith("_ci")} == {*ON_PIXELS, *ON_MOTION} | others


def test_late_motion_has_the_same_distance_and_accuracy(motion_scores):
    truth, late = motion_scores["truth"], motion_scores["late"]
    assert late["frechet"] == pytest.approx(truth["frechet"], abs=0.3)
    assert late["emotion_accuracy"] == truth["emotion_accuracy"] > 0.9


def test_lip_sync_orders_truth_degraded_late_and_shuffled(scores):
    r = [scores[name]["lip_sync_r"] for name in ("truth", "degraded", "late", "shuffled")]
    assert r == sorted(r, reverse=True) and r[0] > 0.995 and r[1] > 0.97 and 0.1 < r[2] < 0.8 and abs(r[3]) < 0.2
    assert r[0] - r[1] > 1e-3 and r[2] - r[3] > 0.05


def test_the_lag_of_lips_two_frames_late_is_80_ms(scores):
    assert scores["truth"]["lip_sync_lag_ms"] == pytest.approx(0, abs=5)
    assert scores["late"]["lip_sync_lag_ms"] == pytest.approx(80, abs=5)


def test_a_frozen_puppet_has_no_motion_and_no_lip_sync(scores):
    frozen = scores["frozen"]
    assert frozen["lip_sync_r"] is None and frozen["lip_sync_lag_ms"] is None
    assert frozen["motion"] == 0 and frozen["silence_motion"] == 0 and frozen["closure_recall"] == 0
    assert frozen["undecodable_rate"] == 0


def test_another_puppet_has_a_large_colour_error_and_is_undecodable(scores):
    assert scores["truth"]["identity_delta_e"] < 0.5 < scores["degraded"]["identity_delta_e"] < 6
    assert scores["wrong_identity"]["identity_delta_e"] > 15
    assert scores["wrong_identity"]["undecodable_rate"] == 1 and scores["wrong_identity"]["lip_sync_r"] == 0


def test_closures_and_silence_distinguish_truth_and_shuffled_audio(scores):
    assert scores["truth"]["closure_recall"] == 1 > scores["shuffled"]["closure_recall"] + 0.4
    assert scores["truth"]["silence_motion"] < 0.01 < scores["shuffled"]["silence_motion"]


def test_scores_are_valid_json_also_without_clips(scores):
    expected = {"lip_sync_r", "lip_sync_lag_ms", "identity_delta_e", "undecodable_rate", "drift", "clips"}
    for result in (*scores.values(), score([])):
        assert expected <= set(result)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert score([])["lip_sync_r"] is None and score([])["clips"] == 0


def test_measured_replaces_nan_and_infinity_at_any_depth():
    nested = {"a": math.nan, "b": [1.0, math.inf, {"c": np.float64("nan")}], "d": "nan"}
    assert measured(nested) == {"a": None, "b": [1.0, None, {"c": None}], "d": "nan"}
