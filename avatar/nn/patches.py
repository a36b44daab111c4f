"""Patches of latents: their embedding, the skip connection from input to output, and cutting and joining them."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.nn.attention import zero_init_


class PatchEmbedding(nn.Module):
    """Linear embedding of patches of p × p latent pixels; that of the reference is added to every latent.

    Args:
        channels: channels c of the latents.
        patch: p.
        dim: width of the output tokens.
        reference: whether to embed the reference.
        extra_channels: channels that are concatenated to those of the latents (k = c + extra_channels).
    """

    def __init__(self, channels: int, patch: int, dim: int, reference: bool, extra_channels: int = 0):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear((channels + extra_channels) * patch * patch, dim)
        self.reference = nn.Linear(channels * patch * patch, dim) if reference else None
        if self.reference is not None:
            zero_init_(self.reference)

    def forward(self, x: Float[Tensor, "b k l h w"], reference: Float[Tensor, "b c 1 h w"]) -> Float[Tensor, "b l n d"]:
        tokens = self.proj(patches(x, self.patch))
        return tokens if self.reference is None else tokens + self.reference(patches(reference, self.patch))


class InputSkip(nn.Module):
    """Learned skip connection from the noisy latents and the reference to the output; zero-initialised.

    The weights are predicted per token and channel. The velocity contains all of the noise, as many numbers as a patch
    has; without the skip they have to pass through the width of the model, and a small model is narrower
    (arXiv:2511.13720).

    Args:
        dim: width of the tokens.
        channels: channels c of the latents.
        patch: edge of a patch, in latent pixels.
        reference: whether the reference is an input too.
    """

    def __init__(self, dim: int, channels: int, patch: int, reference: bool):
        super().__init__()
        self.patch, self.inputs = patch, 1 + reference
        self.weights = nn.Linear(dim, self.inputs * channels)
        zero_init_(self.weights)

    def forward(
        self, y: Float[Tensor, "b l n d"], x: Float[Tensor, "b c l h w"], reference: Float[Tensor, "b c 1 h w"]
    ) -> Float[Tensor, "b c l h w"]:
        """The sum of the inputs, weighted by the last block's tokens `y`."""
        rows, p = x.shape[-2] // self.patch, self.patch
        weights = rearrange(self.weights(y), "b l (h w) (i c) -> i b c l h w", i=self.inputs, h=rows)
        weights = weights.repeat_interleave(p, dim=-2).repeat_interleave(p, dim=-1)
        return (weights * torch.stack([x, reference.expand_as(x)][: self.inputs])).sum(0)


def patches(x: Float[Tensor, "b c l h w"], p: int) -> Float[Tensor, "b l n d"]:
    """Latents cut into flattened patches of p × p. Raises UserError if p does not divide height and width."""
    if x.shape[-1] % p or x.shape[-2] % p:
        raise UserError(
            f"got latents of {x.shape[-2]}×{x.shape[-1]}; expected multiples of the patch size {p}: choose another size"
        )
    return rearrange(x, "b c l (h p) (w q) -> b l (h w) (c p q)", p=p, q=p)


def unpatched(tokens: Float[Tensor, "b l n d"], p: int, h: int, w: int) -> Float[Tensor, "b c l h w"]:
    """The inverse of `patches`, for latents of h × w."""
    return rearrange(tokens, "b l (h w) (c p q) -> b c l (h p) (w q)", p=p, q=p, h=h // p, w=w // p)
