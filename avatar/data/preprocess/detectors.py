"""Who is to be seen in a clip: faces and bodies, by detectors that bring their weights along. None is shipped.

What nobody looked for is None; what was looked for and not found is NaN.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Float, Float32, UInt8

from avatar.data.preprocess import scores
from avatar.errors import UserError
from avatar.media.regions import mouth_in


@runtime_checkable
class FaceDetector(Protocol):
    """Finds faces in one picture, and their mouths if it can."""

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "n 4"] | Float32[np.ndarray, "n 8"]:
        """Boxes as left, top, right, bottom, in shares of the picture's sides; no row where there is no face.

        Of eight columns, the last four are the box of the mouth; NaN where it isn't seen.
        """
        ...


@runtime_checkable
class BodyDetector(Protocol):
    """Finds bodies in one picture, by `points` joints each; two corners of a box will do."""

    points: int

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "n points 3"]:
        """x, y in shares of the picture's sides and confidence, 0 to 1; NaN for a joint that isn't seen."""
        ...


@dataclass(frozen=True)
class Detectors:
    """Those that there are."""

    face: FaceDetector | None = None
    body: BodyDetector | None = None


@dataclass(frozen=True)
class Detections:
    """Of f frames, in each the largest face and the surest body."""

    faces: Float32[np.ndarray, "f 4"] | None
    mouths: Float32[np.ndarray, "f 4"] | None  # of these faces; None where the detector finds faces alone
    most_faces: int  # in any of the frames
    mouth_motion: Float[np.ndarray, " f"] | None
    bodies: Float32[np.ndarray, "f points 3"] | None


class DetectionTracker:
    """Looks at the frames of a clip in turn."""

    def __init__(self, detectors: Detectors):
        self._detectors = detectors
        self._faces: list[np.ndarray] = []  # each with its mouth
        self._finds_mouths = False
        self._counts: list[int] = []
        self._motion: list[float] = []
        self._bodies: list[np.ndarray] = []
        self._luma: np.ndarray | None = None

    def take(self, picture: av.VideoFrame) -> None:
        face, body = self._detectors.face, self._detectors.body
        if face is None and body is None:
            return
        pixels = picture.to_ndarray(format="rgb24")
        if face is not None:
            self._take_faces(face(pixels), scores.plane_of(picture, 0).copy())
        if body is not None:
            self._bodies.append(surest(body(pixels), body.points))

    def seen(self, frames: int) -> Detections:
        """What was seen in the first so many frames."""
        face = self._detectors.face is not None
        faces = np.stack(self._faces[:frames]) if face else np.empty((0, 8), np.float32)
        return Detections(
            faces[:, :4] if face else None,
            faces[:, 4:] if self._finds_mouths else None,
            max(self._counts[:frames]) if face else 0,
            np.array(self._motion[:frames]) if face else None,
            np.stack(self._bodies[:frames]).astype(np.float32) if self._detectors.body is not None else None,
        )

    def _take_faces(self, boxes: Float32[np.ndarray, "n k"], luma: UInt8[np.ndarray, "h w"]) -> None:
        if boxes.ndim != 2 or boxes.shape[1] not in (4, 8):
            raise UserError(
                f"a face detector gave boxes of shape {boxes.shape}; wanted a row of 4 for each face, or of 8 with its "
                "mouth's"
            )
        # Of faces that aren't there no row is wanted; a mouth may be NaN, but neither endless nor turned around.
        ends = boxes.reshape(len(boxes), boxes.shape[1] // 4, 2, 2)
        if not np.isfinite(boxes[:, :4]).all() or np.isinf(boxes).any() or (ends[:, :, 0] > ends[:, :, 1]).any():
            raise UserError(
                f"a face detector gave boxes of {boxes.tolist()}; wanted left, top, right, bottom of each face, in "
                "this order and finite, and of its mouth, NaN where it isn't seen"
            )
        found = np.full(8, np.nan, np.float32)
        found[: boxes.shape[1]] = largest(boxes)
        self._finds_mouths |= boxes.shape[1] == 8
        self._faces.append(found)
        self._counts.append(len(boxes))
        self._motion.append(motion_in(found[4:] if self._finds_mouths else mouth_in(found[:4]), luma, self._luma))
        self._luma = luma


def largest(boxes: Float32[np.ndarray, "n k"]) -> Float32[np.ndarray, " k"]:
    """The row of the largest face; NaN if there is none."""
    if not len(boxes):
        return np.full(boxes.shape[1], np.nan, np.float32)
    return boxes[np.argmax((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))]


def surest(bodies: Float32[np.ndarray, "n points 3"], points: int) -> Float32[np.ndarray, "points 3"]:
    """The body whose joints have the most confidence in all; NaN if there is none."""
    if not len(bodies):
        return np.full((points, 3), np.nan, np.float32)
    return bodies[np.argmax(np.nansum(bodies[:, :, 2], axis=1))]


def motion_in(
    box: Float32[np.ndarray, " 4"], luma: UInt8[np.ndarray, "h w"], before: UInt8[np.ndarray, "h w"] | None
) -> float:
    """Mean change of luma in a box; NaN without a box or a picture before."""
    if before is None or not np.isfinite(box).all():
        return float("nan")
    height, width = luma.shape
    left, top, right, bottom = box
    rows = slice(max(int(top * height), 0), max(int(bottom * height), 0))
    columns = slice(max(int(left * width), 0), max(int(right * width), 0))
    part = np.abs(luma[rows, columns].astype(np.int16) - before[rows, columns])
    return float(part.mean()) if part.size else float("nan")
