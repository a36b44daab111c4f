"""How a puppet moves: the state vector, and its trajectory given speech, states and an emotion.

A state is a row of `CHANNELS`; `RANGES` bounds each. Head places are in frame units, the roll in degrees; gaze, yaw
and pitch run from -1 to 1 (left to right, up to down, as seen by the viewer). `lid` is 0 open, 1 closed, below 0
wide. The motion is calm and smooth: what the sound doesn't settle (where to look, when to blink, how the head
sways) is drawn from the seed, and low in frequency.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter1d

from avatar.puppet import gestures
from avatar.types import EMOTIONS, FRAME_RATE, STATES

RANGES = {
    "mouth_open": (0.0, 1.0),
    "mouth_wide": (-1.0, 1.0),
    "smile": (-1.0, 1.0),
    "brow_raise": (-1.0, 1.0),
    "brow_tilt": (-1.0, 1.0),  # above 0: inner ends down, as in anger
    "lid": (-0.4, 1.0),
    "gaze_x": (-1.0, 1.0),
    "gaze_y": (-1.0, 1.0),
    "head_x": (-0.03, 0.03),
    "head_y": (-0.03, 0.03),
    "head_roll": (-4.0, 4.0),
    "head_yaw": (-1.0, 1.0),
    "head_pitch": (-1.0, 1.0),
    "breath": (-1.0, 1.0),
    "shoulders": (0.0, 1.0),  # shrugged
    "upper_l": (0.0, 1.0),  # upper arms, from hanging to sideways and up; left and right are the viewer's
    "upper_r": (0.0, 1.0),
    "fore_l": (-1.0, 1.0),  # forearms: across the body, straight, folded up
    "fore_r": (-1.0, 1.0),
    "hand_l": (-1.0, 1.0),  # pointing, relaxed, open
    "hand_r": (-1.0, 1.0),
}
CHANNELS = tuple(RANGES)
LOW, HIGH = np.array(list(RANGES.values()), dtype=np.float32).T

# what the face of each emotion adds at full intensity: smile, brow_raise, brow_tilt, lid, head_pitch
FACES = {
    "unspecified": (0.0, 0.0, 0.0, 0.0, 0.0),
    "neutral": (0.0, 0.0, 0.0, 0.0, 0.0),
    "happy": (0.85, 0.3, -0.1, 0.0, -0.15),
    "sad": (-0.75, 0.1, -0.8, 0.28, 0.4),
    "angry": (-0.55, -0.7, 0.9, 0.15, 0.15),
    "surprised": (0.05, 0.9, -0.15, -0.35, -0.2),
}
BLINK = (0.45, 1.0, 0.9, 0.35)  # how far the lid is down, frame by frame


@dataclass(frozen=True)
class Direction:
    """What the sound doesn't settle and the emotion neither; the default is a calm puppet that nothing distracts."""

    events: Sequence[gestures.Event] = ()
    target: tuple[float, float] | None = None  # gaze_x and gaze_y of a thing that draws the eyes
    liveliness: float = 1.0  # of head and body, relative
    other_pauses: Sequence[int] = ()  # frames soon after the other's voice pauses, at which a listener nods and blinks


def channel(name: str) -> int:
    """The column of a channel in a state vector."""
    return CHANNELS.index(name)


def animate(
    mouth_open: Float[np.ndarray, " f"],
    mouth_wide: Float[np.ndarray, " f"],
    states: Int[np.ndarray, " f"],
    emotions: Int[np.ndarray, " f"],
    intensity: Float[np.ndarray, " f"],
    seed: int,
    direction: Direction = Direction(),
) -> Float[np.ndarray, "f s"]:
    """The trajectory: the mouth as given, all else in keeping with `states` and `emotions` (indices of types.STATES and
    types.EMOTIONS), `intensity` in [0, 1], and `direction`. A deterministic function of its arguments.
    """
    frames = len(mouth_open)
    rng = np.random.default_rng([seed, 0x307])
    speaking, listening = ((states == STATES.index(s)).astype(float) for s in ("speaking", "listening"))
    idle = 1 - speaking - listening
    liveliness = direction.liveliness * _eased(0.9 * speaking + 0.5 * listening + 0.45 * idle)
    sway = {name: _drift(rng, frames, 1.0) * liveliness for name in ("x", "y", "roll", "yaw", "pitch")}
    faces = np.array([FACES[name] for name in EMOTIONS])
    smile, raised, tilt, lid, bowed = _eased(faces[emotions] * intensity[:, None]).T
    nods = _nods(rng, listening, direction.other_pauses)
    # Stressed syllables lift the brows and dip the head a little.
    accents = _eased(mouth_open) - _eased(mouth_open, 0.5)
    blinks = _blinks(rng, frames, direction.other_pauses)
    gaze_x, gaze_y = _gaze(rng, listening, idle, direction.target)
    held, added = gestures.perform(direction.events, np.clip(2 * accents, 0, 1))
    out = {
        "mouth_open": mouth_open,
        "mouth_wide": mouth_wide,
        "smile": smile + 0.08 * _drift(rng, frames, 1.5),
        "brow_raise": raised + 0.6 * accents + 0.12 * _drift(rng, frames, 0.8),
        "brow_tilt": tilt + 0.06 * _drift(rng, frames, 1.5),
        "lid": lid + (1 - lid) * blinks,
        "gaze_x": gaze_x,
        "gaze_y": gaze_y,
        "head_x": 0.012 * sway["x"],
        "head_y": 0.006 * sway["y"] + 0.01 * accents + 0.012 * nods,
        "head_roll": 1.6 * sway["roll"],
        "head_yaw": 0.4 * sway["yaw"] + 0.3 * gaze_x * idle,
        "head_pitch": 0.25 * sway["pitch"] + 0.5 * bowed + 0.4 * nods,
        "breath": 0.7 * np.sin(2 * np.pi * (rng.random() + np.arange(frames) / FRAME_RATE / rng.uniform(3, 4.5))),
        **held,
    }
    for name, value in added.items():
        out[name] = out[name] + value
    return np.clip(np.stack([out[name] for name in CHANNELS], axis=1), LOW, HIGH).astype(np.float32)


def _eased(values: Float[np.ndarray, "f *c"], width_s: float = 0.16) -> Float[np.ndarray, "f *c"]:
    """Steps made gradual, over about twice `width_s`."""
    return gaussian_filter1d(values, width_s * FRAME_RATE, axis=0, mode="nearest")


def _drift(rng: np.random.Generator, frames: int, width_s: float) -> Float[np.ndarray, " f"]:
    """Noise of unit variance, smooth at the scale of `width_s`, softly bounded by ±2."""
    width = width_s * FRAME_RATE
    margin = int(3 * width)
    noise = gaussian_filter1d(rng.standard_normal(frames + 2 * margin), width, mode="wrap")[margin : margin + frames]
    return 2 * np.tanh(noise * np.sqrt(2 * width * np.sqrt(np.pi)) / 2)


def _blinks(rng: np.random.Generator, frames: int, pauses: Sequence[int]) -> Float[np.ndarray, " f"]:
    """Lids that close for some 150 ms every 1.5 to 5 s, and of a listener where the other pauses."""
    lid, frame = np.zeros(frames + len(BLINK)), int(rng.uniform(0, 3) * FRAME_RATE)
    while frame < frames:
        lid[frame : frame + len(BLINK)] = BLINK
        frame += int(rng.uniform(1.5, 5) * FRAME_RATE)
    for pause in pauses:
        lid[pause : pause + len(BLINK)] = BLINK[: max(len(lid) - pause, 0)]
    return lid[:frames]


def _gaze(
    rng: np.random.Generator,
    listening: Float[np.ndarray, " f"],
    idle: Float[np.ndarray, " f"],
    target: tuple[float, float] | None,
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]:
    """Where the eyes look, x and y: jumps between fixations; at the viewer when listening, about when idle, and where
    there is something to look at, there.
    """
    x, y, frame = np.zeros(len(idle)), np.zeros(len(idle)), 0
    while frame < len(idle):
        end = frame + int(rng.uniform(0.6, 2.2) * FRAME_RATE)
        away = rng.random() < (0.0 if listening[frame] else 0.75 if idle[frame] else 0.35)
        place = rng.uniform((-0.8, -0.5), (0.8, 0.5)) if target is None else np.array(target)
        x[frame:end], y[frame:end] = away * place + rng.normal(0, 0.04, 2)
        frame = end
    looking = 1 - _eased(listening, 0.1)
    return _eased(x, 0.035) * looking, _eased(y, 0.035) * looking


def _nods(
    rng: np.random.Generator, listening: Float[np.ndarray, " f"], pauses: Sequence[int]
) -> Float[np.ndarray, " f"]:
    """Small nods of half a second, one or two in a row: at the other's pauses, and now and then; down is 1."""
    nods, frame = np.zeros(len(listening) + FRAME_RATE), int(rng.uniform(0.2, 1.2) * FRAME_RATE)
    length = FRAME_RATE // 2
    dip = np.sin(np.pi * np.arange(length) / length) ** 2
    for pause in pauses:
        nods[pause : pause + length] = dip[: max(len(nods) - pause, 0)]
    while frame < len(listening):
        for start in range(frame, frame + length * int(rng.integers(1, 3)), length):
            nods[start : start + length] += dip[: max(len(nods) - start, 0)]
        frame += length * 2 + int(rng.uniform(0.6, 2.0) * FRAME_RATE)
    return nods[: len(listening)] * _eased(listening)
