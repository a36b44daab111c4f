"""Rotary position embeddings (RoPE) on three axes, time × height × width (arXiv:2104.09864).

A head's channels are split over the axes as in Wan. The phases are computed in fp64 from absolute positions. They are
not stored in a table of fixed length, so the length of a stream is not limited.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from avatar.errors import UserError

Table = tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]  # cos and sin of each token's phases, p pairs per head


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a head: the i-th of its channel pairs (0, 1), (2, 3), … turns by position · theta^(-i/pairs).

    Args:
        dim: channels of a head, an even number; Wan's share of each spatial axis is 2 ⌊dim / 6⌋, time has the rest.
        theta: base of the frequencies.

    Raises:
        UserError: `dim` is odd.
    """

    dim: int
    theta: float = 10_000.0

    def __post_init__(self):
        if self.dim % 2:
            raise UserError(
                f"got {self.dim} channels per attention head; expected an even number, for rotary embeddings: change "
                "dim or heads"
            )

    def table(self, positions: Int[Tensor, " l"], height: int, width: int, dtype: torch.dtype) -> Table:
        """Cosines and sines of the n = l · height · width tokens of latents.

        Args:
            positions: of the latents on the timeline.
            height, width: of a latent, in patches.
            dtype: of the queries and keys; the table is in at least fp32.
        """
        spatial = self.dim // 6 * 2
        device = positions.device
        time, rows, columns = (
            self._phases(where, dim)
            for where, dim in (
                (positions, self.dim - 2 * spatial),
                (torch.arange(height, device=device), spatial),
                (torch.arange(width, device=device), spatial),
            )
        )
        grid = (len(positions), height, width)
        phases = torch.cat(
            [
                time[:, None, None].expand(*grid, -1),
                rows[None, :, None].expand(*grid, -1),
                columns[None, None, :].expand(*grid, -1),
            ],
            dim=-1,
        ).flatten(0, 2)
        wide = torch.promote_types(dtype, torch.float32)
        return phases.cos().to(wide), phases.sin().to(wide)

    def _phases(self, positions: Tensor, dim: int) -> Tensor:
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        return positions.double()[:, None] * self.theta**-exponents


def rotate(x: Float[Tensor, "b a n d"], table: Table) -> Float[Tensor, "b a n d"]:
    """Queries or keys rotated by the phases of their tokens, computed in the table's precision."""
    cos, sin = table
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Rotation:
    """The tables of one forward pass: for its own tokens, and for the sink's tokens at each of its positions."""

    own: Table
    sink: list[tuple[Tensor, Tensor]]  # each a Table
