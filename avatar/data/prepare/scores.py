"""What is measured of a clip: kept with it, never filtered on. What can't be measured is None, never a default.

Two protocols take what needs weights, of which none is shipped: a face detector, and any score of a whole clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Bool, Float, Float32, UInt8

from avatar.data.prepare.sound import level_db
from avatar.types import SAMPLES_PER_FRAME

CELLS = 32  # rows and columns of a look
BLUR_EVERY = 5  # frames
UNCHANGED = 1  # grey levels that a cell may change by in a still picture: what a key frame does to it
SPEECH_ABOVE_NOISE_DB = 12.0
SPEECH_LEAST_DB, SPEECH_SURE_DB = -45.0, -30.0  # no frame below is speech, none above noise
LEAST_FOR_CORRELATION = 25  # frames


@runtime_checkable
class FaceDetector(Protocol):
    """Finds faces in one picture."""

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "n 4"]:
        """Boxes as left, top, right, bottom, in shares of the picture's sides; no row where there is no face."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """One figure of a clip, such as an aesthetic score or the confidence of a sync network; None where it has none."""

    def __call__(self, frames: UInt8[np.ndarray, "f h w 3"], samples: Float32[np.ndarray, " s"]) -> float | None: ...


@dataclass(frozen=True)
class Look:
    """A picture at a glance: means of Y, Cb and Cr over a grid of cells."""

    cells: UInt8[np.ndarray, "3 cells cells"]

    def histogram(self) -> Float[np.ndarray, " bins"]:
        """Shares of 16 levels of luma, then of 16 of each chroma."""
        return np.concatenate([np.bincount(plane.ravel() >> 4, minlength=16) for plane in self.cells]) / CELLS**2


class Looker:
    """Makes looks; one for each size of picture."""

    def __init__(self):
        self._reformatter = VideoReformatter()

    def __call__(self, picture: av.VideoFrame) -> Look:
        small = self._reformatter.reformat(picture, CELLS, CELLS, "yuv444p", interpolation=Interpolation.AREA)
        return Look(small.to_ndarray().copy())


def motion(looks: Sequence[Look]) -> float | None:
    """Mean change of a cell's luma from one frame to the next, as a share of full scale."""
    luma = np.stack([look.cells[0] for look in looks]).astype(np.int16)
    return float(np.abs(np.diff(luma, axis=0)).mean() / 255) if len(luma) > 1 else None


def longest_still(looks: Sequence[Look]) -> int:
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
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float64))


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


def mouth_motion(
    luma: UInt8[np.ndarray, "h w"], before: UInt8[np.ndarray, "h w"] | None, face: Float32[np.ndarray, " 4"]
) -> float:
    """Mean change of luma in the lower third of the face, middle half; NaN without a face or a picture before."""
    if before is None or not np.isfinite(face).all():
        return float("nan")
    height, width = luma.shape
    left, top, right, bottom = face
    rows = slice(max(int((bottom - (bottom - top) / 3) * height), 0), int(bottom * height))
    columns = slice(max(int((left + (right - left) / 4) * width), 0), int((right - (right - left) / 4) * width))
    part = np.abs(luma[rows, columns].astype(np.int16) - before[rows, columns])
    return float(part.mean()) if part.size else float("nan")


def luma_of(picture: av.VideoFrame) -> UInt8[np.ndarray, "h w"]:
    """The first plane, as a view of the picture's memory."""
    plane = picture.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return rows[:, : plane.width]


def largest(boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, " 4"]:
    """The largest of the boxes; NaN if there is none."""
    if not len(boxes):
        return np.full(4, np.nan, np.float32)
    return boxes[np.argmax((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))]
