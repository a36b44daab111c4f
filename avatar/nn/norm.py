"""Normalisation, and its modulation by time: y = norm(x) (1 + scale) + shift (adaLN, arXiv:2212.09748)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32 whatever the input, as Wan's is."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b l d"], scale: Float[Tensor, "b l d"]
) -> Float[Tensor, "b n d"]:
    """x (1 + scale) + shift, with one shift and scale for all the tokens of a latent."""
    return _each(x, 1 + scale, torch.mul) + _spread(x, shift)


def gated(x: Float[Tensor, "b n d"], gate: Float[Tensor, "b l d"]) -> Float[Tensor, "b n d"]:
    """x times its latent's gate."""
    return _each(x, gate, torch.mul)


def _spread(x: Tensor, by: Tensor) -> Tensor:
    return by.repeat_interleave(x.shape[1] // by.shape[1], dim=1)


def _each(x: Tensor, by: Tensor, change) -> Tensor:
    return change(x, _spread(x, by))
