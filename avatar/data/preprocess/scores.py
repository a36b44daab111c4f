"""Scores of a clip: stored with it, never used as a filter here. A score that can't be measured is None.

`Scorer` is the protocol of scores by networks. None is shipped.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from avatar.data.preprocess.audio import level_db
from avatar.types import FRAME_RATE, SAMPLES_PER_FRAME

CELLS = 32  # of the statistics of a frame, along each side
ROWS, COLUMNS = 2, 4  # pixels read for each cell
HISTOGRAM_OFFSETS = np.array([0, 16, 32], np.uint8)[:, None, None]  # of Y, Cb and Cr
SHARPNESS_INTERVAL = FRAME_RATE  # frames
UNCHANGED = 1  # grey levels by which a key frame may change a cell of a frozen video
SPEECH_ABOVE_NOISE_DB = 12.0
SPEECH_MIN_DB, SPEECH_CERTAIN_DB = -45.0, -30.0  # no frame below is speech; every frame above is
MIN_CORRELATED_FRAMES = 25


@runtime_checkable
class Scorer(Protocol):
    """One score of a clip, such as an aesthetic score or the confidence of a sync network; None if undefined.

    Args:
        frames: RGB.
        samples: the audio of these frames at 16 kHz, in [-1, 1].
    """

    def __call__(self, frames: UInt8[np.ndarray, "f h w 3"], samples: Float32[np.ndarray, " s"]) -> float | None: ...


@dataclass(frozen=True)
class FrameStats:
    """Means of Y, Cb and Cr over a grid of cells, from a few pixels of each cell."""

    cells: UInt8[np.ndarray, "3 cells cells"]

    def histogram(self) -> Float[np.ndarray, " bins"]:
        """Shares of 16 levels of luma, then of 16 levels of each chroma plane."""
        levels = (self.cells >> 4) + HISTOGRAM_OFFSETS
        return np.bincount(levels.ravel(), minlength=48) / CELLS**2


def frame_stats(frame: av.VideoFrame) -> FrameStats:
    """Statistics of a frame in 8 bits 4:2:0."""
    cells = np.empty((3, CELLS, CELLS), np.uint8)
    for number in range(3):
        pixels = plane(frame, number)
        height, width = pixels.shape
        pixels = pixels.take(_sample_positions(height, ROWS), axis=0).take(_sample_positions(width, COLUMNS), axis=1)
        # Sums of strided views: numpy is slow at sums over short axes.
        rows = sum((pixels[row::ROWS] for row in range(1, ROWS)), pixels[::ROWS].astype(np.uint16))
        sums = sum((rows[:, column::COLUMNS] for column in range(1, COLUMNS)), rows[:, ::COLUMNS])
        cells[number] = sums // (ROWS * COLUMNS)
    return FrameStats(cells)


@functools.cache
def _sample_positions(length: int, per_cell: int) -> Int[np.ndarray, " n"]:
    """`per_cell` evenly spaced pixels for each cell along a side of `length` pixels."""
    return ((np.arange(CELLS * per_cell) + 0.5) * length / (CELLS * per_cell)).astype(int)


def motion(stats: Sequence[FrameStats]) -> float | None:
    """Mean absolute change of a cell's luma between consecutive frames, as a share of full scale."""
    luma = np.stack([frame.cells[0] for frame in stats]).astype(np.int16)
    return float(np.abs(np.diff(luma, axis=0)).mean() / 255) if len(luma) > 1 else None


def longest_freeze(stats: Sequence[FrameStats]) -> int:
    """Frames in the longest run without change."""
    longest = run = 1
    for before, after in pairwise(stats):
        change = np.abs(after.cells[0].astype(np.int16) - before.cells[0]).max()
        run = run + 1 if change <= UNCHANGED else 1
        longest = max(longest, run)
    return longest


def sharpness(luma: UInt8[np.ndarray, "h w"]) -> float:
    """Variance of the Laplacian, in grey levels squared: low for a blurred image."""
    y = luma.astype(np.int16)
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1]
    for term in (y[1:-1, :-2], y[1:-1, 2:], -4 * y[1:-1, 1:-1]):
        laplacian += term
    values = laplacian.astype(np.int32)  # whose sums are exact
    return float(np.square(values).sum(dtype=np.int64) / values.size - (values.sum(dtype=np.int64) / values.size) ** 2)


def speech_activity(samples: Float32[np.ndarray, " s"]) -> Bool[np.ndarray, " f"]:
    """Voice activity of each frame by its level: well above the tenth percentile of all levels, and not too low.

    Music and intermittent noise are classified as speech.
    """
    levels = np.array([level_db(frame) for frame in samples.reshape(-1, SAMPLES_PER_FRAME)])
    noise = np.percentile(levels, 10)
    # Speech without pauses has no noise floor, hence the level above which every frame is speech.
    return levels > np.clip(noise + SPEECH_ABOVE_NOISE_DB, SPEECH_MIN_DB, SPEECH_CERTAIN_DB)


def sync_proxy(samples: Float32[np.ndarray, " s"], mouth: Float[np.ndarray, " f"]) -> float | None:
    """Correlation of the audio level with the motion at the mouth, at lag 0, over frames with a detected face.

    It is a proxy, and not comparable with the confidence of a sync network. None if there are too few such frames.
    """
    envelope = np.sqrt(np.square(samples.reshape(-1, SAMPLES_PER_FRAME)).mean(axis=1))
    detected = np.isfinite(mouth)
    if detected.sum() < MIN_CORRELATED_FRAMES or np.ptp(mouth[detected]) == 0 or np.ptp(envelope[detected]) == 0:
        return None
    return float(np.corrcoef(envelope[detected], mouth[detected])[0, 1])


def plane(frame: av.VideoFrame, number: int) -> UInt8[np.ndarray, "h w"]:
    """A plane of a frame (0: luma), as a view of its memory."""
    data = frame.planes[number]
    rows = np.frombuffer(data, np.uint8).reshape(data.height, data.line_size)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return rows[:, : data.width]
