"""Timed controls: each holds from the chunk of its time on, gestures end, and wrong entries are named."""

import json
from pathlib import Path

import pytest

from avatar.errors import UserError
from avatar.media.decode import read_audio
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.streaming.session import Session
from avatar.streaming.timed_controls import TimedControls
from avatar.types import FRAME_RATE, SAMPLE_RATE

ROOT = Path(__file__).parents[2]


class Recorder(Session):
    """A session that records its controls with the frame at which they were set."""

    frames = 0

    def __init__(self):
        self.calls = []
        for name in ("set_prompt", "set_state", "set_emotion", "gesture"):
            setattr(self, name, lambda *values, name=name: self.calls.append((self.frames, name, *values)))


def played(entries, seconds: float = 4.0, chunk: int = 8):
    controls, session = TimedControls(entries, seconds, "a cat is speaking", "none"), Recorder()
    while session.frames < seconds * FRAME_RATE:
        controls.apply(session)
        session.frames += chunk
    return session.calls


def read(tmp_path, entries, seconds: float = 4.0):
    path = tmp_path / "controls.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return TimedControls.read(path, seconds, "a cat is speaking", "none")


def test_controls_hold_from_the_first_chunk_at_their_time_or_later():
    calls = played([{"at": 0, "state": "speaking"}, {"at": 0.32, "emotion": "sad"}, {"at": 0.33, "state": "idle"}])
    assert calls == [(0, "set_state", "speaking"), (8, "set_emotion", "sad", 1.0), (16, "set_state", "idle")]


def test_the_default_gesture_follows_a_timed_one():
    calls = played([{"at": 1.0, "gesture": "nod", "seconds": 1.0}, {"at": 2.0, "gesture": "shake", "seconds": 0.5}])
    assert [(frame, value) for frame, _, value, _ in calls] == [(32, "nod"), (56, "shake"), (72, "none")]


def test_a_gesture_between_two_chunks_lasts_its_time_from_the_next():
    calls = played([{"at": 0.4, "gesture": "nod", "seconds": 0.2}])
    assert calls == [(16, "gesture", "nod", 0.2), (24, "gesture", "none", 4.0)]


def test_a_transcript_follows_the_prompt_of_its_time():
    entries = [
        {"at": 0, "saying": "Hello, my brother opened the window."},
        {"at": 1, "prompt": "a dog is speaking"},
        {"at": 2, "saying": "Yes."},
        {"at": 3, "saying": ""},
    ]
    assert [call[2] for call in played(entries)] == [
        "a cat is speaking: Hello, my brother opened the", "a dog is speaking", "a dog is speaking: Yes",
        "a dog is speaking",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "is not JSON"),
        ({"at": 0}, "got dict; expected a list"),
        ([{"state": "idle"}], "entry 1: got .*expected an object with a time"),
        ([{"at": 0, "state": "idle"}, {"at": 9, "saying": "Hi."}], "entry 2: got at=9; expected .* to 4 .the end of"),
        ([{"at": 2, "state": "idle"}, {"at": 1, "state": "idle"}], "entry 2: got at=1; expected a number from 2"),
        ([{"at": 4, "state": "idle"}], "entry 1: got at=4, the end of the audio"),
        ([{"at": 0, "state": None}], "entry 1: got state=null; choose one of"),
        ('[{"at": 0, "at": 1, "state": "idle"}]', "occurs twice"),
        ('[{"at": NaN, "state": "idle"}]', "entry 1: got at=nan"),
        ([{"at": 10**400, "state": "idle"}], "entry 1: got at=a number that is too large"),
        ([{"at": 0, "gesture": "nod", "seconds": 9}], "entry 1: got seconds=9; expected .* to 4"),
        ([{"at": 0, "emotion": "glad"}], "entry 1: got emotion='glad'; choose one of"),
        ([{"at": 0, "emotion": "sad", "intensity": 1.5}], "entry 1: got intensity=1.5; expected .* from 0 .none. to 1"),
        ([{"at": 0, "intensity": 0.5, "state": "idle"}], "entry 1: got intensity without emotion"),
        ([{"at": 0, "gesture": "nod", "seconds": 0}], "entry 1: got seconds=0"),
        ([{"at": 1, "gesture": "nod"}, {"at": 2, "gesture": "nod"}], "entry 2: got a gesture at 2 s.*2.5 s.*entry 1"),
        ([{"at": 0, "smile": 1}], "entry 1: got the key 'smile'"),
        ([{"at": 0}], "entry 1: got no control"),
        ([{"at": True, "state": "idle"}], "entry 1: got at=True; expected a number"),
        ([{"at": 0, "saying": 3}], "entry 1: got saying=3; expected text"),
    ],
)
def test_wrong_entries_are_named(tmp_path, entries, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, entries)


def test_a_transcript_needs_a_prompt(tmp_path):
    (tmp_path / "controls.json").write_text('[{"at": 0, "saying": "Hello."}]')
    with pytest.raises(UserError, match="entry 1: got saying without a prompt"):
        TimedControls.read(tmp_path / "controls.json", 4.0, "", "none")


def test_adjoining_gestures_do_not_overlap_by_rounding(tmp_path):
    rows = [{"at": 0.1, "gesture": "nod", "seconds": 0.2}, {"at": 0.3, "gesture": "shake", "seconds": 0.5}]
    assert len(read(tmp_path, rows).entries) == 2


def test_the_sample_file_fits_the_sample_audio():
    seconds = len(read_audio(ROOT / "data/samples/hello.wav")) / SAMPLE_RATE
    assert TimedControls.read(ROOT / "data/samples/controls.json", seconds, "", "none").entries


def test_a_missing_file_and_too_long_prompts_are_rejected(tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        TimedControls.read(tmp_path / "none.json", 1.0, "", "none")
    controls = read(tmp_path, [{"at": 0, "state": "idle"}, {"at": 1, "prompt": "a" * 40}])
    with pytest.raises(UserError, match="entry 2: got a prompt of 40 bytes"):
        controls.check_prompts(ByteTokenizer(16))


def test_a_file_is_read_as_it_is(tmp_path):
    entries = [{"at": 0.0, "prompt": "x", "emotion": "happy", "intensity": 0.8}, {"at": 1.5, "gesture": "nod"}]
    controls, session = read(tmp_path, entries), Recorder()
    controls.apply(session)
    assert session.calls == [(0, "set_prompt", "x"), (0, "set_emotion", "happy", 0.8)]
    assert [entry["at"] for entry in controls.entries] == [1.5]
