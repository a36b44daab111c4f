"""Bundles: what goes in comes out, and what doesn't fit is refused by name."""

import pytest
import torch
from safetensors.torch import save_file

from avatar.models import checkpoint
from avatar.types import Bundle

NETWORK = {
    "_target_": "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder",
    "channels": 4,
    "widths": [4, 4],
}


def make_bundle(**changes) -> Bundle:
    net = checkpoint.new(NETWORK)
    fields = {"kind": "autoencoder", "weights": net.state_dict(), "config": {"network": NETWORK}}
    return Bundle(**fields | changes)


def test_a_bundle_comes_back_as_it_went(tmp_path):
    bundle = make_bundle(components={"autoencoder": "abc"}, plan={"chunk": 2})
    checkpoint.write(bundle, tmp_path / "a.safetensors")
    net = checkpoint.load(str(tmp_path / "a.safetensors"))
    for name, tensor in bundle.weights.items():
        torch.testing.assert_close(net.state_dict()[name], tensor)
    origin = checkpoint.origin_of(net)
    assert (origin.kind, origin.components, origin.plan) == ("autoencoder", {"autoencoder": "abc"}, {"chunk": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_fingerprint_tells_one_weight_from_another():
    weights = dict(make_bundle().weights)
    before = checkpoint.fingerprint(weights)
    assert checkpoint.fingerprint(dict(reversed(weights.items()))) == before
    name = next(name for name, w in weights.items() if w.is_floating_point())
    weights[name] = weights[name] + 1e-3
    assert checkpoint.fingerprint(weights) != before


def test_another_kind_is_refused(tmp_path):
    checkpoint.write(make_bundle(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'autoencoder'; wanted teacher"):
        checkpoint.load(str(tmp_path / "a.safetensors"), ("teacher",))


@pytest.mark.parametrize("spoil, told", [("pop", "missing"), ("add", "unknown"), ("shape", "wanted")])
def test_weights_that_do_not_fit_are_named(tmp_path, spoil, told):
    weights = dict(make_bundle().weights)
    name = "linear_in.weight"
    if spoil == "pop":
        del weights[name]
    elif spoil == "add":
        weights["nobody"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(2, 2)
    checkpoint.write(make_bundle(weights=weights), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=told):
        checkpoint.load(str(tmp_path / "a.safetensors"))


def test_a_bundle_can_not_call_foreign_code(tmp_path):
    checkpoint.write(
        make_bundle(config={"network": {"_target_": "os.system", "command": "true"}}), tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match="only classes of this package"):
        checkpoint.load(str(tmp_path / "a.safetensors"))


def test_what_is_no_bundle_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no bundle"):
        checkpoint.load(str(tmp_path / "nothing.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="no readable safetensors"):
        checkpoint.load(str(tmp_path / "text.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no header"):
        checkpoint.load(str(tmp_path / "plain.safetensors"))


def test_latents_of_another_autoencoder_are_refused(tmp_path):
    for name in ("a", "b"):
        checkpoint.write(make_bundle(), tmp_path / f"{name}.safetensors")
    first, second = (checkpoint.load(str(tmp_path / f"{name}.safetensors")) for name in ("a", "b"))
    hashes = {"autoencoder": checkpoint.origin_of(first).fingerprint}
    checkpoint.write(make_bundle(components=hashes), tmp_path / "net.safetensors")
    net = checkpoint.load(str(tmp_path / "net.safetensors"))
    checkpoint.check_latents(net, first)
    with pytest.raises(ValueError, match="trained on latents of autoencoder"):
        checkpoint.check_latents(net, second)


def test_a_write_that_fails_leaves_the_old_bundle(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.write(make_bundle(), path)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(make_bundle(), path)
    assert path.read_bytes() == before
