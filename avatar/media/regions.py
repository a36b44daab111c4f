"""Region masks from bounding boxes, and estimates of the boxes of mouth and eyes from that of their face.

A box is [left, top, right, bottom] in shares of the image's width and height, so it is the same at every resolution.
NaN means no box.
"""

import numpy as np
from jaxtyping import Float


def box_masks(boxes: Float[np.ndarray, "f 4"], height: int, width: int) -> Float[np.ndarray, "f h w"]:
    """Masks of boxes: the share of each pixel's area that is inside, in [0, 1]; 0 for a box of NaN.

    Args:
        boxes: one per frame.
        height, width: of the frames, in pixels.
    """
    left, top, right, bottom = boxes.T
    rows, columns = _coverage(top, bottom, height), _coverage(left, right, width)
    return np.nan_to_num(rows[:, :, None] * columns[:, None, :])


def mouth_box(face: Float[np.ndarray, "*f 4"]) -> Float[np.ndarray, "*f 4"]:
    """Estimate of the mouth's box from the face's: its lower third, middle half.

    It is not a detection: in a face that is turned or tilted, the mouth is elsewhere.
    """
    left, top, right, bottom = np.moveaxis(face, -1, 0)
    quarter = (right - left) / 4
    return np.stack([left + quarter, bottom - (bottom - top) / 3, right - quarter, bottom], axis=-1)


def eyes_box(face: Float[np.ndarray, "*f 4"]) -> Float[np.ndarray, "*f 4"]:
    """Estimate of the box of eyes and brows from the face's: its second to fifth tenth, a tenth narrower per side."""
    left, top, right, bottom = np.moveaxis(face, -1, 0)
    width, height = (right - left) / 10, bottom - top
    return np.stack([left + width, top + height / 10, right - width, top + height / 2], axis=-1)


def _coverage(first: Float[np.ndarray, " f"], last: Float[np.ndarray, " f"], cells: int) -> Float[np.ndarray, "f n"]:
    """The share of each of `cells` equal cells of [0, 1] that is inside the interval [first, last] of each frame."""
    edges = np.arange(cells + 1) / cells
    overlap = np.minimum(last[:, None], edges[1:]) - np.maximum(first[:, None], edges[:-1])
    return np.clip(overlap, 0, None) * cells
