"""Classification of the emotions, states and gestures that the puppet world draws, and the scores of control."""

from functools import partial

import numpy as np
import pytest

from avatar.metrics import control
from avatar.puppet.gestures import SECONDS
from avatar.puppet.motion import CHANNELS, channel
from avatar.types import EMOTIONS, GESTURES, STATES
from tests.acting import acted

FRAMES = 60
ARMS = [channel(name) for name in CHANNELS if name.startswith(("upper", "fore", "hand"))]


def gesturing(seed: int, gesture: str):
    """A gesture with a duration of the puppet world."""
    low, high = SECONDS.get(gesture, (1, 2))
    return acted(seed, gesture=gesture, frames=int(25 * np.random.default_rng(seed).uniform(low, high)))


def recall(classify, acting, names) -> float:
    return float(np.mean([classify(acting(seed, name)) == name for name in names for seed in range(8)]))


def degraded(states, noise: float, missing: float = 0.0):
    """States as estimated behind a poor autoencoder: with noise, and a share of missing frames."""
    rng = np.random.default_rng(int(1000 * np.abs(states).sum()))
    out = states + noise * rng.standard_normal(states.shape)
    out[rng.random(len(states)) < missing] = np.nan
    return out.astype(np.float32)


CASES = {
    "emotion": (control.emotion, acted, EMOTIONS[1:]),
    "state": (control.state, lambda seed, name: acted(seed, state=name), STATES[1:]),
    "gesture": (control.gesture, gesturing, GESTURES[1:]),
}


@pytest.mark.parametrize("attribute", CASES)
def test_drawn_labels_are_recognised_and_less_so_in_degraded_states(attribute):
    classify, acting, names = CASES[attribute]
    truth, poor, ruined = (
        recall(lambda states, level=level: classify(degraded(states, *level)), acting, names)
        for level in ((0, 0), (0.04, 0.2), (5.0, 0))
    )
    assert truth >= 0.98 and truth >= poor >= 0.85 and poor > ruined + 0.2


def test_short_and_mostly_missing_segments_are_not_classified():
    for classify, acting, names in CASES.values():
        states = acting(0, names[-1])
        assert classify(states[: control.MIN_FRAMES - 1]) is None
        assert classify(degraded(states, 0, 0.7)) is None


def test_an_emotion_during_a_gesture_is_classified():
    assert control.emotion(acted(3, emotion="angry", gesture="shrug", frames=40)) == "angry"
    assert control.gesture(acted(3, emotion="sad", gesture="shrug", frames=40)) == "shrug"


def test_visible_gestures_depend_on_the_known_channels():
    states = gesturing(1, "wave")
    assert set(control.visible(states)) == set(GESTURES[2:])
    states[:, ARMS] = np.nan
    assert control.visible(states) == ("nod", "shake", "shrug") and control.gesture(states) == "none"
    states[:, channel("shoulders")] = np.nan
    assert control.visible(states) == ("nod", "shake")


def test_a_still_raised_arm_does_not_wave():
    states = gesturing(1, "wave")
    states[:, channel("fore_r")] = np.minimum(states[:, channel("fore_r")], 0.56).mean()
    assert control.gesture(states) == "none" and control.gesture(gesturing(1, "wave")) == "wave"


def test_the_amplitude_of_a_track_is_that_at_two_hertz():
    time = np.arange(75) / 25
    for true in (0.1, 0.85):
        assert control.amplitude(true * np.sin(4 * np.pi * time)) == pytest.approx(true, rel=0.15)
    assert control.amplitude(np.sin(0.6 * np.pi * time)) < 0.2 and control.amplitude(np.full(75, 3.0)) < 1e-6


@pytest.fixture
def labelled(estimated):
    """A clip of several segments with the given labels."""

    def make(segments, labels, attribute, **changes):
        lengths = [len(s) for s in segments]
        track = np.repeat([control.CLASSIFIERS[attribute][1].index(name) for name in labels], lengths)
        states = np.concatenate(segments)
        return estimated(frames=len(states), states=states, **{attribute: track} | changes)

    return make


def test_accuracy_is_the_mean_recall_over_classes(labelled):
    happy = [acted(seed, "happy") for seed in range(3)]
    read = partial(labelled, attribute="emotion")
    assert control.accuracy([read([acted(0, "sad"), happy[0]], ("sad", "happy"))], "emotion") == 1
    constant = [read([h], [name]) for h, name in zip(happy, ("happy", "happy", "sad"), strict=True)]
    assert control.accuracy(constant, "emotion") == 0.5
    assert np.isnan(control.accuracy(constant[:2], "emotion")) and np.isnan(control.accuracy([], "emotion"))
    blind = [read([acted(0, "sad"), happy[0]], ("sad", "happy"), valid=np.zeros(2 * FRAMES, bool))]
    assert control.accuracy(blind, "emotion") == 0


def test_accuracy_is_low_for_the_labels_of_other_clips(labelled):
    names = EMOTIONS[1:]
    clips = [acted(seed, names[seed % 5]) for seed in range(20)]

    def accuracy(shift: int, noise: float) -> float:
        labels = [names[(seed + shift) % 5] for seed in range(20)]
        made = [labelled([degraded(c, noise)], [t], "emotion") for c, t in zip(clips, labels, strict=True)]
        return control.accuracy(made, "emotion")

    assert accuracy(0, 0) == 1 >= accuracy(0, 0.1) > 0.9 > 0.1 > accuracy(1, 0)


def test_unspecified_short_and_invisible_gestures_do_not_count(labelled):
    nod, wave, rest = gesturing(0, "nod"), gesturing(1, "wave"), gesturing(2, "none")
    read = partial(labelled, attribute="gesture")
    assert control.accuracy([read([nod, wave, rest], ("nod", "wave", "none"))], "gesture") == 1
    assert control.accuracy([read([nod, wave, rest], ("nod", "unspecified", "none"))], "gesture") == 1
    assert control.accuracy([read([nod, wave[:15], rest], ("nod", "shake", "none"))], "gesture") == 1
    assert control.accuracy([read([nod, wave, rest], ("nod", "shake", "none"))], "gesture") == pytest.approx(2 / 3)
    portrait = [part.copy() for part in (nod, wave, rest)]
    for part in portrait:
        part[:, ARMS] = np.nan
    assert control.accuracy([read(portrait, ("nod", "wave", "none"))], "gesture") == 1


def test_gestures_that_words_cause_are_scored_without_a_label(labelled):
    segments = [gesturing(seed, name) for seed, name in enumerate(("nod", "none", "beat"))]
    doing = np.repeat([GESTURES.index(name) for name in ("nod", "none", "wave")], [len(s) for s in segments])
    free = labelled(segments, ["unspecified"] * 3, "gesture", doing=doing)
    assert control.unprompted([free]) == pytest.approx(2 / 3)
    specified = labelled(segments, ("nod", "none", "beat"), "gesture", doing=doing)
    assert np.isnan(control.unprompted([specified]))
    beats = np.where(doing == GESTURES.index("wave"), GESTURES.index("beat"), doing)
    assert control.unprompted([labelled(segments, ["unspecified"] * 3, "gesture", doing=beats)]) == 1


def test_counterfactual_accuracy_counts_changes_to_the_label():
    calm, sad, happy = (acted(0, name) for name in ("neutral", "sad", "happy"))
    gone = np.full_like(calm, np.nan)
    pairs = {"followed": (calm, sad), "copied": (calm, calm), "other": (calm, happy), "already": (sad, sad)}
    pairs["missing after"], pairs["missing before"] = (calm, gone), (gone, sad)
    found = {name: control.counterfactual([pair], ["sad"], "emotion") for name, pair in pairs.items()}
    assert [name for name, result in found.items() if result["accuracy"] == 1] == ["followed", "missing before"]
    assert [name for name, result in found.items() if result["stayed"] == 1] == ["copied", "already"]
    every = control.counterfactual(list(pairs.values()), ["sad"] * 6, "emotion")
    assert every["accuracy"] == pytest.approx(1 / 3) == every["stayed"] and every["pairs"] == 6
    low, high = every["accuracy_ci"]
    assert 0 <= low < 1 / 3 < high <= 1
    assert np.isnan(control.counterfactual([], [], "emotion")["accuracy"])
    with pytest.raises(ValueError, match="emotion=glad; expected one of neutral, happy"):
        control.counterfactual([(calm, happy)], ["glad"], "emotion")


@pytest.mark.parametrize("attribute", ("emotion", "gesture"))
def test_the_puppet_world_follows_every_label(attribute):
    """The same seed and audio with another label: the world is a perfect student."""
    names = CASES[attribute][2][1:]
    labels = [names[seed % len(names)] for seed in range(20)]
    pairs = [(acted(seed), acted(seed, **{attribute: name})) for seed, name in enumerate(labels)]
    assert control.counterfactual(pairs, labels, attribute)["accuracy"] == 1
    assert control.counterfactual([(a, a) for a, _ in pairs], labels, attribute)["accuracy"] == 0
