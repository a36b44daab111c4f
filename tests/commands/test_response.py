"""Response times: read from true puppets whose label changes at a known frame."""

import numpy as np
import pytest

from avatar.commands.response import emotion_progress, first_half_way, gesture_progress, summary
from avatar.puppet.clip import Acting, make_clip
from avatar.puppet.gestures import Event
from avatar.puppet.scene import Scene

FRAMES, AT = 120, 60


@pytest.mark.parametrize("new", ["happy", "sad", "angry", "surprised"])
def test_a_change_of_emotion_is_found_where_it_is(new):
    before, after = (
        make_clip(5, "dev", FRAMES, backend="formant", acting=Acting(name, 1.0)).states for name in ("neutral", new)
    )
    states = np.concatenate([before[:AT], after[AT:]])
    progress = emotion_progress(states, "neutral", new)
    assert abs(np.median(progress[:AT])) < 0.3 and abs(np.median(progress[AT:]) - 1) < 0.3
    found = first_half_way(progress, AT - 10)
    assert found is not None and abs(found - AT) <= 2
    assert first_half_way(emotion_progress(before, "neutral", new), AT) is None


def test_noise_and_a_state_that_was_there_before_are_no_response():
    noise = np.random.default_rng(0).normal(0, 0.5, FRAMES)
    assert first_half_way(noise, AT) is None
    assert first_half_way(np.ones(FRAMES), AT) is None
    assert abs(first_half_way((np.arange(FRAMES) >= AT + 5) + noise / 5, AT) - AT - 5) <= 2


@pytest.mark.parametrize("name", ["nod", "shake", "shrug", "wave", "point"])
def test_a_gesture_is_found_within_its_onset(name):
    scene = Scene(framings={"half": 1.0}, commands_hz=0.1)
    event = Event(name, AT, AT + 40, 1)
    clips = [
        make_clip(
            5, "dev", FRAMES, "speaking", backend="formant", directed=scene, acting=Acting("neutral", 1.0, events)
        )
        for events in ((event,), ())
    ]
    with_it, without = (gesture_progress(clip.states, name, slice(AT - 25, AT)) for clip in clips)
    found = first_half_way(with_it, AT - 25)
    assert found is not None and AT < found <= AT + 12
    assert first_half_way(without, AT - 25) is None


def test_streams_without_a_response_count_as_such():
    found = summary([0.2, 0.4, 0.6, float("nan")])
    assert found == {"responded": 0.75, "median_s": 0.4, "largest_s": 0.6, "streams": 4}
    assert np.isnan(summary([float("nan")])["median_s"])
