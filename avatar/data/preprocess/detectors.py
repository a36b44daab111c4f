"""Face and body detection in the frames of a clip, by detectors that the user provides. None is shipped.

Without a detector the result is None; what a detector did not find is NaN.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Float, Float32, UInt8

from avatar.data.preprocess import scores
from avatar.errors import UserError
from avatar.media.regions import mouth_box


@runtime_checkable
class FaceDetector(Protocol):
    """Detects faces in one frame, and optionally their mouths."""

    def __call__(self, frame: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "n 4"] | Float32[np.ndarray, "n 8"]:
        """One row per face: left, top, right, bottom, as shares of the frame's width and height.

        Of eight columns, the last four are the box of the mouth, NaN if it isn't visible.
        """
        ...


@runtime_checkable
class BodyDetector(Protocol):
    """Detects bodies in one frame, as `points` joints each; two corners of a box are sufficient."""

    points: int

    def __call__(self, frame: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "n points 3"]:
        """x, y as shares of the frame's width and height, and confidence in [0, 1]; NaN for a joint not visible."""
        ...


@dataclass(frozen=True)
class Detectors:
    """The detectors of a data set; None where there is none."""

    face: FaceDetector | None = None
    body: BodyDetector | None = None


@dataclass(frozen=True)
class Detections:
    """Detections in f frames: the largest face and the most confident body of each."""

    faces: Float32[np.ndarray, "f 4"] | None
    mouths: Float32[np.ndarray, "f 4"] | None  # of these faces; None if the detector finds no mouths
    max_faces: int  # in any one frame
    mouth_motion: Float[np.ndarray, " f"] | None
    bodies: Float32[np.ndarray, "f points 3"] | None


class DetectionTracker:
    """Runs the detectors on the frames of a clip, one by one."""

    def __init__(self, detectors: Detectors):
        self._detectors = detectors
        self._faces: list[np.ndarray] = []  # boxes of face and mouth
        self._finds_mouths = False
        self._counts: list[int] = []
        self._motion: list[float] = []
        self._bodies: list[np.ndarray] = []
        self._previous_luma: np.ndarray | None = None

    def push(self, frame: av.VideoFrame) -> None:
        face, body = self._detectors.face, self._detectors.body
        if face is None and body is None:
            return
        pixels = frame.to_ndarray(format="rgb24")
        if face is not None:
            self._push_faces(face(pixels), scores.plane(frame, 0).copy())
        if body is not None:
            self._bodies.append(most_confident_body(body(pixels), body.points))

    def detections(self, frames: int) -> Detections:
        """Detections in the first `frames` frames."""
        face = self._detectors.face is not None
        faces = np.stack(self._faces[:frames]) if face else np.empty((0, 8), np.float32)
        return Detections(
            faces[:, :4] if face else None,
            faces[:, 4:] if self._finds_mouths else None,
            max(self._counts[:frames]) if face else 0,
            np.array(self._motion[:frames]) if face else None,
            np.stack(self._bodies[:frames]).astype(np.float32) if self._detectors.body is not None else None,
        )

    def _push_faces(self, boxes: Float32[np.ndarray, "n k"], luma: UInt8[np.ndarray, "h w"]) -> None:
        if boxes.ndim != 2 or boxes.shape[1] not in (4, 8):
            raise UserError(
                f"got boxes of shape {boxes.shape} from the face detector; expected [faces, 4], or [faces, 8] with "
                "the box of the mouth: fix the detector"
            )
        # A mouth may be NaN, a face may not. No coordinate may be infinite, and no box inverted.
        corners = boxes.reshape(len(boxes), boxes.shape[1] // 4, 2, 2)
        if not np.isfinite(boxes[:, :4]).all() or np.isinf(boxes).any() or (corners[:, :, 0] > corners[:, :, 1]).any():
            raise UserError(
                f"got boxes {boxes.tolist()} from the face detector; expected left ≤ right and top ≤ bottom, finite, "
                "or NaN for a mouth that isn't visible: leave out the rows of missing faces"
            )
        found = np.full(8, np.nan, np.float32)
        found[: boxes.shape[1]] = largest_face(boxes)
        self._finds_mouths |= boxes.shape[1] == 8
        self._faces.append(found)
        self._counts.append(len(boxes))
        mouth = found[4:] if self._finds_mouths else mouth_box(found[:4])
        self._motion.append(box_motion(mouth, luma, self._previous_luma))
        self._previous_luma = luma


def largest_face(boxes: Float32[np.ndarray, "n k"]) -> Float32[np.ndarray, " k"]:
    """The row of the largest face; NaN if there is none."""
    if not len(boxes):
        return np.full(boxes.shape[1], np.nan, np.float32)
    return boxes[np.argmax((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))]


def most_confident_body(bodies: Float32[np.ndarray, "n points 3"], points: int) -> Float32[np.ndarray, "points 3"]:
    """The body with the largest sum of its joints' confidences; NaN if there is none."""
    if not len(bodies):
        return np.full((points, 3), np.nan, np.float32)
    return bodies[np.argmax(np.nansum(bodies[:, :, 2], axis=1))]


def box_motion(
    box: Float32[np.ndarray, " 4"], luma: UInt8[np.ndarray, "h w"], previous: UInt8[np.ndarray, "h w"] | None
) -> float:
    """Mean absolute change of luma within a box, in grey levels; NaN without a box or a previous frame."""
    if previous is None or not np.isfinite(box).all():
        return float("nan")
    height, width = luma.shape
    left, top, right, bottom = box
    rows = slice(max(int(top * height), 0), max(int(bottom * height), 0))
    columns = slice(max(int(left * width), 0), max(int(right * width), 0))
    change = np.abs(luma[rows, columns].astype(np.int16) - previous[rows, columns])
    return float(change.mean()) if change.size else float("nan")
