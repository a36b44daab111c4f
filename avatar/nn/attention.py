"""Self-attention through a view, and cross-attention, both with normalised queries and keys (arXiv:2302.05442)."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from avatar.nn.dot_product import attention
from avatar.nn.norm import RMSNorm
from avatar.nn.rope import Rotation
from avatar.protocols import View


class SelfAttention(nn.Module):
    """Self-attention through a view: the view decides which keys each query attends to, and caches them.

    Args:
        dim: width of the tokens, a multiple of `heads`.
        layer: index of the layer, by which the view finds the cached keys and values.
    """

    def __init__(self, dim: int, heads: int, layer: int):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps=1e-6), RMSNorm(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "b n d"], view: View, rotation: Rotation) -> Float[Tensor, "b n d"]:
        q, k, v = (
            rearrange(y, "b n (a d) -> b a n d", a=self.heads)
            for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        )
        y = view.attend(self.layer, q, k, v, rotation)
        return self.out(rearrange(y, "b a n d -> b n (a d)"))


class ImageKeys(nn.Module):
    """Keys and values of image tokens for decoupled cross-attention, with the queries of the text (Wan 2.1 I2V)."""

    def __init__(self, dim: int):
        super().__init__()
        self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_k = RMSNorm(dim, eps=1e-6)

    def forward(self, tokens: Float[Tensor, "b m d"]) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m d"]]:
        return self.norm_k(self.k(tokens)), self.v(tokens)


class CrossAttention(nn.Module):
    """Masked cross-attention to the tokens of a condition; the mask of each query needs at least one True.

    With `image`, the same queries also attend to image tokens, and the two results are added.
    """

    def __init__(self, dim: int, heads: int, image: ImageKeys | None = None):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps=1e-6), RMSNorm(dim, eps=1e-6)
        self.image = image

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        memory: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "b q m"] | Float[Tensor, "b q m"],
        image: Float[Tensor, "b i d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The queries' attention to `memory`, plus that to `image` where given.

        Args:
            x: the tokens that the queries are computed from.
            memory: the tokens that the keys and values are computed from.
            mask: one row per query (q = n) or one for all of them (q = 1). Boolean: True attends; float: added to the
                attention scores.
            image: image tokens; unused by a layer without `ImageKeys`.
        """
        q, k, v = (self._heads(y) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(memory)), self.v(memory)))
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)  # autocast may have narrowed the queries
        y = attention(q, k, v, mask[:, None])
        if self.image is not None and image is not None:
            k, v = (self._heads(part) for part in self.image(image))
            y = y + attention(q, k, v)
        return self.out(rearrange(y, "b a n d -> b n (a d)"))

    def _heads(self, y: Float[Tensor, "b n d"]) -> Float[Tensor, "b a n e"]:
        return rearrange(y, "b n (a d) -> b a n d", a=self.heads)


class AdditiveInjection(nn.Module):
    """Audio injection by addition: one sum of the audio tokens for all queries (after arXiv:2506.18866).

    The tokens are weighted by index and channel.
    """

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(tokens, dim))
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight all tokens equally."""
        nn.init.constant_(self.weights, 1 / len(self.weights))

    def forward(
        self, x: Float[Tensor, "b n d"], memory: Float[Tensor, "b m d"], mask: Bool[Tensor, "b 1 m"]
    ) -> Float[Tensor, "b 1 d"]:
        """One row that is added to all queries; masked tokens count as zero."""
        summed = (memory * self.weights * mask.transpose(1, 2)).sum(1, keepdim=True)
        return self.out(summed)


def zero_init_(layer: nn.Module) -> None:
    """Zero-initialise a layer, so that adding its output to a loaded network changes nothing at first."""
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
