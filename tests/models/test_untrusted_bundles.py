"""Bundles are untrusted data: nothing but registered components is built, for any header."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avatar.diffusion.plan import plan_of
from avatar.errors import UserError
from avatar.models import bundle, registry
from avatar.models.autoencoders.state import StateAutoencoder
from avatar.types import Bundle

STATE = {"name": "state_autoencoder", "mean": [0.0], "std": [1.0]}
TEXT = {"name": "byte_text", "dim": 8, "width": 8, "layers": 1}
DIT = {"name": "video_dit", "channels": 4, "dim": 8, "ffn": 8, "heads": 1, "layers": 1, "patch": 1} | {
    "audio_features": 4,
    "audio_tokens": 2,
    "text": TEXT,
}
WAN = {"name": "wan_autoencoder", "config": {"base_dim": 4}}
COPY = "${oc.create:{_target_: shutil.copyfile, src: /etc/hostname, dst: sentinel}}"
MP4 = "avatar.media.mp4_writer.Mp4Writer"


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """An empty working folder; calls that a hostile header could cause are recorded, and none may happen."""
    calls = []
    monkeypatch.chdir(tmp_path)
    for module, name in ((os, "system"), (shutil, "copyfile"), (subprocess, "run")):
        monkeypatch.setattr(module, name, lambda *arguments, name=name, **_: calls.append(name))
    before = set(tmp_path.iterdir())
    yield
    assert not calls
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"a.safetensors", "set"}


STATE_WEIGHTS = StateAutoencoder([0.0], [1.0]).state_dict()


def stored(header: str | dict) -> str:
    """A file with this header and the weights of STATE."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(STATE_WEIGHTS, "a.safetensors", metadata={"avatar": text})
    return "a.safetensors"


def header(network: object = STATE, **changes) -> dict:
    parts = {part: changes.pop(part) for part in bundle.ENCODERS if part in changes}
    base = {"kind": "autoencoder", "components": {}, "plan": None, "format": bundle.FORMAT}
    return base | {"config": {"network": network, **parts}} | changes


def check_rejected(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        bundle.load(path)
    assert "\n" not in str(error.value)


def test_the_plain_header_is_accepted():
    net = bundle.load(stored(header(audio={"name": "log_mel"})))
    assert isinstance(net, StateAutoencoder) and bundle.origin_of(net).build_encoder("audio").mels == 40


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (COPY, "without interpolation"),
        (STATE | {"mean": COPY}, "without interpolation"),
        (DIT | {"text": COPY}, "without interpolation"),
        (DIT | {"text": {"name": COPY}}, "without interpolation"),
        (DIT | {"${oc.env:HOME}": 1}, "expected names of arguments"),
        ({"_target_": "os.system", "command": "touch sentinel"}, "'_target_'"),
        ({"_target_": MP4, "path": "sentinel.mp4", "size": 16}, "'_target_'"),
        (STATE | {"_target_": "shutil.copyfile"}, "'_target_'"),
        (STATE | {"_args_": [1]}, "'_args_'"),
        (DIT | {"text": {"_target_": "os.getcwd"}}, "'_target_'"),
        ({"name": MP4, "path": "sentinel.mp4", "size": 16}, "got the component .*expected one of video_dit"),
        ({"name": "os.system", "command": "touch sentinel"}, "got the component 'os.system'"),
        ({"name": ["video_dit"]}, "got the component"),
        ({"name": "nobody"}, "got the component 'nobody'"),
        ({}, "got the component None"),
        (5, "damaged header, by its config"),
        ({"name": "log_mel"}, "got the component 'log_mel'"),
        (DIT | {"text": {"name": "log_mel"}}, "got the component 'log_mel'; expected one of byte_text"),
        (DIT | {"image": TEXT}, "got the component 'byte_text'; expected one of image_projection"),
        (DIT | {"text": "byte_text"}, "got the component 'byte_text'"),
        (DIT | {"channels": STATE}, "got channels="),
        (DIT | {"dim": "8"}, "got dim='8' for video_dit"),
        (DIT | {"dim": True}, "got dim=True"),
        (DIT | {"dim": 8.5}, "got dim=8.5"),
        (DIT | {"dim": None}, "got dim=None"),
        (DIT | {"reference_sink": "yes"}, "got reference_sink='yes'"),
        (DIT | {"strides": [4, "8"]}, "got strides="),
        (DIT | {"dim": 10**9}, "numbers up to 65536"),
        (DIT | {"layers": 60_000}, "at most 128"),
        (STATE | {"mean": [float("nan")]}, "expected finite numbers"),
        (STATE | {"std": [float("inf")]}, "expected finite numbers"),
        (STATE | {"std": [10**400]}, "expected finite numbers"),
        (STATE | {"std": 1.0}, "got std=1.0"),
        (DIT | {"dim": "8", "heads": 1}, "expected int, numbers up to"),
        (STATE | {"std": [-1.0]}, "std > 0"),
        (STATE | {"path": "sentinel"}, "got the argument 'path' for state_autoencoder; expected mean, std"),
        ({"name": "state_autoencoder", "mean": [0.0]}, "without its argument std"),
        (WAN | {"config": COPY}, "without interpolation"),
        (WAN | {"config": {"_class_name": "x"}}, "'_class_name'"),
        (WAN | {"config": {"novelty": 1}}, "got the argument 'novelty' for wan_autoencoder.config"),
        (WAN | {"config": {"base_dim": "4"}}, "got base_dim='4'"),
        (WAN | {"config": {"dim_mult": [1] * 1000}}, "got dim_mult="),
        (WAN | {"config": {"base_dim": 4, "dim_mult": []}}, "can't be built: "),
        (WAN | {"config": [4]}, "expected named values"),
        ({"name": "distilled_autoencoder", "encoder": DIT, "width": 4}, "got the component 'video_dit'"),
        ({"name": "causal_conv_autoencoder", "channels": 60_000, "widths": [60_000, 60_000]}, "does not fit its own"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_hostile_network_is_rejected_and_nothing_runs(network, words):
    check_rejected(stored(header(network)), words)


def test_an_encoder_config_that_is_a_string_is_rejected():
    check_rejected(stored(header(image="clip")), "damaged header, by its config")


@pytest.mark.parametrize("part", bundle.ENCODERS)
@pytest.mark.parametrize(
    "config",
    [{"name": "log_mel", "mels": COPY}, {"_target_": "shutil.copyfile"}, {"name": "x", "a": {"_b": 1}}],
    ids=str,
)
def test_a_hostile_encoder_is_rejected_with_its_file(part, config):
    check_rejected(stored(header(**{part: config})), "unsafe header")


@pytest.mark.parametrize(
    ("part", "config", "words"),
    [
        ("audio", {"name": MP4, "path": "sentinel.mp4", "size": 16}, "got the component"),
        ("audio", {"name": "byte_tokenizer"}, "expected one of log_mel, windowed"),
        ("audio", {"name": "log_mel", "mels": "40"}, "got mels='40' for log_mel"),
        ("audio", {"name": "log_mel", "path": "sentinel"}, "got the argument 'path'"),
        ("audio", {"name": "windowed", "network": STATE}, "expected one of wav2vec2, whisper"),
        ("audio", {"name": "windowed", "network": "wav2vec2"}, "got the component 'wav2vec2'"),
        ("audio", {"name": "log_mel", "mels": -3}, "mels=-3; expected an integer >= 1"),
        ("text", {"name": "log_mel"}, "expected one of byte_tokenizer, umt5"),
        ("text", {"name": "byte_tokenizer", "max_bytes": -3}, "max_bytes=-3; expected an integer >= 1"),
        ("image", {"name": "clip", "weights": "x/y; touch sentinel"}, "hf download 'x/y; touch sentinel'"),
        ("text", {"name": "byte_tokenizer", "max_bytes": 2**40}, "got max_bytes="),
        ("image", {"name": "clip", "weights": 5}, "got weights=5"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_unregistered_encoder_is_never_built(part, config, words):
    origin = bundle.origin_of(bundle.load(stored(header(**{part: config}))))
    with pytest.raises(UserError, match=words) as error:
        origin.build_encoder(part)
    assert "\n" not in str(error.value)


def test_a_config_that_allocates_far_more_than_its_weights_is_rejected():
    """The decoder of the large autoencoder is dropped, so its size is in no state dict."""
    encoder = WAN | {"config": {"base_dim": 4, "decoder_base_dim": 4096}}
    network = {"name": "distilled_autoencoder", "encoder": encoder, "width": 4}
    with torch.device("meta"):
        weights = registry.build(network, registry.AUTOENCODERS).state_dict()
    save_file(
        {name: torch.zeros(weight.shape) for name, weight in weights.items()},
        "a.safetensors",
        metadata={"avatar": json.dumps(header(network))},
    )
    check_rejected("a.safetensors", "allocates .* numbers")


def test_only_a_distilled_autoencoder_has_the_fingerprint_of_another():
    net = bundle.load(stored(header(components={"autoencoder": "0123456789abcdef"})))
    assert bundle.origin_of(net).fingerprint != "0123456789abcdef"


def test_a_bug_in_a_registered_network_keeps_its_traceback(monkeypatch):
    def broken(self, mean: Sequence[float], std: Sequence[float]) -> None:
        raise NameError("a bug")

    monkeypatch.setattr(StateAutoencoder, "__init__", broken)
    with pytest.raises(NameError):
        bundle.new(STATE)
    check_rejected(stored(header()), "can't be built: a bug")


def test_an_origin_never_builds_a_class_path():
    """Also where no file was checked."""
    with pytest.raises(UserError, match="'_target_'"):
        bundle.Origin({"network": STATE, "audio": {"_target_": "os.system"}}).build_encoder("audio")


@pytest.mark.parametrize(
    "plan",
    [{"_target_": MP4}, {"chunk": COPY}, {"times": [1.0, float("nan")]}, {"a": {"b": [{"_c": 1}]}}],
    ids=str,
)
def test_a_hostile_plan_is_rejected_with_its_file(plan):
    check_rejected(stored(header(plan=plan)), "unsafe header")


@pytest.mark.parametrize(
    "plan",
    [
        {"chunk": "2"},
        {"times": "1.0"},
        {"window": [8]},
        {"context": {"a": 1}},
        {"update": ["euler"]},
        {"update": "unsafe"},
        {"x": 1},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_a_plan_of_other_types_is_rejected(plan):
    recorded = bundle.origin_of(bundle.load(stored(header(plan=plan)))).plan
    with pytest.raises(UserError, match=r"got .*(expected|choose)"):
        plan_of(recorded, {})


def test_the_first_format_is_rejected_by_name():
    check_rejected(stored(header({"_target_": "os.system"}, format=1)), "bundle format 1.*retrain it, or convert")


@pytest.mark.parametrize("depth", [20, 100_000])
def test_deeply_nested_headers_are_rejected(depth):
    nested = "[" * depth + "]" * depth
    text = json.dumps(header()).replace('"plan": null', f'"plan": {{"times": {nested}}}')
    check_rejected(stored(text), "nested more than|not a readable")


def test_errors_about_names_with_line_breaks_have_one_line():
    save_file({"a\nb": torch.zeros(1)}, "a.safetensors", metadata={"avatar": json.dumps(header())})
    check_rejected("a.safetensors", "unknown a b")
    check_rejected(stored(header(components={"autoencoder": "a\nb"})), "unsafe header")


def test_a_class_outside_of_the_table_cannot_be_stored():
    with pytest.raises(UserError, match="a bundle can't name this class"):
        bundle.new({"_target_": MP4, "path": "sentinel.mp4", "size": 16})
    encoders = {"network": STATE, "audio": {"_target_": "my.own.Encoder"}}
    with pytest.raises(UserError, match=r"my\.own\.Encoder"):
        bundle.write(Bundle("teacher", {}, encoders), Path("a.safetensors"))
    assert not Path("a.safetensors").exists()


@pytest.mark.parametrize("name", registry.TABLE)
def test_every_entry_of_the_table_is_a_class_with_annotated_arguments(name):
    component = registry.TABLE[name]
    kind = registry._class(component.path)
    assert isinstance(kind, type) and f"{kind.__module__}.{kind.__qualname__}" == component.path
    allowed = {part for nested in component.nested.values() for part in nested}
    assert allowed <= registry.TABLE.keys()
