"""Does the puppet do what it is told? Emotion, state and gesture of a stretch of read states, by plain rules.

A face has the emotion whose definition (`motion.FACES`) it is nearest to, at any intensity from LEAST_INTENSITY to 1.
A mouth that moves is speaking; else a head that nods is listening, and the rest is idle. A gesture is the one with the
most evidence: a swing of the head, raised shoulders, the pose of an arm. Evidence is 1 where the gesture is as large as
the world draws it, and where none reaches a half, there is no gesture.

Read states have NaN where nothing was read. Channels that were read in less than half of the frames take no part, so a
portrait shows no wave; a stretch without the channels it takes, or shorter than LEAST, is not classified, and that
counts as wrong.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from avatar.errors import UserError
from avatar.metrics import statistics
from avatar.metrics.state_estimation import EstimatedClip
from avatar.puppet.motion import CHANNELS, FACES
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, STATES

LEAST = 20  # frames: 0.8 s
FACE = ("smile", "brow_raise", "brow_tilt", "lid")  # the first columns of FACES; the head sways for other reasons too
LEAST_INTENSITY = 0.5
SPEAKS = 0.15  # standard deviation of an aperture that speaks
SWING = 0.85  # amplitude of head_pitch in a nod, of head_yaw in a shake
LISTENS = 0.1  # amplitude of head_pitch in a listener's nods
WAVES = 0.16  # amplitude of fore in a wave
GAIN = 0.75  # of `swing`'s filter at 2 Hz
# what an arm does at the height of a gesture: upper, fore, hand
ARM = {
    "none": (0.05, -0.1, 0.0),
    "wave": (0.6, 0.56, 1.0),
    "point": (0.7, 0.03, -1.0),
    "shrug": (0.13, 0.42, 1.0),
    "beat": (0.12, -0.45, 0.6),
}
BEAT = GESTURES.index("beat")
HAND = 0.3  # weight of the hand beside the arm's angles

Trajectory = Float[np.ndarray, "f s"]  # rows of motion.CHANNELS; NaN where unknown
Track = Float[np.ndarray, " f"]
Labels = Int[np.ndarray, " f"]


def emotion(states: Trajectory) -> str | None:
    """One of types.EMOTIONS but the first."""
    tracks = _tracks(states)
    if not all(name in tracks for name in FACE):
        return None
    face = np.array([np.median(tracks[name]) for name in FACE])

    def distance(name: str) -> float:
        full = np.array(FACES[name][: len(FACE)])
        share = np.clip(face @ full / max(full @ full, 1e-9), LEAST_INTENSITY, 1)
        return float(np.linalg.norm(face - share * full))

    return min(EMOTIONS[1:], key=distance)


def state(states: Trajectory) -> str | None:
    """One of types.STATES but the first."""
    tracks = _tracks(states)
    if not {"mouth_open", "head_pitch"} <= tracks.keys():
        return None
    if tracks["mouth_open"].std() > SPEAKS:
        return "speaking"
    return "listening" if swing(tracks["head_pitch"]) > LISTENS else "idle"


def gesture(states: Trajectory) -> str | None:
    """One of types.GESTURES but the first."""
    found = evidence(states)
    if not found:
        return None
    best = max(found, key=lambda name: found[name])
    return best if found[best] >= 0.5 else "none"


def evidence(states: Trajectory) -> dict[str, float]:
    """How much of each gesture is seen, from 0 to 1; those that can't be seen in these channels are missing."""
    tracks = _tracks(states)
    found = {}
    for name, channel in {"nod": "head_pitch", "shake": "head_yaw"}.items():
        if channel in tracks:
            found[name] = min(swing(tracks[channel]) / SWING, 1.0)
    if "shoulders" in tracks:
        found["shrug"] = float(np.clip(tracks["shoulders"].max(), 0, 1))
    for side in "lr":
        upper, fore, hand = (tracks.get(f"{part}_{side}") for part in ("upper", "fore", "hand"))
        if upper is not None and fore is not None:
            for name, amount in _arm(upper, fore, hand).items():
                found[name] = max(found.get(name, 0), amount)
    return found


def swing(track: Track) -> float:
    """The amplitude of what a track does at about 2 Hz, where it does so most."""
    fast = gaussian_filter1d(track, 0.04 * FRAME_RATE) - gaussian_filter1d(track, 0.16 * FRAME_RATE)
    power = uniform_filter1d(fast**2, min(FRAME_RATE // 2, len(track)))
    return float(np.sqrt(2 * power.max()) / GAIN)


# what can be asked for, or done: how it is seen, and its vocabulary
CLASSIFIERS: Mapping[str, tuple[Callable[[Trajectory], str | None], Sequence[str]]] = {
    "emotion": (emotion, EMOTIONS),
    "state": (state, STATES),
    "gesture": (gesture, GESTURES),
}


def visible(states: Trajectory) -> tuple[str, ...]:
    """The gestures that can be seen in these channels."""
    seen = evidence(states)
    return tuple(name for name in GESTURES if name in seen)


def accuracy(readings: Sequence[EstimatedClip], attribute: str) -> float:
    """The share of stretches that are what they were asked to be, averaged over the classes that were asked for.

    A stretch is a run of one label of "emotion", "state" or "gesture", at least LEAST frames long; label 0 asks for
    nothing, and a gesture that a clip's channels can't show isn't counted. With c classes, one and the same answer to
    everything reaches 1/c. NaN if less than two were asked for.
    """
    if attribute == "gesture":
        return _recall([(r.trajectory, _shown(r, r.gesture)) for r in readings], attribute)
    return _recall([(r.trajectory, getattr(r, attribute)) for r in readings], attribute)


def unprompted(readings: Sequence[EstimatedClip]) -> float:
    """`accuracy` of the gestures that words cause where none is asked for; beats don't count, for they may be left."""
    caused = [np.where((r.gesture == 0) & (r.doing != BEAT), r.doing, 0) for r in readings]
    return _recall([(r.trajectory, _shown(r, doing)) for r, doing in zip(readings, caused, strict=True)], "gesture")


def _shown(reading: EstimatedClip, gestures: Labels) -> Labels:
    """Labels without the gestures that no frame of a clip could show, whether it was valid or not."""
    seen = [GESTURES.index(name) for name in ("none", *visible(reading.states))]
    return np.where(np.isin(gestures, seen), gestures, 0)


def _recall(tracks: Sequence[tuple[Trajectory, Labels]], attribute: str) -> float:
    """The mean over classes of the share of their stretches that are seen as such."""
    classify, names = CLASSIFIERS[attribute]
    hits: dict[str, list[bool]] = {}
    for states, labels in tracks:
        edges = np.flatnonzero(np.diff(labels)) + 1
        for start, stop in zip([0, *edges], [*edges, len(labels)], strict=True):
            if stop - start >= LEAST and labels[start] > 0:
                wanted = names[int(labels[start])]
                hits.setdefault(wanted, []).append(classify(states[start:stop]) == wanted)
    return float(np.mean([np.mean(of_class) for of_class in hits.values()])) if len(hits) > 1 else float("nan")


def counterfactual(
    pairs: Sequence[tuple[Trajectory, Trajectory]], wanted: Sequence[str], attribute: str
) -> dict[str, float | list[float] | int]:
    """What a label does, all else being equal: the same stretch without and with the wanted label.

    `accuracy`: the share of pairs that read as wanted with the label and otherwise without it, `accuracy_ci` its 95 %
    interval; `stayed`: the share that read the same; `pairs`: how many. What can't be classified is no success.
    """
    classify, names = CLASSIFIERS[attribute]
    if unknown := set(wanted) - set(names[1:]):
        raise UserError(f"{attribute} {', '.join(sorted(unknown))}; choose among {', '.join(names[1:])}")
    read = [(classify(before), classify(after)) for before, after in pairs]
    obeyed = np.array([after == w != before for (before, after), w in zip(read, wanted, strict=True)], float)
    return {
        "accuracy": statistics.mean(obeyed),
        "accuracy_ci": list(statistics.interval(obeyed[:, None], lambda rows: float(rows.mean()))),
        "stayed": statistics.mean(np.array([before == after for before, after in read], float)),
        "pairs": len(read),
    }


def _tracks(states: Trajectory) -> dict[str, Track]:
    """The channels that were read in at least half of the frames, gaps filled in; none for too short a stretch."""
    if len(states) < LEAST:
        return {}
    known, frames = np.isfinite(states), np.arange(len(states))
    return {
        name: np.interp(frames, frames[known[:, column]], states[known[:, column], column])
        for column, name in enumerate(CHANNELS)
        if known[:, column].mean() >= 0.5
    }


def _arm(upper: Track, fore: Track, hand: Track | None) -> dict[str, float]:
    """The evidence of the gesture whose pose an arm comes nearest to where it is farthest from hanging down."""
    pose = np.stack([upper, fore] if hand is None else [upper, fore, HAND * hand], axis=1)
    known = {name: np.array((u, f, HAND * h))[: pose.shape[1]] for name, (u, f, h) in ARM.items()}
    away = np.linalg.norm((pose - known["none"])[:, :2], axis=1)
    height = pose[away >= 0.8 * away.max()].mean(0)
    nearest = min(known, key=lambda name: float(np.linalg.norm(height - known[name])))
    amount = float(away.max() / max(np.linalg.norm((known[nearest] - known["none"])[:2]), 1e-9))
    found = dict.fromkeys(set(known) - {"none"}, 0.0)
    if nearest != "none":
        found[nearest] = min(amount, swing(fore) / WAVES if nearest == "wave" else 1.0, 1.0)
    return found
