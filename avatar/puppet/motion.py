"""Motion: the state vector of a puppet, and trajectories for given mouths, states and emotions.

A state is a row of `CHANNELS`, each in its range of `RANGES`. Head positions are in frame units, the roll is in
degrees. Gaze, yaw and pitch are from -1 to 1 (left to right, up to down, as seen by the viewer). A `lid` is open at 0,
closed at 1, and wide open below 0. Motion that audio does not determine (gaze, blinks, sway of the head) is drawn from
the seed, smooth and of low frequency.
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
    "brow_tilt": (-1.0, 1.0),  # above 0: inner ends lower, as in anger
    "lid": (-0.4, 1.0),
    "gaze_x": (-1.0, 1.0),
    "gaze_y": (-1.0, 1.0),
    "head_x": (-0.03, 0.03),
    "head_y": (-0.03, 0.03),
    "head_roll": (-4.0, 4.0),
    "head_yaw": (-1.0, 1.0),
    "head_pitch": (-1.0, 1.0),
    "breath": (-1.0, 1.0),
    "shoulders": (0.0, 1.0),  # 1: shrugged
    "upper_l": (0.0, 1.0),  # upper arms: hanging to sideways and up; left and right of the viewer
    "upper_r": (0.0, 1.0),
    "fore_l": (-1.0, 1.0),  # forearms: across the body, straight, bent upwards
    "fore_r": (-1.0, 1.0),
    "hand_l": (-1.0, 1.0),  # hands: pointing, relaxed, open
    "hand_r": (-1.0, 1.0),
}
CHANNELS = tuple(RANGES)
LOW, HIGH = np.array(list(RANGES.values()), dtype=np.float32).T

# emotion → offsets at full intensity of smile, brow_raise, brow_tilt, lid, head_pitch
FACES = {
    "unspecified": (0.0, 0.0, 0.0, 0.0, 0.0),
    "neutral": (0.0, 0.0, 0.0, 0.0, 0.0),
    "happy": (0.85, 0.3, -0.1, 0.0, -0.15),
    "sad": (-0.75, 0.1, -0.8, 0.28, 0.4),
    "angry": (-0.55, -0.7, 0.9, 0.15, 0.15),
    "surprised": (0.05, 0.9, -0.15, -0.35, -0.2),
}
BLINK = (0.45, 1.0, 0.9, 0.35)  # closure of the lid, frame by frame


@dataclass(frozen=True)
class Direction:
    """Motion that neither audio nor emotion determines; by default no gestures and no gaze target."""

    events: Sequence[gestures.Event] = ()
    target: tuple[float, float] | None = None  # gaze_x and gaze_y of a thing that the puppet looks at
    looks: Sequence[tuple[int, int]] = ()  # first frames and ends of commanded looks at the target
    liveliness: float = 1.0  # relative amplitude of head and body motion
    other_pauses: Sequence[int] = ()  # frames after pauses of the other voice, in which a listener nods and blinks


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
    """Trajectory of all channels for a given mouth; a deterministic function of its arguments.

    Args:
        mouth_open, mouth_wide: as in `visemes`.
        states: index into types.STATES.
        emotions: index into types.EMOTIONS.
        intensity: of the emotion, in [0, 1].
        seed: of the random motion.
        direction: gestures, gaze target, liveliness and reactions.

    Returns:
        Rows of CHANNELS, within RANGES.
    """
    frames = len(mouth_open)
    rng = np.random.default_rng([seed, 0x307])
    speaking, listening = ((states == STATES.index(s)).astype(float) for s in ("speaking", "listening"))
    idle = 1 - speaking - listening
    liveliness = direction.liveliness * _smoothed(0.9 * speaking + 0.5 * listening + 0.45 * idle)
    sway = {name: _smooth_noise(rng, frames, 1.0) * liveliness for name in ("x", "y", "roll", "yaw", "pitch")}
    faces = np.array([FACES[name] for name in EMOTIONS])
    smile, raised, tilt, lid, pitch = _smoothed(faces[emotions] * intensity[:, None]).T
    nods = _nods(rng, listening, direction.other_pauses)
    # Stressed syllables raise the brows and lower the head slightly.
    accents = _smoothed(mouth_open) - _smoothed(mouth_open, 0.5)
    blinks = _blinks(rng, frames, direction.other_pauses)
    gaze_x, gaze_y = _gaze(rng, listening, idle, direction)
    held, added = gestures.perform(direction.events, np.clip(2 * accents, 0, 1))
    out = {
        "mouth_open": mouth_open,
        "mouth_wide": mouth_wide,
        "smile": smile + 0.08 * _smooth_noise(rng, frames, 1.5),
        "brow_raise": raised + 0.6 * accents + 0.12 * _smooth_noise(rng, frames, 0.8),
        "brow_tilt": tilt + 0.06 * _smooth_noise(rng, frames, 1.5),
        "lid": lid + (1 - lid) * blinks,
        "gaze_x": gaze_x,
        "gaze_y": gaze_y,
        "head_x": 0.012 * sway["x"],
        "head_y": 0.006 * sway["y"] + 0.01 * accents + 0.012 * nods,
        "head_roll": 1.6 * sway["roll"],
        "head_yaw": 0.4 * sway["yaw"] + 0.3 * gaze_x * idle,
        "head_pitch": 0.25 * sway["pitch"] + 0.5 * pitch + 0.4 * nods,
        "breath": 0.7 * np.sin(2 * np.pi * (rng.random() + np.arange(frames) / FRAME_RATE / rng.uniform(3, 4.5))),
        **held,
    }
    for name, value in added.items():
        out[name] = out[name] + value
    return np.clip(np.stack([out[name] for name in CHANNELS], axis=1), LOW, HIGH).astype(np.float32)


def _smoothed(values: Float[np.ndarray, "f *c"], width_s: float = 0.16) -> Float[np.ndarray, "f *c"]:
    """Values smoothed by a Gaussian with σ of `width_s`."""
    return gaussian_filter1d(values, width_s * FRAME_RATE, axis=0, mode="nearest")


def _smooth_noise(rng: np.random.Generator, frames: int, width_s: float) -> Float[np.ndarray, " f"]:
    """Noise of about unit variance, smooth over `width_s`, softly limited to ±2."""
    width = width_s * FRAME_RATE
    margin = int(3 * width)
    noise = gaussian_filter1d(rng.standard_normal(frames + 2 * margin), width, mode="wrap")[margin : margin + frames]
    return 2 * np.tanh(noise * np.sqrt(2 * width * np.sqrt(np.pi)) / 2)


def _blinks(rng: np.random.Generator, frames: int, pauses: Sequence[int]) -> Float[np.ndarray, " f"]:
    """Closure of the lids: blinks of about 150 ms, every 1.5 to 5 s and at `pauses`."""
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
    direction: Direction,
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]:
    """Gaze x and y: saccades between fixations, at the viewer while listening, often away from the viewer while idle.

    Fixations away from the viewer are at the target if there is one. Commanded looks replace all others.
    """
    target = direction.target
    x, y, frame = np.zeros(len(idle)), np.zeros(len(idle)), 0
    while frame < len(idle):
        end = frame + int(rng.uniform(0.6, 2.2) * FRAME_RATE)
        away = rng.random() < (0.0 if listening[frame] else 0.75 if idle[frame] else 0.35)
        place = rng.uniform((-0.8, -0.5), (0.8, 0.5)) if target is None else np.array(target)
        x[frame:end], y[frame:end] = away * place + rng.normal(0, 0.04, 2)
        frame = end
    attentive = listening.copy()
    for start, end in direction.looks:
        assert target is not None
        x[start:end], y[start:end], attentive[start:end] = *target, 0.0
    away_share = 1 - _smoothed(attentive, 0.1)
    return _smoothed(x, 0.035) * away_share, _smoothed(y, 0.035) * away_share


def _nods(
    rng: np.random.Generator, listening: Float[np.ndarray, " f"], pauses: Sequence[int]
) -> Float[np.ndarray, " f"]:
    """Nods of a listener, of half a second, one or two in a row, at `pauses` and at random times; 1: head down."""
    nods, frame = np.zeros(len(listening) + FRAME_RATE), int(rng.uniform(0.2, 1.2) * FRAME_RATE)
    length = FRAME_RATE // 2
    dip = np.sin(np.pi * np.arange(length) / length) ** 2
    for pause in pauses:
        nods[pause : pause + length] = dip[: max(len(nods) - pause, 0)]
    while frame < len(listening):
        for start in range(frame, frame + length * int(rng.integers(1, 3)), length):
            nods[start : start + length] += dip[: max(len(nods) - start, 0)]
        frame += length * 2 + int(rng.uniform(0.6, 2.0) * FRAME_RATE)
    return nods[: len(listening)] * _smoothed(listening)
