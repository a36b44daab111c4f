"""Timed controls of a stream: prompts, labels and gestures at times of the audio, from a JSON file.

    [
      {"at": 0.0, "prompt": "a happy orange cat is speaking", "emotion": "happy", "intensity": 0.8},
      {"at": 0.4, "saying": "Hello, my brother opened the window."},
      {"at": 1.5, "gesture": "nod", "seconds": 1.2},
      {"at": 3.0, "state": "listening", "saying": ""}
    ]

An entry holds from the first chunk that begins at its time or later, and a gesture lasts from there. `saying` is a
transcript: the sentence that begins at that time, whose opening words are appended to the prompt as in the captions of
training. Another `saying`, an empty one, or another `prompt` ends it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar.conditioning.labels import label_index
from avatar.conditioning.transcripts import transcript
from avatar.errors import MissingFileError, UserError
from avatar.protocols import TextEncoder
from avatar.streaming.session import Session
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, STATES

CONTROLS = ("prompt", "saying", "state", "emotion", "gesture")
OPTIONS = {"intensity": "emotion", "seconds": "gesture"}  # option → its control
LABELS = {"state": STATES, "emotion": EMOTIONS, "gesture": GESTURES}
GESTURE_S = 1.5  # duration of a gesture by default
ROUNDING = 1e-6  # seconds


@dataclass
class TimedControls:
    """Controls of one stream in the order of their times.

        controls = TimedControls.read("controls.json", seconds=5.0, prompt="", gesture="none")
        controls.check_prompts(session.text)
        for emitted in stream(session, speech, control=controls.apply): ...  # before each chunk

    Args:
        entries: as in the file, checked; those that are not applied yet.
        seconds: of the audio.
        prompt: until the first entry with another.
        gesture: whenever no entry's gesture lasts.
    """

    entries: list[Mapping[str, Any]]
    seconds: float
    prompt: str
    gesture: str

    def __post_init__(self):
        prompt, resolved = self.prompt, []
        for entry in self.entries:
            prompt = entry.get("prompt", prompt)
            if {"prompt", "saying"} & entry.keys():
                entry = {**entry, "prompt": prompt + transcript(entry.get("saying", ""))}
            resolved.append(entry)
        self.entries = resolved
        self.until: float | None = None  # the end of the current gesture

    @classmethod
    def read(cls, path: str | Path, seconds: float, prompt: str, gesture: str) -> "TimedControls":
        """Read a file.

        Raises:
            UserError: a file that is no list of entries; an entry with unknown keys or labels, values outside of their
                range, a time before that of the last entry or after the audio, a gesture that begins during another, a
                transcript without a prompt before it.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"{path} doesn't exist; give an existing JSON file of controls")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); expected a list of entries with a time, `at`") from error
        if not isinstance(entries, list):
            raise UserError(f"{path}: got {type(entries).__name__}; expected a list of entries with a time, `at`")
        last, busy, current = 0.0, (0.0, 0), prompt  # busy: the end of the last gesture, and its entry
        for number, entry in enumerate(entries, 1):
            try:
                _check(entry, last, seconds)
                current = entry.get("prompt", current)
                if entry.get("saying") and not current:
                    raise UserError("got saying without a prompt; add one to this or an earlier entry, or set prompt=")
                if "gesture" in entry:
                    if entry["at"] < busy[0] - ROUNDING:
                        raise UserError(
                            f"got a gesture at {entry['at']} s; expected it at {busy[0]:g} s or later, when that of "
                            f"entry {busy[1]} ends: move it, or shorten the other"
                        )
                    busy = float(entry["at"]) + _duration(entry), number
            except UserError as error:
                raise UserError(f"{path}, entry {number}: {error}") from None
            last = float(entry["at"])
        return cls(entries, seconds, prompt, gesture)

    def check_prompts(self, text: TextEncoder) -> None:
        """Raise UserError for a prompt that the encoder rejects."""
        for number, entry in enumerate(self.entries, 1):
            try:
                text.check(entry.get("prompt", ""))
            except UserError as error:
                raise UserError(f"controls, entry {number}: {error}") from None

    def apply(self, session: Session) -> None:
        """Set the controls that are due before the session's next chunk."""
        now = session.frames / FRAME_RATE
        if self.until is not None and self.until <= now + ROUNDING:
            session.gesture(self.gesture, self.seconds)
            self.until = None
        while self.entries and self.entries[0]["at"] <= now + ROUNDING:
            entry = self.entries.pop(0)
            if "prompt" in entry:
                session.set_prompt(entry["prompt"])
            if "state" in entry:
                session.set_state(entry["state"])
            if "emotion" in entry:
                session.set_emotion(entry["emotion"], entry.get("intensity", 1.0))
            if "gesture" in entry:
                session.gesture(entry["gesture"], _duration(entry))
                self.until = now + _duration(entry)


def _duration(entry: Mapping[str, Any]) -> float:
    return float(entry.get("seconds", GESTURE_S))


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file. Raises ValueError for a key that occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"a key occurs twice in {made}")
    return made


def _check(entry: Any, last: float, seconds: float) -> None:
    """Raise UserError for an entry that is invalid by itself or begins too early or too late."""
    if not isinstance(entry, dict) or "at" not in entry:
        raise UserError(f"got {json.dumps(entry)}; expected an object with a time `at` in seconds")
    known = {"at", *CONTROLS, *OPTIONS}
    if unknown := sorted(entry.keys() - known):
        raise UserError(f"got the key {unknown[0]!r}; expected at and some of {', '.join(sorted(known - {'at'}))}")
    if not entry.keys() & set(CONTROLS):
        raise UserError(f"got no control; expected one of {', '.join(CONTROLS)}")
    for option, control in OPTIONS.items():
        if option in entry and control not in entry:
            raise UserError(f"got {option} without {control}; add the {control} or leave it out")
    _check_number(entry, "at", last, "the time of the entry before it", seconds, "the end of the audio")
    if entry["at"] == seconds:
        raise UserError(f"got at={seconds:g}, the end of the audio; expected an earlier time: change it")
    _check_number(entry, "intensity", 0.0, "none", 1.0, "full")
    _check_number(entry, "seconds", 1 / FRAME_RATE, "a frame", seconds, "the length of the audio")
    for name in ("prompt", "saying"):
        if not isinstance(entry.get(name, ""), str):
            raise UserError(f"got {name}={entry[name]!r}; expected text")
    for name, names in LABELS.items():
        if name in entry:
            if not isinstance(entry[name], str):
                raise UserError(f"got {name}={json.dumps(entry[name])}; choose one of {', '.join(names)}")
            label_index(name, entry[name], names)


def _check_number(entry: dict, name: str, low: float, lowest: str, high: float, highest: str) -> None:
    """Raise UserError unless the value of this name, if the entry has one, is a number from `low` to `high`."""
    value = entry.get(name, low)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise UserError(f"got {name}={value!r}; expected a number")
    if not low <= value <= high:
        got = f"{value:g}" if abs(value) < math.inf and abs(value) < 1e300 else "a number that is too large"
        raise UserError(
            f"got {name}={got}; expected a number from {low:g} ({lowest}) to {high:g} ({highest}): change it"
        )
