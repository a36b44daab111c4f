"""Self-attention through a view, and cross-attention, both with normalised queries and keys (arXiv:2302.05442)."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from avatar.nn.rope import Rotation, rotate
from avatar.types import View


class SelfAttention(nn.Module):
    """Attention of this pass's tokens to all that their view shows them."""

    def __init__(self, dim: int, heads: int, layer: int):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "b n d"], view: View, rotation: Rotation) -> Float[Tensor, "b n d"]:
        q, k, v = (
            rearrange(y, "b n (a d) -> b a n d", a=self.heads)
            for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        )
        keys, values = view.update(self.layer, k, v, rotation)
        y = nn.functional.scaled_dot_product_attention(rotate(q, rotation.own), keys, values, view.mask)
        return self.out(rearrange(y, "b a n d -> b n (a d)"))


class CrossAttention(nn.Module):
    """Attention to a memory of tokens under a mask of which each query sees at least one True."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(
        self, x: Float[Tensor, "b n d"], memory: Float[Tensor, "b m d"], mask: Bool[Tensor, "b q m"]
    ) -> Float[Tensor, "b n d"]:
        """`mask` has one row per query (q = n), or one for all of them (q = 1)."""
        q, k, v = (
            rearrange(y, "b n (a d) -> b a n d", a=self.heads)
            for y in (self.norm_q(self.q(x)), self.norm_k(self.k(memory)), self.v(memory))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None])
        return self.out(rearrange(y, "b a n d -> b n (a d)"))


def silence(layer: nn.Linear) -> None:
    """Start a layer at zero, so that what it adds to a loaded network changes nothing at first."""
    torch.nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)
