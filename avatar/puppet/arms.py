"""Reading arms: which poses, rendered, explain a side of the frame.

A bank holds renders of random arms. The nearest of them, weighted so that together they come closest to what is seen
(the weights of locally linear embedding, Eq. 1, doi:10.1126/science.290.5500.2323), give the pose by the same weights.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from avatar.puppet.gestures import REST
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel

PARTS = ("upper", "fore", "hand")
ARMS = tuple(f"{part}_{side}" for side in "lr" for part in PARTS)
BANK = 1500
NEAREST = 12
STIFFNESS = 1e-2  # of the weights, relative to how far the neighbours lie
_COLUMNS = [channel(name) for name in ARMS]


class ArmBank:
    """Arms all over their ranges, many of them at rest.

    Args:
        render: states → features of the frame, a grid of `cells` × `cells` in colour.
        head: left, top and side of the square that the head moves in; nothing is compared there.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        render: Callable[[Float[np.ndarray, "f s"]], Float[np.ndarray, "f n"]],
        cells: int,
        head: tuple[float, float, float],
    ):
        low, high = LOW[_COLUMNS], HIGH[_COLUMNS]
        self.poses = rng.uniform(low, high, (BANK, len(ARMS))).astype(np.float32)
        for columns in (slice(0, 3), slice(3, 6)):
            still = rng.random((BANK, 1)) < 0.2
            self.poses[:, columns] = np.where(
                still, resting(BANK)[:, columns] + rng.normal(0, 0.03, (BANK, 3)), self.poses[:, columns]
            )
        self.poses = self.poses.clip(low, high)
        states = np.zeros((BANK, len(CHANNELS)), np.float32)
        states[:, _COLUMNS] = self.poses
        seen = render(states)
        middle = (np.arange(cells) + 0.5) / cells
        left, top, side = head
        inner = np.abs(middle - left - side / 2) < 0.42 * side
        in_head = (middle < top + 0.85 * side)[:, None] & inner[None]
        sides = (middle < 0.55, middle > 0.45)  # a hand may reach across
        self._seen = []
        for of_side in sides:
            mask = np.repeat((of_side[None] & ~in_head).ravel(), 3)
            mask &= seen.std(0) > 1.0  # grey levels: cells that arms reach
            self._seen.append((mask, seen[:, mask]))

    def read(self, seen: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f a"]:
        """The channels ARMS of every frame."""
        return np.concatenate([self._side(seen, i) for i in range(2)], axis=1)

    def _side(self, seen: Float[np.ndarray, "f n"], side: int) -> Float[np.ndarray, "f 3"]:
        mask, bank = self._seen[side]
        poses = self.poses[:, 3 * side : 3 * side + 3]
        x = seen[:, mask]
        away = (x * x).sum(1)[:, None] + (bank * bank).sum(1) - 2 * x @ bank.T
        near = np.argpartition(away, NEAREST, axis=1)[:, :NEAREST]
        gaps = bank[near] - x[:, None]  # f k n
        gram = gaps @ gaps.swapaxes(1, 2)
        trace = np.trace(gram, axis1=1, axis2=2)[:, None, None]
        gram += STIFFNESS * (trace + 1e-6) * np.eye(NEAREST)
        weights = np.linalg.solve(gram, np.ones((len(x), NEAREST, 1)))[..., 0]
        weights /= weights.sum(1, keepdims=True)
        return np.einsum("fk,fkc->fc", weights, poses[near])


def resting(count: int) -> Float[np.ndarray, "count a"]:
    """The channels ARMS of arms that hang."""
    return np.tile(np.array([REST[name.split("_")[0]] for name in ARMS], np.float32), (count, 1))
