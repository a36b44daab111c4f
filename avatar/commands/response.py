"""Response time of controls in a running stream: from the call to the frame in which the change is half done.

A held-out clip is streamed; after two and a half seconds the emotion or the gesture changes. The response is the time
between the last frame that was emitted before the call and the first frame in which the read channels have gone half
of the way. It contains the rest of a chunk, the model's own reaction and the smooth onset that the puppets have.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import median_filter

from avatar.commands.control_pairs import other_emotion
from avatar.commands.held_out import HeldOutClips
from avatar.metrics import statistics
from avatar.metrics.control import FACE, oscillation
from avatar.metrics.distribution import Trajectory
from avatar.puppet.motion import CHANNELS, FACES, channel
from avatar.streaming.session import Session
from avatar.types import EMOTIONS, FRAME_RATE, SAMPLES_PER_FRAME

CHANGE_AT, LENGTH = 62, 150  # frames: of the call, and of a stream
GESTURE_S = 1.6
HALF_WAY = {  # gesture → channels, half of their change, whether they oscillate at about 2 Hz
    "nod": (("head_pitch",), 0.32, True),
    "shake": (("head_yaw",), 0.32, True),
    "shrug": (("shoulders",), 0.5, False),
    "wave": (("upper_l", "upper_r"), 0.27, False),
    "point": (("upper_l", "upper_r"), 0.32, False),
}
Track = Float[np.ndarray, " f"]


def response_times(
    held_out: HeldOutClips, count: int, open_session: Callable[[int, torch.Tensor], Session]
) -> dict[str, dict[str, Any]]:
    """Response times of emotion and gesture over `count` streams each.

    Args:
        held_out: the clips; the first `count` are streamed, for longer than they are scored.
        count: streams per control.
        open_session: clip and its first frame → a session without labels.

    Returns:
        Per control: the share of streams that responded, and the median and largest response of those, in seconds.
    """
    found: dict[str, list[float]] = {"emotion": [], "gesture": []}
    for number in range(count):
        for name, times in found.items():
            times.append(_response(held_out, number, name, open_session))
    return {name: summary(times) for name, times in found.items()}


def emotion_progress(states: Trajectory, old: str, new: str) -> Track:
    """Progress of the face from the definition of one emotion (0) to that of another (1), in each frame."""
    start, end = (np.array(FACES[name][: len(FACE)]) for name in (old, new))
    face = states[:, [channel(name) for name in FACE]]
    return (face - start) @ (end - start) / ((end - start) @ (end - start))


def gesture_progress(states: Trajectory, gesture: str, before: slice) -> Track:
    """Progress of a gesture's channels from their median in the frames `before`; 0.5 is half way.

    Of those that oscillate, it is the fast part: the head also sways slowly.
    """
    names, half, oscillates = HALF_WAY[gesture]
    tracks = np.nan_to_num(np.stack([states[:, channel(name)] for name in names]))
    if oscillates:
        tracks = np.stack([oscillation(track) for track in tracks])
    return np.abs(tracks - np.median(tracks[:, before], axis=1, keepdims=True)).max(axis=0) / (2 * half)


def first_half_way(progress: Track, start: int) -> int | None:
    """The first frame from `start` on whose progress, without outliers, is one half.

    None if there is none, or if it was as far within the second before.
    """
    smooth = median_filter(np.nan_to_num(progress), 9)
    if smooth[max(start - FRAME_RATE, 0) : start].max() >= 0.5:
        return None
    reached = np.flatnonzero(smooth[start:] >= 0.5)
    return start + int(reached[0]) if len(reached) else None


def _response(
    held_out: HeldOutClips, number: int, name: str, open_session: Callable[[int, torch.Tensor], Session]
) -> float:
    """Seconds to the response of one stream; NaN without one."""
    clip = held_out.clips.make(number, LENGTH, held_out.cache / "speech")
    session = open_session(number, held_out.world.video(clip, 0, 1)[None])
    old = EMOTIONS[clip.emotion[0]]
    new = other_emotion(old, number)
    gestures = ("nod", "shake", "shrug") if clip.setting.framing == "portrait" else ("wave", "point", "shrug")
    gesture = gestures[number % len(gestures)]
    session.set_state("speaking")
    session.set_emotion(old, 1.0)
    session.gesture("none", LENGTH / FRAME_RATE)
    speech = torch.from_numpy(clip.own)
    cut = CHANGE_AT * SAMPLES_PER_FRAME
    parts = [session.push(speech[:cut])]
    called = session.frames
    if name == "emotion":
        session.set_emotion(new, 1.0)
    else:
        session.gesture(gesture, GESTURE_S)
    parts += [session.push(speech[cut:]), session.finish()]
    video = torch.cat(parts, dim=1)[:, : len(clip.states)]
    states = held_out.reader.read(clip, video.cpu()).trajectory
    assert states.shape[1] == len(CHANNELS)
    if name == "emotion":
        progress = emotion_progress(states, old, new)
    else:
        progress = gesture_progress(states, gesture, slice(called - FRAME_RATE, called))
    frame = first_half_way(progress, called)
    return float("nan") if frame is None else (frame + 1 - called) / FRAME_RATE


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Summary of response times in seconds; NaN: no response."""
    known = np.array([time for time in times if np.isfinite(time)])
    return {
        "responded": statistics.mean(np.isfinite(times).astype(float)),
        "median_s": float(np.median(known)) if len(known) else float("nan"),
        "largest_s": float(known.max()) if len(known) else float("nan"),
        "streams": len(times),
    }
