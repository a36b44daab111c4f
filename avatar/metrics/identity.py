"""Identity preservation: colour error against the puppet's palette, and the share of invalid frames."""

from collections.abc import Sequence

import numpy as np

from avatar.metrics import statistics
from avatar.metrics.state_estimation import EstimatedClip


def delta_e(clips: Sequence[EstimatedClip]) -> float:
    """Mean colour error over all frames, CIE76 (2: barely visible, 10: another shade, 50: another colour).

    Invalid frames count too, with the parts at the positions of the best fit. NaN in a world without colours.
    """
    return statistics.mean(np.concatenate([clip.delta_e for clip in clips])) if clips else float("nan")


def undecodable_rate(clips: Sequence[EstimatedClip]) -> float:
    """Share of invalid frames, which do not show this puppet, in [0, 1]; NaN without frames."""
    return statistics.mean(np.concatenate([~clip.valid for clip in clips]).astype(float)) if clips else float("nan")
