"""Bundles: one safetensors file with weights, build config, component fingerprints and rollout plan.

A network has an origin, `origin_of(net)`: the config it was built from, the hash of the weights it was loaded with, and
the fingerprints of its components: the autoencoder of its latents, and the encoders that have weights. The folder of an
encoder's weights differs between machines, so fingerprints are compared and not paths. Paths are compared only where no
fingerprint is recorded, as for published weights.

A file is untrusted: its config names registered components (`avatar.models.registry`), and nothing else is built.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from avatar.errors import MissingFileError, UserError
from avatar.files import save_tensors
from avatar.models import registry
from avatar.types import Bundle

FORMAT = 2
ENCODERS = ("audio", "text", "image")  # parts of a trained network's config
KINDS = ("autoencoder", "teacher", "causal_teacher", "student")
MAX_EXCESS, MAX_SMALL = 4, 2**24  # a distilled autoencoder is built with the large decoder, which is dropped


@dataclass(frozen=True)
class Origin:
    """Where a network comes from: its config, kind, fingerprint, components and rollout plan."""

    config: Mapping[str, Any]  # `network`; for a trained network also its encoders `audio`, `text` and `image`
    kind: str = "new"
    fingerprint: str = "untrained"
    components: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None

    @property
    def network(self) -> Mapping[str, Any]:
        """The network's registered name and constructor arguments."""
        return self.config["network"]

    def build_encoder(self, part: str, weights: str | None = None) -> Any:
        """Build the encoder of a part of the config; None where the network has none.

        Args:
            part: "audio", "text" or "image".
            weights: path of its weights on this machine; None: the path in the config.

        Raises:
            MissingFileError: no weights at this path.
            UserError: other weights than in training, or a path for an encoder without weights.
        """
        if (config := self.config.get(part)) is None:
            if weights is not None:
                raise UserError(f"got weights.{part}={weights}, for a {self.kind} without {part} encoder; leave it out")
            return None
        if weights is not None:
            if has_no_weights(config):
                raise UserError(f"got weights.{part}={weights}, for {config.get('name')}, which has none; leave it out")
            config = _with_weights(config, weights)
        try:
            encoder = registry.build_from_file(config, registry.PARTS[part])
        except FileNotFoundError as error:
            raise MissingFileError(f"{error}; or give the path on this machine: weights.{part}=FOLDER") from error
        _check_same(self, part, encoder)
        return encoder


def new(network: Any) -> Any:
    """Build a network with fresh weights.

    Args:
        network: a trusted config, `_target_` and constructor arguments, or its registered form.

    Raises:
        UserError: a class that is not in `avatar.models.registry`, or arguments that it does not have.
    """
    config = OmegaConf.to_container(network, resolve=True) if OmegaConf.is_config(network) else network
    origin = Origin({"network": registry.registered(config)})
    return _with_origin(registry.build(origin.network, registry.PARTS["network"]), origin)


def load(path: str, kinds: Sequence[str] = KINDS) -> Any:
    """Load the network of a bundle, in fp32 and eval mode.

    Weights that are stored in fp32 are memory-mapped: all processes of a machine and all networks of the file share
    them until they are written to or moved.

    Args:
        path: path of the .safetensors file, which may be untrusted.
        kinds: the kinds of bundle that are accepted.

    Raises:
        MissingFileError: no file at this path.
        UserError: another kind, a damaged or unsafe file, or weights that do not fit the config.
    """
    bundle = read(Path(path))
    if bundle.kind not in kinds:
        raise UserError(
            f"{path} is a bundle of kind {bundle.kind!r}; expected {' or '.join(kinds)}: choose another file"
        )
    config, name = bundle.config["network"], fingerprint(bundle.weights)
    if bundle.kind == "autoencoder":  # one with another decoder shares the latents of the first
        name = bundle.components.get("autoencoder", name)
    origin = Origin(bundle.config, bundle.kind, name, bundle.components, bundle.plan)
    # Without memory, until shapes have been compared.
    with torch.device("meta"), registry.Allocations() as allocations:
        net = registry.build_from_file(config, registry.PARTS["network"])
    expected = net.state_dict()
    if wrong := state_dict_mismatches(expected, bundle.weights):
        listed = " ".join("; ".join(wrong[:8]).split())  # names in a file may have line breaks
        raise UserError(f"{path} does not fit its own config: {listed}; write the bundle again")
    if bundle.kind == "autoencoder":  # networks of other libraries may have tensors outside of the state dict
        if allocations.numbers > MAX_EXCESS * sum(map(torch.numel, bundle.weights.values())) + MAX_SMALL:
            raise UserError(
                f"got {path}, whose config allocates {allocations.numbers:.1e} numbers to load far fewer; expected at "
                f"most {MAX_EXCESS} times its weights: use a bundle from a trusted source"
            )
        net = registry.build_from_file(config, registry.PARTS["network"])
    net.load_state_dict({name: w.to(expected[name].dtype) for name, w in bundle.weights.items()}, assign=True)
    return _with_origin(net, origin).eval()


def origin_of(net: nn.Module) -> Origin:
    """The origin of a network that `new` or `load` built."""
    origin = net.origin
    assert isinstance(origin, Origin)
    return origin


def read(path: Path) -> Bundle:
    """Read a bundle and check that its header is plain data. Raises MissingFileError or UserError."""
    if not path.is_file():
        raise MissingFileError(f"no bundle at {path}; give the path of a .safetensors file that a stage wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("avatar", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); copy or write it again") from error
    found = header.pop("format", None) if isinstance(header, dict) else None
    if found == 1:
        raise UserError(
            f"{path} is of bundle format 1, which named Python classes; expected format {FORMAT}: retrain it, or "
            "convert the published weights again with python -m avatar convert"
        )
    if found != FORMAT:
        raise UserError(f"{path} has no header of this project (format {FORMAT}); give a file that a stage wrote")
    _check_header(header, path)
    return Bundle(weights=weights, **header)


def _check_header(header: Mapping[str, Any], path: Path) -> None:
    if header.keys() != {"kind", "config", "components", "plan"}:
        raise UserError(f"{path} has a damaged header, by its fields; write the bundle again")
    try:
        registry.check_plain(header)
    except UserError as error:
        raise UserError(f"{path} has an unsafe header: {error}") from error
    config, components, plan = header["config"], header["components"], header["plan"]
    valid = {
        "kind": isinstance(header["kind"], str),
        "config": isinstance(config, dict)
        and isinstance(config.get("network"), dict)
        and config.keys() <= registry.PARTS.keys()
        and all(part is None or isinstance(part, dict) for part in config.values()),
        "components": isinstance(components, dict) and all(isinstance(value, str) for value in components.values()),
        "plan": plan is None or isinstance(plan, dict),
    }
    if damaged := [name for name, right in valid.items() if not right]:
        raise UserError(f"{path} has a damaged header, by its {damaged[0]}; write the bundle again")


def write(bundle: Bundle, path: Path) -> None:
    """Write a bundle atomically: under a temporary name first.

    Trusted configs with `_target_` are stored in their registered form.

    Raises:
        UserError: weights that are NaN or infinite, or a class that a bundle can't name.
    """
    if broken := [name for name, weight in bundle.weights.items() if not weight.isfinite().all()]:
        raise UserError(f"{broken[0]} isn't finite; {path} is not written: check the run's losses and its precision")
    header = {
        "format": FORMAT,
        "kind": bundle.kind,
        "config": registry.registered(bundle.config),
        "components": dict(bundle.components),
        "plan": plain_plan(bundle.plan),
    }
    save_tensors(bundle.weights, path, {"avatar": json.dumps(header, sort_keys=True)})


def plain_plan(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The fields of a rollout plan, without the `_target_` of its config."""
    return None if plan is None else {name: value for name, value in plan.items() if name != "_target_"}


def state_dict_mismatches(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """Descriptions of weights that are missing, unknown or of another shape than the network's, sorted."""
    wrong = [f"missing {name}" for name in expected.keys() - got.keys()]
    wrong += [f"unknown {name}" for name in got.keys() - expected.keys()]
    wrong += [
        f"{name} is {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and got[name].shape != tensor.shape
    ]
    return sorted(wrong)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Fingerprint of weights: a hash of their names, shapes, precision and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_latents(net: nn.Module, autoencoder: nn.Module) -> None:
    """Raise UserError for a network that was trained on another autoencoder's latents."""
    expected, got = origin_of(net).components.get("autoencoder"), origin_of(autoencoder).fingerprint
    if expected is not None and expected != got:
        raise UserError(
            f"the {origin_of(net).kind} was trained on latents of autoencoder {expected}, but got autoencoder {got}; "
            "pass the autoencoder it was trained with"
        )


def check_encoders(net: nn.Module, config: Mapping[str, Any], encoders: Mapping[str, Any]) -> None:
    """Raise UserError for other encoders ("audio", "text", "image") than the network was trained with.

    Encoders with weights are compared by fingerprint where training has recorded it; all others by their registered
    config, the path of their weights included.
    """
    origin = origin_of(net)
    for part, encoder in encoders.items():
        if part in origin.components:
            _check_same(origin, part, encoder)
        elif part in origin.config and origin.config[part] != (got := registry.registered(config.get(part))):
            raise UserError(
                f"the {origin.kind} is for {part} from {origin.config[part]}, but got {got}; pass that {part} "
                "encoder, or convert published weights again with this one"
            )


def encoder_fingerprints(encoders: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints of encoders with weights; the config identifies all others."""
    return {part: str(encoder.fingerprint) for part, encoder in encoders.items() if isinstance(encoder, nn.Module)}


def has_no_weights(config: Mapping[str, Any] | None) -> bool:
    """Whether this is the config of an encoder without weights."""
    return config is not None and _with_weights(config, "") == _with_weights(config, "elsewhere")


def _check_same(origin: Origin, part: str, encoder: Any) -> None:
    if (expected := origin.components.get(part)) is not None and (got := encoder.fingerprint) != expected:
        raise UserError(
            f"the {origin.kind} was trained with the {part} encoder {expected}, but got {got}; pass the weights that "
            "it was trained with"
        )


def _with_weights(config: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """The config of an encoder with another path of its weights."""
    changed = {
        key: _with_weights(value, weights) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    return changed | {"weights": weights} if "weights" in changed else changed


def _with_origin(net: Any, origin: Origin) -> Any:
    # The config identifies a network without parameters.
    net.origin = origin if any(True for _ in net.parameters()) else replace(origin, fingerprint=_digest(origin.network))
    return net


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
