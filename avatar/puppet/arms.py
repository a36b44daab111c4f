"""Estimation of arm poses by nearest neighbours in a bank of renders.

The features of a frame are reconstructed from their nearest neighbours in the bank, with the weights of locally linear
embedding (Eq. 1, doi:10.1126/science.290.5500.2323). The pose is the mean of the neighbours' poses with these weights.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from avatar.puppet.gestures import REST
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel

PARTS = ("upper", "fore", "hand")
ARMS = tuple(f"{part}_{side}" for side in "lr" for part in PARTS)
BANK = 1500  # renders
NEIGHBOURS = 12
REGULARISATION = 1e-2  # of the weights, relative to the neighbours' squared distances
_COLUMNS = [channel(name) for name in ARMS]


class ArmBank:
    """Bank of renders of random arm poses over their full ranges, a fifth of them near rest.

    Args:
        rng: draws the poses.
        render: states → features of the frame, a grid of `cells` × `cells` in colour.
        cells: per side of the grid.
        head: left, top and side of the square that the head moves in, which is left out of the comparison.
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
        rendered = render(states)
        middle = (np.arange(cells) + 0.5) / cells
        left, top, side = head
        inner = np.abs(middle - left - side / 2) < 0.42 * side
        in_head = (middle < top + 0.85 * side)[:, None] & inner[None]
        sides = (middle < 0.55, middle > 0.45)  # they overlap, since a hand may cross the middle
        self._features = []
        for of_side in sides:
            mask = np.repeat((of_side[None] & ~in_head).ravel(), 3)
            mask &= rendered.std(0) > 1.0  # in grey levels: cells that arms reach
            self._features.append((mask, rendered[:, mask]))

    def estimate(self, x: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f a"]:
        """Estimate the channels ARMS of every frame from its features."""
        return np.concatenate([self._estimate_side(x, i) for i in range(2)], axis=1)

    def _estimate_side(self, x: Float[np.ndarray, "f n"], side: int) -> Float[np.ndarray, "f 3"]:
        mask, bank = self._features[side]
        poses = self.poses[:, 3 * side : 3 * side + 3]
        x = x[:, mask]
        distances = (x * x).sum(1)[:, None] + (bank * bank).sum(1) - 2 * x @ bank.T
        near = np.argpartition(distances, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        differences = bank[near] - x[:, None]  # f k n
        gram = differences @ differences.swapaxes(1, 2)
        trace = np.trace(gram, axis1=1, axis2=2)[:, None, None]
        gram += REGULARISATION * (trace + 1e-6) * np.eye(NEIGHBOURS)
        weights = np.linalg.solve(gram, np.ones((len(x), NEIGHBOURS, 1)))[..., 0]
        weights /= weights.sum(1, keepdims=True)
        return np.einsum("fk,fkc->fc", weights, poses[near])


def resting(count: int) -> Float[np.ndarray, "count a"]:
    """The channels ARMS at rest, `count` times."""
    return np.tile(np.array([REST[name.split("_")[0]] for name in ARMS], np.float32), (count, 1))
