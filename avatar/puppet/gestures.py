"""Gestures: their effect on the channels of motion, with a smooth start and end.

The pose of an event replaces that of arms, hands and shoulders, weighted by the envelope of the event. Its offsets are
added to head, gaze and brows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from avatar.errors import UserError
from avatar.types import FRAME_RATE

EASE_S = 0.32  # from rest to a pose, and back
SECONDS = {  # shortest and longest duration
    "wave": (1.6, 2.4), "point": (1.3, 2.0), "nod": (1.0, 1.5), "shake": (1.0, 1.5), "shrug": (1.1, 1.7),
    "beat": (1.0, 2.5),
}  # fmt: skip
WITHOUT_ARMS = ("nod", "shake", "shrug")  # visible in a portrait
REST = {"shoulders": 0.0, "upper": 0.05, "fore": -0.1, "hand": 0.0}  # of shoulders and each arm
SHRUG = {"upper": 0.13, "fore": 0.42, "hand": 1.0}  # of both arms
HELD = ("shoulders", "upper_l", "upper_r", "fore_l", "fore_r", "hand_l", "hand_r")  # channels with poses
ADDED = ("head_pitch", "head_yaw", "head_roll", "gaze_x", "brow_raise")  # channels with offsets


@dataclass(frozen=True)
class Event:
    """A gesture in the frames [start, stop)."""

    gesture: str  # one of types.GESTURES
    start: int
    stop: int
    side: int  # of the arm or the direction, -1: left of the viewer, 1: right


def perform(
    events: Sequence[Event], stresses: Float[np.ndarray, " f"]
) -> tuple[dict[str, Float[np.ndarray, " f"]], dict[str, Float[np.ndarray, " f"]]]:
    """Poses of the HELD channels, and offsets of the ADDED ones.

    Args:
        events: gestures.
        stresses: stress of the syllable in each frame, in [0, 1], which beats follow.

    Raises:
        UserError: an unknown gesture.
    """
    frames = len(stresses)
    held = {name: np.full(frames, REST[name.split("_")[0]]) for name in HELD}
    added = {name: np.zeros(frames) for name in ADDED}
    for event in events:
        t = (np.arange(frames) - event.start) / FRAME_RATE
        share = _envelope(t, (event.stop - event.start) / FRAME_RATE)
        poses, offsets = _pose(event, t, stresses)
        for name, value in poses.items():
            held[name] = held[name] + share * (value - held[name])
        for name, value in offsets.items():
            added[name] = added[name] + share * value
    return held, added


def _pose(event: Event, t: Float[np.ndarray, " f"], stresses: Float[np.ndarray, " f"]) -> tuple[dict, dict]:
    """Poses and offsets of a gesture at its full extent."""
    arm = "r" if event.side > 0 else "l"
    match event.gesture:
        case "wave":
            return {f"upper_{arm}": 0.6, f"fore_{arm}": 0.56 + 0.16 * np.sin(4 * np.pi * t), f"hand_{arm}": 1.0}, {}
        case "point":
            away = {"gaze_x": 0.8 * event.side, "head_yaw": 0.4 * event.side}
            return {f"upper_{arm}": 0.7, f"fore_{arm}": 0.03, f"hand_{arm}": -1.0}, away
        case "nod":
            return {}, {"head_pitch": 0.85 * np.sin(3.8 * np.pi * t)}
        case "shake":
            return {}, {"head_yaw": 0.85 * event.side * np.sin(4 * np.pi * t)}
        case "shrug":
            both = {f"{part}_{side}": value for part, value in SHRUG.items() for side in "lr"}
            return {"shoulders": 1.0, **both}, {"brow_raise": 0.45, "head_roll": 2.0 * event.side}
        case "beat":
            return {
                f"upper_{arm}": 0.1 + 0.05 * stresses,
                f"fore_{arm}": -0.55 + 0.3 * stresses,
                f"hand_{arm}": 0.6,
            }, {}
        case _:
            raise UserError(f"got the gesture {event.gesture!r}; expected one of {', '.join(SECONDS)}: choose another")


def _envelope(t: Float[np.ndarray, " f"], seconds: float) -> Float[np.ndarray, " f"]:
    """Smooth envelope from 0 up to 1 and back to 0 within `seconds`."""
    up, down = np.clip(t / EASE_S, 0, 1), np.clip((seconds - t) / EASE_S, 0, 1)
    x = np.minimum(up, down)
    return x * x * (3 - 2 * x)
