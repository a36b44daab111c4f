"""Gestures: what they do to the channels of motion, eased in and out.

An event takes over arms, hands and shoulders in the share of its envelope, and adds to what head, gaze and brows do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from avatar.errors import UserError
from avatar.types import FRAME_RATE

EASE_S = 0.32  # to reach a pose, and to leave it
SECONDS = {
    "wave": (1.6, 2.4), "point": (1.3, 2.0), "nod": (1.0, 1.5), "shake": (1.0, 1.5), "shrug": (1.1, 1.7),
    "beat": (1.0, 2.5),
}  # fmt: skip
WITHOUT_ARMS = ("nod", "shake", "shrug")  # those that a portrait shows
REST = {"shoulders": 0.0, "upper": 0.05, "fore": -0.1, "hand": 0.0}  # of shoulders and either arm
SHRUG = {"upper": 0.13, "fore": 0.42, "hand": 1.0}  # of both arms
HELD = ("shoulders", "upper_l", "upper_r", "fore_l", "fore_r", "hand_l", "hand_r")
ADDED = ("head_pitch", "head_yaw", "head_roll", "gaze_x", "brow_raise")


@dataclass(frozen=True)
class Event:
    """A gesture in the frames [start, stop); `side` is the arm or the way, -1: the viewer's left, 1: right."""

    gesture: str  # one of types.GESTURES
    start: int
    stop: int
    side: int


def perform(
    events: Sequence[Event], stresses: Float[np.ndarray, " f"]
) -> tuple[dict[str, Float[np.ndarray, " f"]], dict[str, Float[np.ndarray, " f"]]]:
    """What arms, hands and shoulders are, and what is added to other channels, by channel.

    `stresses` is how stressed the syllable at each frame is, in [0, 1]: beats fall on them.
    """
    frames = len(stresses)
    held = {name: np.full(frames, REST[name.split("_")[0]]) for name in HELD}
    added = {name: np.zeros(frames) for name in ADDED}
    for event in events:
        t = (np.arange(frames) - event.start) / FRAME_RATE
        share = _envelope(t, (event.stop - event.start) / FRAME_RATE)
        poses, moves = _pose(event, t, stresses)
        for name, value in poses.items():
            held[name] = held[name] + share * (value - held[name])
        for name, value in moves.items():
            added[name] = added[name] + share * value
    return held, added


def _pose(event: Event, t: Float[np.ndarray, " f"], stresses: Float[np.ndarray, " f"]) -> tuple[dict, dict]:
    """The poses that a gesture takes, and what it adds."""
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
            raise UserError(f"no gesture {event.gesture!r}; choose one of {', '.join(SECONDS)}")


def _envelope(t: Float[np.ndarray, " f"], seconds: float) -> Float[np.ndarray, " f"]:
    """From 0 up to 1 and back within `seconds`, smoothly."""
    up, down = np.clip(t / EASE_S, 0, 1), np.clip((seconds - t) / EASE_S, 0, 1)
    x = np.minimum(up, down)
    return x * x * (3 - 2 * x)
