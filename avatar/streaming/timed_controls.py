"""Timed controls of a stream: prompts, labels and gestures at times of the audio, from a JSON file.

    [
      {"at": 0.0, "prompt": "a happy orange cat is speaking", "emotion": "happy", "intensity": 0.8},
      {"at": 0.4, "saying": "Hello, my brother opened the window."},
      {"at": 1.5, "gesture": "nod", "seconds": 1.2},
      {"at": 3.0, "state": "listening"}
    ]

`saying` is a transcript: the sentence that begins at that time. Its opening words are appended to the prompt, as in the
captions of training. An entry holds from the first chunk that begins at its time or later.
"""

import json
import math
from collections.abc import Mapping
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


@dataclass
class TimedControls:
    """Controls of one stream in the order of their times.

        controls = TimedControls.read("controls.json", seconds=5.0, prompt="", gesture="none")
        controls.check_prompts(session.text)
        controls.apply(session)  # before the first chunk and after each

    Args:
        entries: as in the file, checked.
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
            new = {"prompt", "saying"} & entry.keys()
            said = transcript(entry["saying"]) if "saying" in entry else ""
            resolved.append({**entry, "prompt": prompt + said} if new else entry)
        self.prompts = {number: entry["prompt"] for number, entry in enumerate(resolved, 1) if "prompt" in entry}
        starts = [("start", entry["at"], entry) for entry in resolved]
        ends = [("end", entry["at"] + _duration(entry), entry) for entry in resolved if "gesture" in entry]
        self.due = sorted(starts + ends, key=lambda event: (event[1], event[0]))  # an end before a start

    @classmethod
    def read(cls, path: str | Path, seconds: float, prompt: str, gesture: str) -> "TimedControls":
        """Read a file.

        Raises:
            UserError: a file that is no list of entries; an entry with unknown keys or labels, values outside of their
                range, a time before that of the last entry or after the audio, a gesture that begins during another.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"{path} doesn't exist; give an existing JSON file of controls")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); expected a list of entries with a time, `at`") from error
        if not isinstance(entries, list):
            raise UserError(f"{path}: got {type(entries).__name__}; expected a list of entries with a time, `at`")
        last, busy = 0.0, (0.0, 0)  # the end of the last gesture, and its entry
        for number, entry in enumerate(entries, 1):
            try:
                _check(entry, last, seconds)
                if "gesture" in entry:
                    if entry["at"] < busy[0]:
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
        for number, prompt in self.prompts.items():
            try:
                text.check(prompt)
            except UserError as error:
                raise UserError(f"controls, entry {number}: {error}") from None

    def apply(self, session: Session) -> None:
        """Set the controls that are due before the session's next chunk."""
        while self.due and self.due[0][1] <= session.frames / FRAME_RATE + 1e-6:
            event, _, entry = self.due.pop(0)
            if event == "end":
                session.gesture(self.gesture, self.seconds)
                continue
            if "prompt" in entry:
                session.set_prompt(entry["prompt"])
            if "state" in entry:
                session.set_state(entry["state"])
            if "emotion" in entry:
                session.set_emotion(entry["emotion"], entry.get("intensity", 1.0))
            if "gesture" in entry:
                session.gesture(entry["gesture"], _duration(entry))


def _duration(entry: Mapping[str, Any]) -> float:
    return float(entry.get("seconds", 1.5))


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
    for name, low, high in (("at", last, seconds), ("intensity", 0, 1), ("seconds", 0, math.inf)):
        value = entry.get(name, low)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"got {name}={value!r}; expected a number")
        if not low <= value <= high or (name == "seconds" and name in entry and value == 0):
            why = {"at": " (entries are in order, and the audio ends there)"}.get(name, "")
            raise UserError(f"got {name}={value:g}; expected a number from {low:g} to {high:g}{why}: change it")
    for name in ("prompt", "saying"):
        if not isinstance(entry.get(name, ""), str):
            raise UserError(f"got {name}={entry[name]!r}; expected text")
    for name, names in LABELS.items():
        if name in entry:
            label_index(name, entry[name], names)
