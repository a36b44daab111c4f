"""Rotary positions on three axes, time × height × width (arXiv:2104.09864), split over a head's channels as Wan does.

The phases are computed in fp64 from absolute positions, for whatever positions are asked: there is no table to run
out of.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from avatar.errors import UserError

Table = tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]  # cos and sin of every token's phases, p pairs a head


@dataclass(frozen=True)
class Rope:
    """The rotation of a head's `dim` channels: pairs (0, 1), (2, 3), … turn by position × theta^(-i/pairs)."""

    dim: int
    theta: float = 10_000.0

    def __post_init__(self):
        if self.dim % 2:
            raise UserError(f"a head has {self.dim} channels, but they turn in pairs; choose an even width per head")

    def table(self, positions: Int[Tensor, " l"], height: int, width: int, dtype: torch.dtype) -> Table:
        """Cosines and sines for the tokens of latents at these positions, each a grid of height × width; in fp32 at
        least, whatever the dtype of what they are to turn."""
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
    """Queries or keys turned to their positions."""
    cos, sin = table
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Rotation:
    """The tables of one forward pass: this pass's tokens, and the sink's tokens at each place it is seen from."""

    own: Table
    sink: list[tuple[Tensor, Tensor]]  # each a Table
