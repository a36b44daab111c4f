"""Control scores: rule-based classifiers of what a trajectory shows, and how often their result is the label.

    emotion    the nearest definition (`motion.FACES`), at any intensity from MIN_INTENSITY to 1
    state      speaking if the mouth moves, else listening if the head nods, else idle
    gesture    the one with the most evidence: an oscillation of the head, raised shoulders, the pose of an arm
    point_side the side of the arm that points
    gaze_side  the side that the eyes look to in most frames, far enough for a thing next to the puppet

Evidence is 1 for a gesture as large as the puppet world draws it. If all of it is below 0.5, the gesture is "none".

Segments of trajectories are classified. A channel that is NaN in more than half of the frames is not used, so a
portrait never shows a wave. A segment without the necessary channels, or shorter than MIN_FRAMES, is not classified,
which counts as an error.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from avatar.errors import UserError
from avatar.metrics import statistics
from avatar.metrics.distribution import Trajectory
from avatar.metrics.state_estimation import EstimatedClip
from avatar.puppet.motion import CHANNELS, FACES
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, STATES

MIN_FRAMES = 20  # of a segment: 0.8 s
# the first columns of FACES, without the pitch of the head, which also sways
FACE = ("smile", "brow_raise", "brow_tilt", "lid")
MIN_INTENSITY = 0.5
MIN_SPEAKING = 0.15  # standard deviation of the aperture while speaking
HEAD_AMPLITUDE = 0.85  # of head_pitch in a nod, of head_yaw in a shake
MIN_GAZE = 0.5  # of gaze_x; things are at 0.8
MIN_LISTENING = 0.1  # amplitude of head_pitch while listening
WAVE_AMPLITUDE = 0.16  # of the forearm in a wave
FILTER_GAIN = 0.75  # of the filter in `oscillation`, at 2 Hz
# the pose of an arm at the peak of a gesture: upper, fore, hand
ARM_POSES = {
    "none": (0.05, -0.1, 0.0),
    "wave": (0.6, 0.56, 1.0),
    "point": (0.7, 0.03, -1.0),
    "shrug": (0.13, 0.42, 1.0),
    "beat": (0.12, -0.45, 0.6),
}
SIDES = ("unspecified", "none", "left", "right")  # as seen by the viewer
BEAT = GESTURES.index("beat")
HAND_WEIGHT = 0.3  # relative to the angles of the arm

Track = Float[np.ndarray, " f"]
Labels = Int[np.ndarray, " f"]


def emotion(states: Trajectory) -> str | None:
    """One of types.EMOTIONS[1:], or None if it cannot be classified."""
    tracks = _tracks(states)
    if not all(name in tracks for name in FACE):
        return None
    face = np.array([np.median(tracks[name]) for name in FACE])

    def distance(name: str) -> float:
        full = np.array(FACES[name][: len(FACE)])
        share = np.clip(face @ full / max(full @ full, 1e-9), MIN_INTENSITY, 1)
        return float(np.linalg.norm(face - share * full))

    return min(EMOTIONS[1:], key=distance)


def intensity(states: Trajectory, name: str) -> float | None:
    """Intensity of an emotion, as the share of its definition in the face; None for neutral or an unknown face."""
    tracks, full = _tracks(states), np.array(FACES[name][: len(FACE)])
    if not full.any() or not all(part in tracks for part in FACE):
        return None
    face = np.array([np.median(tracks[part]) for part in FACE])
    return float(face @ full / (full @ full))


def state(states: Trajectory) -> str | None:
    """One of types.STATES[1:], or None if it cannot be classified."""
    tracks = _tracks(states)
    if not {"mouth_open", "head_pitch"} <= tracks.keys():
        return None
    if tracks["mouth_open"].std() > MIN_SPEAKING:
        return "speaking"
    return "listening" if amplitude(tracks["head_pitch"]) > MIN_LISTENING else "idle"


def gesture(states: Trajectory) -> str | None:
    """One of types.GESTURES[1:], or None if it cannot be classified."""
    found = evidence(states)
    if not found:
        return None
    best = max(found, key=lambda name: found[name])
    return best if found[best] >= 0.5 else "none"


def point_side(states: Trajectory) -> str | None:
    """One of SIDES[1:], or None if no arm is known."""
    tracks = _tracks(states)
    found = {side: _evidence_of_arm(tracks, side[0]).get("point") for side in ("left", "right")}
    known = {side: amount for side, amount in found.items() if amount is not None}
    if not known:
        return None
    best = max(known, key=lambda side: known[side])
    return best if known[best] >= 0.5 else "none"


def gaze_side(states: Trajectory) -> str | None:
    """One of SIDES[1:], or None if the gaze is unknown."""
    gaze = _tracks(states).get("gaze_x")
    if gaze is None:
        return None
    middle = float(np.median(gaze))
    return "none" if abs(middle) < MIN_GAZE else "left" if middle < 0 else "right"


def evidence(states: Trajectory) -> dict[str, float]:
    """Evidence of each gesture, from 0 to 1; without the gestures that these channels cannot show."""
    tracks = _tracks(states)
    found = {}
    for name, channel in {"nod": "head_pitch", "shake": "head_yaw"}.items():
        if channel in tracks:
            found[name] = min(amplitude(tracks[channel]) / HEAD_AMPLITUDE, 1.0)
    if "shoulders" in tracks:
        found["shrug"] = float(np.clip(tracks["shoulders"].max(), 0, 1))
    for side in "lr":
        for name, amount in _evidence_of_arm(tracks, side).items():
            found[name] = max(found.get(name, 0), amount)
    return found


def oscillation(track: Track) -> Track:
    """The part of a track that oscillates at about 2 Hz, at FILTER_GAIN of its amplitude."""
    return gaussian_filter1d(track, 0.04 * FRAME_RATE) - gaussian_filter1d(track, 0.16 * FRAME_RATE)


def amplitude(track: Track) -> float:
    """Largest amplitude of a track's oscillation at about 2 Hz."""
    power = uniform_filter1d(oscillation(track) ** 2, min(FRAME_RATE // 2, len(track)))
    return float(np.sqrt(2 * power.max()) / FILTER_GAIN)


# label → its classifier and its vocabulary
CLASSIFIERS: Mapping[str, tuple[Callable[[Trajectory], str | None], Sequence[str]]] = {
    "emotion": (emotion, EMOTIONS),
    "state": (state, STATES),
    "gesture": (gesture, GESTURES),
    # read in counterfactual pairs only, since clips have no labels of them
    "point_side": (point_side, SIDES),
    "gaze_side": (gaze_side, SIDES),
}

LABELS = ("emotion", "state", "gesture")  # those that clips have


def visible(states: Trajectory) -> tuple[str, ...]:
    """The gestures that these channels can show."""
    found = evidence(states)
    return tuple(name for name in GESTURES if name in found)


def accuracy(clips: Sequence[EstimatedClip], attribute: str) -> float:
    """Mean recall over the classes of a label: the share of segments that are classified as their label.

    A segment has one label in at least MIN_FRAMES frames. Label 0 (unspecified) and gestures that a clip's channels
    cannot show are left out. With c classes, a constant answer reaches 1/c. NaN for fewer than two classes.

    Args:
        clips: with the labels that the videos were generated for.
        attribute: "emotion", "state" or "gesture".
    """
    if attribute == "gesture":
        return _mean_recall([(clip.trajectory, _visible_labels(clip, clip.gesture)) for clip in clips], attribute)
    return _mean_recall([(clip.trajectory, getattr(clip, attribute)) for clip in clips], attribute)


def unprompted(clips: Sequence[EstimatedClip]) -> float:
    """`accuracy` of the gestures that words cause, where no gesture is specified; without beats, which are optional."""
    caused = [np.where((clip.gesture == 0) & (clip.doing != BEAT), clip.doing, 0) for clip in clips]
    tracks = [(clip.trajectory, _visible_labels(clip, doing)) for clip, doing in zip(clips, caused, strict=True)]
    return _mean_recall(tracks, "gesture")


def _visible_labels(clip: EstimatedClip, gestures: Labels) -> Labels:
    """Labels with 0 for the gestures that the clip's channels cannot show, in valid and invalid frames."""
    shown = [GESTURES.index(name) for name in ("none", *visible(clip.states))]
    return np.where(np.isin(gestures, shown), gestures, 0)


def _mean_recall(tracks: Sequence[tuple[Trajectory, Labels]], attribute: str) -> float:
    """Recall of each class over the segments of all tracks, averaged over the classes."""
    classify, names = CLASSIFIERS[attribute]
    hits: dict[str, list[bool]] = {}
    for states, labels in tracks:
        edges = np.flatnonzero(np.diff(labels)) + 1
        for start, stop in zip([0, *edges], [*edges, len(labels)], strict=True):
            if stop - start >= MIN_FRAMES and labels[start] > 0:
                label = names[int(labels[start])]
                hits.setdefault(label, []).append(classify(states[start:stop]) == label)
    return float(np.mean([np.mean(of_class) for of_class in hits.values()])) if len(hits) > 1 else float("nan")


def counterfactual(
    pairs: Sequence[tuple[Trajectory, Trajectory]], labels: Sequence[str], attribute: str
) -> dict[str, float | list[float] | int]:
    """Counterfactual effect of a label: the same segment without and with it, all other inputs being equal.

    Args:
        pairs: trajectories without and with the label.
        labels: one per pair.
        attribute: one of CLASSIFIERS.

    Returns:
        accuracy: share of pairs that are classified as the label with it and otherwise without it; accuracy_ci: its
        95 % interval; stayed: share that is classified the same; pairs: their number. A segment that cannot be
        classified is an error.

    Raises:
        UserError: an unknown label.
    """
    classify, names = CLASSIFIERS[attribute]
    if unknown := set(labels) - set(names[1:]):
        raise UserError(
            f"got {attribute}={', '.join(sorted(unknown))}; expected one of {', '.join(names[1:])}: choose another"
        )
    found = [(classify(before), classify(after)) for before, after in pairs]
    correct = np.array([after == label != before for (before, after), label in zip(found, labels, strict=True)], float)
    return {
        "accuracy": statistics.mean(correct),
        "accuracy_ci": list(statistics.interval(correct[:, None], lambda rows: float(rows.mean()))),
        "stayed": statistics.mean(np.array([before == after for before, after in found], float)),
        "pairs": len(found),
    }


def _tracks(states: Trajectory) -> dict[str, Track]:
    """The channels that are known in at least half of the frames, with interpolated gaps; none if too short."""
    if len(states) < MIN_FRAMES:
        return {}
    known, frames = np.isfinite(states), np.arange(len(states))
    return {
        name: np.interp(frames, frames[known[:, column]], states[known[:, column], column])
        for column, name in enumerate(CHANNELS)
        if known[:, column].mean() >= 0.5
    }


def _evidence_of_arm(tracks: Mapping[str, Track], side: str) -> dict[str, float]:
    """Evidence of the gestures of the left (l) or right (r) arm; empty if it is unknown."""
    upper, fore, hand = (tracks.get(f"{part}_{side}") for part in ("upper", "fore", "hand"))
    return {} if upper is None or fore is None else _evidence_of_pose(upper, fore, hand)


def _evidence_of_pose(upper: Track, fore: Track, hand: Track | None) -> dict[str, float]:
    """Evidence of the gesture with the nearest pose, in the frames in which the arm is farthest from rest."""
    pose = np.stack([upper, fore] if hand is None else [upper, fore, HAND_WEIGHT * hand], axis=1)
    known = {name: np.array((u, f, HAND_WEIGHT * h))[: pose.shape[1]] for name, (u, f, h) in ARM_POSES.items()}
    distance = np.linalg.norm((pose - known["none"])[:, :2], axis=1)
    peak = pose[distance >= 0.8 * distance.max()].mean(0)
    nearest = min(known, key=lambda name: float(np.linalg.norm(peak - known[name])))
    amount = float(distance.max() / max(np.linalg.norm((known[nearest] - known["none"])[:2]), 1e-9))
    found = dict.fromkeys(set(known) - {"none"}, 0.0)
    if nearest != "none":
        found[nearest] = min(amount, amplitude(fore) / WAVE_AMPLITUDE if nearest == "wave" else 1.0, 1.0)
    return found
