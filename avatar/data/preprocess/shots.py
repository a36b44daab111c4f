"""Where a film cuts: a jump of the colour histogram that stands out from the ones just before.

Hard cuts are found; fades and dissolves are not.
"""

from collections import deque
from statistics import median

import numpy as np

from avatar.data.preprocess.scores import FrameStats

USUAL = 12  # frames that say what is usual
OUTSTANDING = 4.0  # times the usual jump


class CutDetector:
    """Told every frame in turn, says whether it is the first of a shot.

    Args:
        threshold: Share of cells, averaged over Y, Cb and Cr, that must have moved to another level; 0 to 1.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._before: np.ndarray | None = None
        self._jumps: deque[float] = deque(maxlen=USUAL)

    def __call__(self, look: FrameStats) -> bool:
        histogram, before = look.histogram(), self._before
        self._before = histogram
        if before is None:
            return True
        jump = float(np.abs(histogram - before).sum() / 6)  # 2 for each plane where all cells have moved
        usual = median(self._jumps) if self._jumps else 0.0
        if jump > self.threshold and jump > OUTSTANDING * usual:
            self._jumps.clear()
            return True
        self._jumps.append(jump)
        return False
