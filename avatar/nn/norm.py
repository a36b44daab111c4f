"""Normalisation layers, and modulation by the timestep: y = norm(x) (1 + scale) + shift (adaLN, arXiv:2212.09748)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm that is computed in at least fp32 for inputs of any precision, as Wan's is."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        bias = None if self.bias is None else self.bias.to(wide)
        return nn.functional.layer_norm(input.to(wide), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """RMS norm in the wider precision of input and weight, as in torch.

    It calls torch's fused kernel also where the two precisions differ, under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return nn.functional.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b l d"], scale: Float[Tensor, "b l d"]
) -> Float[Tensor, "b n d"]:
    """x (1 + scale) + shift, with one shift and one scale for all n / l tokens of a latent."""
    return torch.addcmul(shift[:, :, None], _by_latent(x, scale), 1 + scale[:, :, None]).flatten(1, 2)


def gated(x: Float[Tensor, "b n d"], y: Float[Tensor, "b n d"], gate: Float[Tensor, "b l d"]) -> Float[Tensor, "b n d"]:
    """x + y gate, with one gate for all n / l tokens of a latent."""
    return torch.addcmul(_by_latent(x, gate), _by_latent(y, gate), gate[:, :, None]).flatten(1, 2)


def _by_latent(x: Tensor, per_latent: Tensor) -> Float[Tensor, "b l n d"]:
    return x.unflatten(1, (per_latent.shape[1], -1))
