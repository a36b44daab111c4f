"""Scaled dot-product attention, with the kernel chosen by device and precision."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: Float[Tensor, "b a n d"],
    k: Float[Tensor, "b a m d"],
    v: Float[Tensor, "b a m d"],
    mask: Bool[Tensor, "*#b #n m"] | Float[Tensor, "*#b #n m"] | None = None,
) -> Float[Tensor, "b a n d"]:
    """softmax(q kᵀ / √d + mask) v.

    On the CPU, torch's fused kernel is up to three times slower in bf16 than in fp32, because of its backward pass;
    matrix products are faster than both (`benchmarks/attention.py`).

    Args:
        q, k, v: queries, keys and values of a heads.
        mask: broadcastable to the scores. Boolean: True attends; float: added to them. None: every key is attended to.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return scaled_dot_product_attention(q, k, v, mask)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1) @ v
