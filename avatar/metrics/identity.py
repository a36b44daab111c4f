"""Is it still the same puppet? Its colours against its palette, and whether it can be recognised at all."""

from collections.abc import Sequence

import numpy as np

from avatar.metrics import statistics
from avatar.metrics.state_estimation import EstimatedClip


def delta_e(readings: Sequence[EstimatedClip]) -> float:
    """The mean colour error over all frames, CIE76 (2: barely visible, 10: another shade, 50: another colour).

    Frames that can't be read count too, with the parts looked for where they fit best. NaN in a world without colours.
    """
    return statistics.mean(np.concatenate([r.delta_e for r in readings])) if readings else float("nan")


def undecodable_rate(readings: Sequence[EstimatedClip]) -> float:
    """The share of frames that can't be read as this puppet, in [0, 1]; NaN if there is no frame."""
    return statistics.mean(np.concatenate([~r.valid for r in readings]).astype(float)) if readings else float("nan")
