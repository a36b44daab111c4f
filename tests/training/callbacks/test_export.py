"""The exported bundle: half-precision weights compute the same, and NaN or infinite weights are not written."""

from types import SimpleNamespace

import pytest
import torch

from avatar.models import bundle
from avatar.training.callbacks.export import Export

NETWORK = {
    "_target_": "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder",
    "channels": 4,
    "widths": [4, 4],
}


def export(path, net, precision: str = "float16") -> None:
    trainer = SimpleNamespace(callbacks=[], datamodule=None, is_global_zero=True)
    Export(str(path), "autoencoder", {}, None, precision).on_fit_end(trainer, SimpleNamespace(net=net))


def test_buffers_keep_their_precision(tmp_path):
    """The variance of unnormalised latents is some 100,000; float16 ends at 65,504."""
    net = bundle.new(NETWORK).eval()
    net.normalise.variance[:] = 2.4e5
    export(tmp_path / "a.safetensors", net)
    loaded = bundle.load(str(tmp_path / "a.safetensors")).eval()
    assert torch.equal(loaded.normalise.variance, net.normalise.variance)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(video), net.encode(video), atol=2e-2, rtol=2e-2)
    assert (tmp_path / "a.safetensors").stat().st_size < 0.7 * _size(net)


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "float32"), (1e6, "float16")])
def test_nonfinite_weights_are_rejected(tmp_path, value, precision):
    net = bundle.new(NETWORK)
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = value
    with pytest.raises(ValueError, match="isn't finite"):
        export(tmp_path / "a.safetensors", net, precision)
    assert not list(tmp_path.iterdir())


def _size(net) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
