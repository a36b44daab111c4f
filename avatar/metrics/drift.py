"""Drift of long streams: each quantity along the stream, its slope, and its end compared with its beginning.

Several streams are aligned at their first frames and pooled block by block. A stream also varies by itself (a pause, a
blink): compare with the same values of the ground truth.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import theilslopes

from avatar.metrics import control, identity, lip_sync, statistics
from avatar.metrics.state_estimation import EstimatedClip
from avatar.types import EMOTIONS

BLOCK = 100  # frames: 4 s, enough speech for a correlation
PIECE = 50  # frames, longer than a blink or an accent of the brows; a block has two pieces
MIN_BLOCKS = 4  # for a slope
MIN_POINTS = 3  # of them measured


def motion(clips: Sequence[EstimatedClip]) -> float:
    """Mean motion per frame, in shares of the channels' ranges; invalid frames are left out."""
    return statistics.mean(np.concatenate([clip.motion for clip in clips])) if clips else float("nan")


def motion_of_truth(clips: Sequence[EstimatedClip]) -> float:
    """`motion` of the true puppet in the same frames."""
    return statistics.mean(np.concatenate([clip.truth_motion for clip in clips])) if clips else float("nan")


def emotion_as_labelled(clips: Sequence[EstimatedClip]) -> float:
    """Share of pieces of PIECE frames with one label that show the emotion of this label."""
    pieces = [clip.between(start, start + PIECE) for clip in clips for start in range(0, len(clip) - PIECE + 1, PIECE)]
    labelled = [piece for piece in pieces if piece.emotion[0] and (piece.emotion == piece.emotion[0]).all()]
    shown = [control.emotion(piece.trajectory) == EMOTIONS[piece.emotion[0]] for piece in labelled]
    return statistics.mean(np.array(shown, float))


QUANTITIES: Mapping[str, Callable[[Sequence[EstimatedClip]], float]] = {
    "lip_sync_r": lip_sync.correlation,
    "identity_delta_e": identity.delta_e,
    "motion": motion,
    "motion_of_truth": motion_of_truth,
    "emotion_as_labelled": emotion_as_labelled,
    "undecodable_rate": identity.undecodable_rate,
}


def blocks(clips: Sequence[EstimatedClip], quantity: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The middle frame of each block of BLOCK frames, and the quantity there, up to the end of the shortest stream."""
    starts = range(0, _common_frames(clips) - BLOCK + 1, BLOCK)
    values = [QUANTITIES[quantity]([clip.between(start, start + BLOCK) for clip in clips]) for start in starts]
    return np.array([start + BLOCK / 2 for start in starts], float), np.array(values, float)


def drift(clips: Sequence[EstimatedClip]) -> dict[str, dict[str, float]]:
    """Drift of each of QUANTITIES: its slope per 1000 frames, its value in the first and in the last tenth, the change.

    `change` is relative to the first tenth. NaN for short streams: a slope needs four blocks of 100 frames, a tenth at
    least one block.
    """
    return {name: _drift(clips, name) for name in QUANTITIES}


def slope(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Theil–Sen slope of y over distinct x, robust to 29 % of outliers; NaN for fewer than 3 measured points."""
    known = np.isfinite(y)
    return float(np.asarray(theilslopes(y[known], x[known]))[0]) if known.sum() >= MIN_POINTS else float("nan")


def _drift(clips: Sequence[EstimatedClip], quantity: str) -> dict[str, float]:
    frames = _common_frames(clips)
    middle, values = blocks(clips, quantity)
    per_1000 = slope(middle / 1000, values) if len(values) >= MIN_BLOCKS else float("nan")
    tenth = frames // 10
    first = last = float("nan")
    if tenth >= BLOCK:
        first = QUANTITIES[quantity]([clip.between(0, tenth) for clip in clips])
        last = QUANTITIES[quantity]([clip.between(frames - tenth, frames) for clip in clips])
    change = statistics.relative_change(first, last)
    return {"slope_per_1000": per_1000, "first_tenth": first, "last_tenth": last, "change": change}


def _common_frames(clips: Sequence[EstimatedClip]) -> int:
    """The length of the shortest stream."""
    return min(map(len, clips), default=0)
