"""Bundles are read back unchanged; files that do not fit are rejected by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from avatar import files
from avatar.models import bundle, registry
from avatar.types import Bundle

NETWORK = {
    "_target_": "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder",
    "channels": 4,
    "widths": [4, 4],
}


def make_bundle(**changes) -> Bundle:
    net = bundle.new(NETWORK)
    fields = {"kind": "autoencoder", "weights": net.state_dict(), "config": {"network": NETWORK}}
    return Bundle(**fields | changes)


def test_a_written_bundle_is_read_back_unchanged(tmp_path):
    stored = make_bundle(components={"autoencoder": "abc"}, plan={"chunk": 2})
    bundle.write(stored, tmp_path / "a.safetensors")
    net = bundle.load(str(tmp_path / "a.safetensors"))
    for name, tensor in stored.weights.items():
        torch.testing.assert_close(net.state_dict()[name], tensor)
    origin = bundle.origin_of(net)
    assert (origin.kind, origin.components, origin.plan) == ("autoencoder", {"autoencoder": "abc"}, {"chunk": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_loaded_backbones_are_shared_with_the_file_until_they_are_written_to(tmp_path):
    """The ranks of a machine share the pages of a large network that is sharded; none has a full copy."""
    path = tmp_path / "a.safetensors"
    bundle.write(Bundle("teacher", bundle.new(NETWORK).state_dict(), {"network": NETWORK}), path)
    stored, draws = path.read_bytes(), torch.get_rng_state()
    first, second = bundle.load(str(path)), bundle.load(str(path))
    mapped = mapped_addresses(path)
    assert all(any(w.data_ptr() in addresses for addresses in mapped) for w in first.state_dict().values())
    assert torch.equal(torch.get_rng_state(), draws)
    with torch.no_grad():
        first.linear_in.weight.add_(1)
    assert path.read_bytes() == stored and bundle.fingerprint(second.state_dict()) == second.origin.fingerprint


def mapped_addresses(path: Path) -> list[range]:
    """Addresses of this process that are backed by the file."""
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path)))
    return [range(*(int(address, 16) for address in columns[0].split("-"))) for columns in lines]


def test_a_fingerprint_depends_on_every_weight():
    weights = dict(make_bundle().weights)
    before = bundle.fingerprint(weights)
    assert bundle.fingerprint(dict(reversed(weights.items()))) == before
    name = next(name for name, w in weights.items() if w.is_floating_point())
    weights[name] = weights[name] + 1e-3
    assert bundle.fingerprint(weights) != before


def test_bundles_of_another_kind_are_rejected(tmp_path):
    bundle.write(make_bundle(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'autoencoder'; expected teacher"):
        bundle.load(str(tmp_path / "a.safetensors"), ("teacher",))


@pytest.mark.parametrize("change, message", [("pop", "missing"), ("add", "unknown"), ("shape", "expected")])
def test_mismatched_weights_are_named(tmp_path, change, message):
    weights = dict(make_bundle().weights)
    name = "linear_in.weight"
    if change == "pop":
        del weights[name]
    elif change == "add":
        weights["surplus"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(2, 2)
    bundle.write(make_bundle(weights=weights), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        bundle.load(str(tmp_path / "a.safetensors"))


HEADER = {
    "kind": "student",
    "config": {"network": registry.registered(NETWORK)},
    "components": {},
    "plan": None,
    "format": bundle.FORMAT,
}


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "5",
        "{",
        json.dumps({name: value for name, value in HEADER.items() if name != "components"}),
        json.dumps(HEADER | {"author": "nobody"}),
        json.dumps(HEADER | {"config": {}}),
        json.dumps(HEADER | {"config": []}),
        json.dumps(HEADER | {"config": None}),
        json.dumps(HEADER | {"config": HEADER["config"] | {"video": {}}}),
        json.dumps(HEADER | {"kind": ["student"]}),
        json.dumps(HEADER | {"components": {"autoencoder": 5}}),
        json.dumps(HEADER | {"plan": [1.0]}),
        json.dumps(HEADER | {"format": bundle.FORMAT + 1}),
    ],
)
def test_a_damaged_header_is_rejected(tmp_path, header):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"avatar": header})
    with pytest.raises(
        ValueError, match=r"a\.safetensors .*(write the bundle again|copy or write it again|give a file)"
    ):
        bundle.read(tmp_path / "a.safetensors")


def test_other_files_than_bundles_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no bundle"):
        bundle.load(str(tmp_path / "nothing.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        bundle.load(str(tmp_path / "text.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no header"):
        bundle.load(str(tmp_path / "plain.safetensors"))


def test_latents_of_another_autoencoder_are_rejected(tmp_path):
    for name in ("a", "b"):
        bundle.write(make_bundle(), tmp_path / f"{name}.safetensors")
    first, second = (bundle.load(str(tmp_path / f"{name}.safetensors")) for name in ("a", "b"))
    hashes = {"autoencoder": bundle.origin_of(first).fingerprint}
    bundle.write(make_bundle(components=hashes), tmp_path / "net.safetensors")
    net = bundle.load(str(tmp_path / "net.safetensors"))
    bundle.check_latents(net, first)
    with pytest.raises(ValueError, match="trained on latents of autoencoder"):
        bundle.check_latents(net, second)


class Encoder(torch.nn.Module):
    """A text encoder with weights and this fingerprint."""

    def __init__(self, fingerprint):
        super().__init__()
        self.fingerprint = fingerprint


HERE, THERE = ({"name": "umt5", "weights": place} for place in ("here", "there"))


@pytest.mark.parametrize(
    "known, config, encoder, message",
    [
        ({}, HERE, "Words(1)", None),
        ({}, THERE, "Words(1)", "is for text from .*'here'.* but got .*'there'.*convert published weights again"),
        ({"text": "Words(1)"}, THERE | {"subfolder": "."}, "Words(1)", None),
        ({"text": "Words(1)"}, HERE, "Words(2)", r"trained with the text encoder Words\(1\), but got Words\(2\)"),
        ({"text": "Words(1)"}, HERE | {"name": "byte_tokenizer"}, "Others(1)", r"but got Others\(1\)"),
    ],
)
def test_encoders_are_identified_by_weights_or_else_by_full_config(tmp_path, known, config, encoder, message):
    path = tmp_path / "a.safetensors"
    bundle.write(make_bundle(config={"network": NETWORK, "text": HERE}, components=known), path)
    net, given = bundle.load(str(path)), ({"text": config}, {"text": Encoder(encoder)})
    if message is None:
        bundle.check_encoders(net, *given)
    else:
        with pytest.raises(ValueError, match=message):
            bundle.check_encoders(net, *given)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("before", [True, False])
def test_a_failed_write_leaves_the_old_bundle_and_no_other_file(tmp_path, monkeypatch, error, before):
    def write_half(tensors, path, **_):
        path.write_bytes(b"half")
        raise error

    path = tmp_path / "a.safetensors"
    if before:
        bundle.write(make_bundle(), path)
    old = path.read_bytes() if before else None
    monkeypatch.setattr(files, "save_file", write_half)
    with pytest.raises(OSError, match="No space left"):
        bundle.write(make_bundle(), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({path.name: old} if before else {})


def test_a_full_disk_is_reported_with_the_file_and_a_fix(tmp_path, monkeypatch):
    """Safetensors raises its own error here, which is not an OSError."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(files, "save_file", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match=r"can't write .*a\.safetensors .*free some space there or choose another folder"):
        bundle.write(make_bundle(), tmp_path / "a.safetensors")


def test_paths_that_cannot_be_written_are_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        bundle.write(make_bundle(), tmp_path / "file" / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
