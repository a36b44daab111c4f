"""RMS norm under autocast: equal to torch's, by one fused kernel."""

import pytest
import torch
from torch.autograd.profiler import profile

from avatar.nn.norm import RMSNorm


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # raised by torch's RMS norm
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch_in_every_precision_and_uses_the_fused_kernel(precision, weight):
    ours, theirs = RMSNorm(64, eps=1e-6).to(weight), torch.nn.RMSNorm(64, eps=1e-6).to(weight)
    for norm in (ours, theirs):
        torch.manual_seed(1)
        torch.nn.init.normal_(norm.weight)
    first, second = ((3 * torch.randn(5, 64)).to(precision).requires_grad_() for _ in range(2))
    second.data.copy_(first.data)
    with profile() as profiled, torch.autocast("cpu", torch.bfloat16):
        got = ours(first)
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(second)
    assert "aten::_fused_rms_norm" in {event.name for event in profiled.function_events} and got.dtype == precision
    torch.testing.assert_close(got, expected.to(precision), rtol=0, atol=0)
    got.float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-5 if precision == torch.float32 else 1e-2, atol=1e-3)
