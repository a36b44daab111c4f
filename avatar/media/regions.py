"""Regions of a picture by boxes: the share of each pixel that lies in a box, and where in a face the mouth is.

A box is left, top, right, bottom, in shares of the picture's sides, so that it holds at every resolution; NaN: there is
none.
"""

import numpy as np
from jaxtyping import Float


def shares(boxes: Float[np.ndarray, "f 4"], height: int, width: int) -> Float[np.ndarray, "f h w"]:
    """How much of each pixel of frames of height × width lies in their boxes, 0 to 1; nothing where there is no box."""
    left, top, right, bottom = boxes.T
    rows, columns = _covered(top, bottom, height), _covered(left, right, width)
    return np.nan_to_num(rows[:, :, None] * columns[:, None, :])


def mouth_in(face: Float[np.ndarray, "*f 4"]) -> Float[np.ndarray, "*f 4"]:
    """An estimate of the mouth's box by the face's: its lower third, middle half. No detection: a face that is turned
    or tilted has its mouth elsewhere."""
    left, top, right, bottom = np.moveaxis(face, -1, 0)
    quarter = (right - left) / 4
    return np.stack([left + quarter, bottom - (bottom - top) / 3, right - quarter, bottom], axis=-1)


def _covered(first: Float[np.ndarray, " f"], last: Float[np.ndarray, " f"], cells: int) -> Float[np.ndarray, "f n"]:
    """The share of each of so many equal cells of [0, 1] that lies in an interval."""
    edges = np.arange(cells + 1) / cells
    overlap = np.minimum(last[:, None], edges[1:]) - np.maximum(first[:, None], edges[:-1])
    return np.clip(overlap, 0, None) * cells
