"""Attention in bf16 on the CPU equals torch's in fp32 up to rounding, forward and backward, for every kind of mask."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from avatar.nn.dot_product import attention


@pytest.mark.parametrize("kind", ["none", "boolean", "float", "one row"])
def test_bf16_equals_the_fused_kernel_in_fp32(kind):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 16).bfloat16() for n in (5, 7, 7)]
    kept = torch.rand(2, 1, 1 if kind == "one row" else 5, 7) > 0.3
    kept[..., 0] = True
    bias = torch.zeros(kept.shape).masked_fill(~kept, -torch.inf)
    mask = {"none": None, "boolean": kept, "float": bias.bfloat16(), "one row": kept}[kind]
    exact = {"none": None, "boolean": kept, "float": bias, "one row": kept}[kind]
    got, want = [], []
    for results, function, dtype, one in (
        (got, attention, torch.bfloat16, mask),
        (want, scaled_dot_product_attention, torch.float32, exact),
    ):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        out = function(q, k, v, one)
        out.float().square().sum().backward()
        results += [out, q.grad, k.grad, v.grad]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.02 * b.norm()
