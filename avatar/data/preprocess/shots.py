"""Shot detection: a hard cut is a jump of the colour histogram that exceeds the recent jumps.

Fades and dissolves are not detected.
"""

from collections import deque
from statistics import median

import numpy as np

from avatar.data.preprocess.scores import FrameStats

HISTORY = 12  # frames whose median jump is the reference
MIN_RATIO = 4.0  # of a cut's jump to the median jump


class CutDetector:
    """Takes every frame in order and returns whether it is the first frame of a shot.

    Args:
        threshold: share of cells, averaged over Y, Cb and Cr, that must have changed their level; 0 to 1.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._previous: np.ndarray | None = None
        self._jumps: deque[float] = deque(maxlen=HISTORY)

    def __call__(self, stats: FrameStats) -> bool:
        histogram, previous = stats.histogram(), self._previous
        self._previous = histogram
        if previous is None:
            return True
        jump = float(np.abs(histogram - previous).sum() / 6)  # the sum is 2 for each plane whose cells all changed
        typical = median(self._jumps) if self._jumps else 0.0
        if jump > self.threshold and jump > MIN_RATIO * typical:
            self._jumps.clear()
            return True
        self._jumps.append(jump)
        return False
