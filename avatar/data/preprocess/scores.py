"""What is measured of a clip: kept with it, never filtered on. What can't be measured is None, never a default.

A protocol takes scores of whole clips that need weights, of which none is shipped.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from avatar.data.preprocess.sound import level_db
from avatar.types import FRAME_RATE, SAMPLES_PER_FRAME

CELLS, ROWS, COLUMNS = 32, 2, 4  # of a look, along each side; of pixels that are read for each of its cells
OF_PLANE = np.array([0, 16, 32], np.uint8)[:, None, None]
BLUR_EVERY = FRAME_RATE  # frames
UNCHANGED = 1  # grey levels that a cell may change by in a still picture: what a key frame does to it
SPEECH_ABOVE_NOISE_DB = 12.0
SPEECH_LEAST_DB, SPEECH_SURE_DB = -45.0, -30.0  # no frame below is speech, none above noise
LEAST_FOR_CORRELATION = 25  # frames


@runtime_checkable
class Scorer(Protocol):
    """One figure of a clip, such as an aesthetic score or the confidence of a sync network; None where it has none."""

    def __call__(self, frames: UInt8[np.ndarray, "f h w 3"], samples: Float32[np.ndarray, " s"]) -> float | None: ...


@dataclass(frozen=True)
class FrameStats:
    """A picture at a glance: means of Y, Cb and Cr over a grid of cells, of a few pixels each."""

    cells: UInt8[np.ndarray, "3 cells cells"]

    def histogram(self) -> Float[np.ndarray, " bins"]:
        """Shares of 16 levels of luma, then of 16 of each chroma."""
        levels = (self.cells >> 4) + OF_PLANE
        return np.bincount(levels.ravel(), minlength=48) / CELLS**2


def look(picture: av.VideoFrame) -> FrameStats:
    """A look at a picture in 8 bits 4:2:0."""
    cells = np.empty((3, CELLS, CELLS), np.uint8)
    for number in range(3):
        plane = plane_of(picture, number)
        pixels = plane.take(_spread(plane.shape[0], ROWS), axis=0).take(_spread(plane.shape[1], COLUMNS), axis=1)
        # Sums of strided views: numpy is slow at sums over short axes.
        rows = sum((pixels[row::ROWS] for row in range(1, ROWS)), pixels[::ROWS].astype(np.uint16))
        sums = sum((rows[:, column::COLUMNS] for column in range(1, COLUMNS)), rows[:, ::COLUMNS])
        cells[number] = sums // (ROWS * COLUMNS)
    return FrameStats(cells)


@functools.cache
def _spread(length: int, each: int) -> Int[np.ndarray, " n"]:
    """So many evenly spread pixels for each cell along a side."""
    return ((np.arange(CELLS * each) + 0.5) * length / (CELLS * each)).astype(int)


def motion(looks: Sequence[FrameStats]) -> float | None:
    """Mean change of a cell's luma from one frame to the next, as a share of full scale."""
    luma = np.stack([look.cells[0] for look in looks]).astype(np.int16)
    return float(np.abs(np.diff(luma, axis=0)).mean() / 255) if len(luma) > 1 else None


def longest_still(looks: Sequence[FrameStats]) -> int:
    """Frames in the longest run without any change."""
    longest = run = 1
    for before, after in pairwise(looks):
        change = np.abs(after.cells[0].astype(np.int16) - before.cells[0]).max()
        run = run + 1 if change <= UNCHANGED else 1
        longest = max(longest, run)
    return longest


def sharpness(luma: UInt8[np.ndarray, "h w"]) -> float:
    """Variance of the Laplacian, in grey levels squared: low where the picture is blurred."""
    y = luma.astype(np.int16)
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1]
    for more in (y[1:-1, :-2], y[1:-1, 2:], -4 * y[1:-1, 1:-1]):
        laplacian += more
    values = laplacian.astype(np.int32)  # whose sums are exact
    return float(np.square(values).sum(dtype=np.int64) / values.size - (values.sum(dtype=np.int64) / values.size) ** 2)


def speech_activity(samples: Float32[np.ndarray, " s"]) -> Bool[np.ndarray, " f"]:
    """Frames with speech in them, by level alone: well above the tenth percentile of the levels, and not too quiet.

    Music and noise that come and go pass for speech.
    """
    levels = np.array([level_db(frame) for frame in samples.reshape(-1, SAMPLES_PER_FRAME)])
    noise = np.percentile(levels, 10)
    # Speech without a pause has no noise to stand out from, hence a level that is surely none.
    return levels > np.clip(noise + SPEECH_ABOVE_NOISE_DB, SPEECH_LEAST_DB, SPEECH_SURE_DB)


def sync_proxy(samples: Float32[np.ndarray, " s"], mouth: Float[np.ndarray, " f"]) -> float | None:
    """Correlation of the sound's level with the motion at the mouth, at lag 0, over frames where a face is seen.

    A proxy: no confidence of a sync network, and not to be compared with one. None where there are too few such frames.
    """
    envelope = np.sqrt(np.square(samples.reshape(-1, SAMPLES_PER_FRAME)).mean(axis=1))
    seen = np.isfinite(mouth)
    if seen.sum() < LEAST_FOR_CORRELATION or np.ptp(mouth[seen]) == 0 or np.ptp(envelope[seen]) == 0:
        return None
    return float(np.corrcoef(envelope[seen], mouth[seen])[0, 1])


def plane_of(picture: av.VideoFrame, number: int) -> UInt8[np.ndarray, "h w"]:
    """A plane, of which 0 is luma, as a view of the picture's memory."""
    plane = picture.planes[number]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return rows[:, : plane.width]
