"""Emotions, states and gestures as the world itself makes them are recognised, and what isn't them is not."""

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
    """One that lasts as long as the world makes it last."""
    low, high = SECONDS.get(gesture, (1, 2))
    return acted(seed, gesture=gesture, frames=int(25 * np.random.default_rng(seed).uniform(low, high)))


def recall(classify, acting, names) -> float:
    return float(np.mean([classify(acting(seed, name)) == name for name in names for seed in range(8)]))


def worn(states, noise: float, missing: float = 0.0):
    """As read through a poor autoencoder: with noise in shares of 1, and frames that can't be read."""
    rng = np.random.default_rng(int(1000 * np.abs(states).sum()))
    read = states + noise * rng.standard_normal(states.shape)
    read[rng.random(len(states)) < missing] = np.nan
    return read.astype(np.float32)


CASES = {
    "emotion": (control.emotion, acted, EMOTIONS[1:]),
    "state": (control.state, lambda seed, name: acted(seed, state=name), STATES[1:]),
    "gesture": (control.gesture, gesturing, GESTURES[1:]),
}


@pytest.mark.parametrize("attribute", CASES)
def test_what_the_world_makes_is_recognised_and_less_so_what_was_worn(attribute):
    classify, acting, names = CASES[attribute]
    truth, poor, ruined = (
        recall(lambda states, level=level: classify(worn(states, *level)), acting, names)
        for level in ((0, 0), (0.04, 0.2), (5.0, 0))
    )
    assert truth >= 0.98 and truth >= poor >= 0.85 and poor > ruined + 0.2


def test_a_stretch_that_is_too_short_or_mostly_unread_is_nothing():
    for classify, acting, names in CASES.values():
        states = acting(0, names[-1])
        assert classify(states[: control.LEAST - 1]) is None
        assert classify(worn(states, 0, 0.7)) is None


def test_another_emotion_on_top_of_a_gesture_is_still_read():
    assert control.emotion(acted(3, emotion="angry", gesture="shrug", frames=40)) == "angry"
    assert control.gesture(acted(3, emotion="sad", gesture="shrug", frames=40)) == "shrug"


def test_a_portrait_shows_gestures_of_the_head_and_an_arm_those_of_arms():
    states = gesturing(1, "wave")
    assert set(control.visible(states)) == set(GESTURES[2:])
    states[:, ARMS] = np.nan
    assert control.visible(states) == ("nod", "shake", "shrug") and control.gesture(states) == "none"
    states[:, channel("shoulders")] = np.nan
    assert control.visible(states) == ("nod", "shake")


def test_a_raised_arm_that_keeps_still_does_not_wave():
    states = gesturing(1, "wave")
    states[:, channel("fore_r")] = np.minimum(states[:, channel("fore_r")], 0.56).mean()
    assert control.gesture(states) == "none" and control.gesture(gesturing(1, "wave")) == "wave"


def test_the_swing_of_a_track_is_its_amplitude_at_two_hertz():
    time = np.arange(75) / 25
    for amplitude in (0.1, 0.85):
        assert control.swing(amplitude * np.sin(4 * np.pi * time)) == pytest.approx(amplitude, rel=0.15)
    assert control.swing(np.sin(0.6 * np.pi * time)) < 0.2 and control.swing(np.full(75, 3.0)) < 1e-6


@pytest.fixture
def labelled(reading):
    """A reading of acted stretches in a row, told to be `told`."""

    def make(stretches, message, attribute, **changes):
        lengths = [len(s) for s in stretches]
        labels = np.repeat([control.CLASSIFIERS[attribute][1].index(name) for name in message], lengths)
        states = np.concatenate(stretches)
        return reading(frames=len(states), states=states, **{attribute: labels} | changes)

    return make


def test_accuracy_is_the_mean_over_classes_and_a_constant_answer_gets_one_of_them(labelled):
    happy = [acted(seed, "happy") for seed in range(3)]
    read = partial(labelled, attribute="emotion")
    assert control.accuracy([read([acted(0, "sad"), happy[0]], ("sad", "happy"))], "emotion") == 1
    constant = [read([h], [name]) for h, name in zip(happy, ("happy", "happy", "sad"), strict=True)]
    assert control.accuracy(constant, "emotion") == 0.5
    assert np.isnan(control.accuracy(constant[:2], "emotion")) and np.isnan(control.accuracy([], "emotion"))
    blind = [read([acted(0, "sad"), happy[0]], ("sad", "happy"), valid=np.zeros(2 * FRAMES, bool))]
    assert control.accuracy(blind, "emotion") == 0


def test_labels_of_other_clips_are_obeyed_less(labelled):
    names = EMOTIONS[1:]
    clips = [acted(seed, names[seed % 5]) for seed in range(20)]

    def accuracy(shift: int, noise: float) -> float:
        message = [names[(seed + shift) % 5] for seed in range(20)]
        made = [labelled([worn(c, noise)], [t], "emotion") for c, t in zip(clips, message, strict=True)]
        return control.accuracy(made, "emotion")

    assert accuracy(0, 0) == 1 >= accuracy(0, 0.1) > 0.9 > 0.1 > accuracy(1, 0)


def test_what_was_not_asked_for_or_is_short_or_can_not_be_seen_does_not_count(labelled):
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


def test_gestures_that_words_cause_are_scored_where_none_is_asked_for(labelled):
    stretches = [gesturing(seed, name) for seed, name in enumerate(("nod", "none", "beat"))]
    doing = np.repeat([GESTURES.index(name) for name in ("nod", "none", "wave")], [len(s) for s in stretches])
    free = labelled(stretches, ["unspecified"] * 3, "gesture", doing=doing)
    assert control.unprompted([free]) == pytest.approx(2 / 3)
    message = labelled(stretches, ("nod", "none", "beat"), "gesture", doing=doing)
    assert np.isnan(control.unprompted([message]))
    beats = np.where(doing == GESTURES.index("wave"), GESTURES.index("beat"), doing)
    assert control.unprompted([labelled(stretches, ["unspecified"] * 3, "gesture", doing=beats)]) == 1


def test_counterfactual_pairs_count_changes_to_what_was_wanted():
    calm, sad, happy = (acted(0, name) for name in ("neutral", "sad", "happy"))
    gone = np.full_like(calm, np.nan)
    pairs = {"obeyed": (calm, sad), "copied": (calm, calm), "astray": (calm, happy), "already": (sad, sad)}
    pairs["unread after"], pairs["unread before"] = (calm, gone), (gone, sad)
    found = {name: control.counterfactual([pair], ["sad"], "emotion") for name, pair in pairs.items()}
    assert [name for name, result in found.items() if result["accuracy"] == 1] == ["obeyed", "unread before"]
    assert [name for name, result in found.items() if result["stayed"] == 1] == ["copied", "already"]
    every = control.counterfactual(list(pairs.values()), ["sad"] * 6, "emotion")
    assert every["accuracy"] == pytest.approx(1 / 3) == every["stayed"] and every["pairs"] == 6
    low, high = every["accuracy_ci"]
    assert 0 <= low < 1 / 3 < high <= 1
    assert np.isnan(control.counterfactual([], [], "emotion")["accuracy"])
    with pytest.raises(ValueError, match="emotion glad; choose among neutral, happy"):
        control.counterfactual([(calm, happy)], ["glad"], "emotion")


@pytest.mark.parametrize("attribute", ("emotion", "gesture"))
def test_pairs_of_the_world_itself_all_go_to_what_was_wanted(attribute):
    """The same seed and sound, another label: the world is a perfect student."""
    names = CASES[attribute][2][1:]
    wanted = [names[seed % len(names)] for seed in range(20)]
    pairs = [(acted(seed), acted(seed, **{attribute: name})) for seed, name in enumerate(wanted)]
    assert control.counterfactual(pairs, wanted, attribute)["accuracy"] == 1
    assert control.counterfactual([(a, a) for a, _ in pairs], wanted, attribute)["accuracy"] == 0
