"""Bundles on disk: one safetensors file holds a stage's weights and, in its header, all that is needed to use them.

A network knows where it comes from: `origin_of(net)` gives the config it was built from, the hash of the weights it was
loaded with and the components that they belong to: the autoencoder of its latents, and encoders that have weights.
Where the weights of an encoder lie is a machine's business: what they are is compared, not their path, unless nothing
but the path is known, as of published weights.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from avatar.errors import MissingFileError, UserError
from avatar.files import save_tensors
from avatar.types import Bundle

FORMAT = 1
ENCODERS = ("audio", "text", "image")  # that a trained network needs beside itself
KINDS = ("autoencoder", "teacher", "causal_teacher", "student")


@dataclass(frozen=True)
class Origin:
    """Where a network comes from."""

    config: Mapping[str, Any]  # `network`; of a trained one also `audio`, `text` and `image`, its encoders
    kind: str = "new"
    fingerprint: str = "untrained"
    components: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None

    @property
    def network(self) -> Mapping[str, Any]:
        """`_target_` and constructor arguments."""
        return self.config["network"]

    def build_encoder(self, part: str, weights: str | None = None) -> Any:
        """An encoder of the config, "audio", "text" or "image", built; the last is None for most networks.

        `weights` say where its weights lie, if elsewhere than then.

        Raises:
            MissingFileError: there are no weights.
            UserError: they aren't those that the network was trained with, or there are none to give.
        """
        if (config := self.config.get(part)) is None:
            if weights is not None:
                raise UserError(f"weights.{part}={weights}, for a {self.kind} without {part} encoder; leave it out")
            return None
        if weights is not None:
            if has_no_weights(config):
                raise UserError(f"weights.{part}={weights}, for {config['_target_']}, which has none; leave it out")
            config = _with_weights(config, weights)
        try:
            encoder = _instantiated(config)
        except InstantiationException as error:
            if isinstance(cause := error.__cause__, FileNotFoundError):
                raise MissingFileError(f"{cause}; or say where they lie here: weights.{part}=FOLDER") from error
            raise
        _check_same(self, part, encoder)
        return encoder


def new(network: Any) -> Any:
    """A network with fresh weights from its config, `_target_` and constructor arguments."""
    config = OmegaConf.to_container(network, resolve=True) if OmegaConf.is_config(network) else network
    return _built(Origin({"network": config}))


def load(path: str, kinds: Sequence[str] = KINDS) -> Any:
    """The network of a bundle, in fp32; a bundle of another kind than these is refused.

    Weights that are stored in fp32 are mapped: they are memory that all processes of a machine and all networks of the
    file share, until they are written to or moved.
    """
    bundle = read(Path(path))
    if bundle.kind not in kinds:
        raise UserError(
            f"{path} holds a bundle of kind {bundle.kind!r}; wanted {' or '.join(kinds)}: choose another file"
        )
    name = fingerprint(bundle.weights)
    if bundle.kind == "autoencoder":  # another's latents, decoded: it is that one for all who use them
        name = bundle.components.get("autoencoder", name)
    origin = Origin(bundle.config, bundle.kind, name, bundle.components, bundle.plan)
    # What wraps another library's network may need numbers while it is made; and autoencoders are small.
    with nullcontext() if bundle.kind == "autoencoder" else torch.device("meta"):
        net = _built(origin)
    expected = net.state_dict()
    if wrong := state_dict_mismatches(expected, bundle.weights):
        raise UserError(f"{path} does not fit its own config: {'; '.join(wrong[:8])}; make the bundle anew")
    net.load_state_dict({name: w.to(expected[name].dtype) for name, w in bundle.weights.items()}, assign=True)
    return net.eval()


def origin_of(net: nn.Module) -> Origin:
    """Where a network that `new` or `load` made comes from."""
    origin = net.origin
    assert isinstance(origin, Origin)
    return origin


def read(path: Path) -> Bundle:
    """A bundle as stored. Raises FileNotFoundError or ValueError for what isn't one."""
    if not path.is_file():
        raise MissingFileError(f"no bundle at {path}; give the path of a .safetensors file that a stage wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("avatar", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); copy or make it again") from error
    if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
        raise UserError(f"{path} has no header of this project (format {FORMAT}); give a file that a stage wrote")
    whole = header.keys() == {"kind", "config", "components", "plan"} and isinstance(header["config"], dict)
    if not whole or "network" not in header["config"]:
        raise UserError(f"{path} has a damaged header, with {', '.join(header)}; make the bundle anew")
    return Bundle(weights=weights, **header)


def write(bundle: Bundle, path: Path) -> None:
    """Store a bundle, under a temporary name first. Raises UserError for weights that are no numbers."""
    if broken := [name for name, weight in bundle.weights.items() if not weight.isfinite().all()]:
        raise UserError(f"{broken[0]} isn't finite; {path} is not written: check the run's losses and its precision")
    header = {name: getattr(bundle, name) for name in ("kind", "config", "components", "plan")} | {"format": FORMAT}
    save_tensors(bundle.weights, path, {"avatar": json.dumps(header, sort_keys=True)})


def state_dict_mismatches(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unknown or of another shape among the weights of a network, each by its name."""
    wrong = [f"missing {name}" for name in wanted.keys() - got.keys()]
    wrong += [f"unknown {name}" for name in got.keys() - wanted.keys()]
    wrong += [
        f"{name} is {tuple(got[name].shape)}, wanted {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in got and got[name].shape != tensor.shape
    ]
    return sorted(wrong)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_latents(net: nn.Module, autoencoder: nn.Module) -> None:
    """Refuse a network that was trained on another autoencoder's latents."""
    wanted, got = origin_of(net).components.get("autoencoder"), origin_of(autoencoder).fingerprint
    if wanted is not None and wanted != got:
        raise UserError(
            f"the {origin_of(net).kind} was trained on latents of autoencoder {wanted}, but got autoencoder {got}; "
            "pass the autoencoder it was trained with"
        )


def check_encoders(net: nn.Module, config: Mapping[str, Any], encoders: Mapping[str, Any]) -> None:
    """Refuse a network whose encoders ("audio", "text", "image") aren't those here, built from `config`.

    Weights that are known, by training, are compared wherever they lie; of all others the config says all, their place
    too.
    """
    origin = origin_of(net)
    for part, encoder in encoders.items():
        if part in origin.components:
            _check_same(origin, part, encoder)
        elif part in origin.config and origin.config[part] != config.get(part):
            raise UserError(
                f"the {origin.kind} was made for {part} from {origin.config[part]}, but got {config.get(part)}; pass "
                f"the {part} encoder it was made for, or convert published weights anew with this one"
            )


def encoder_fingerprints(encoders: Mapping[str, Any]) -> dict[str, str]:
    """Of encoders with weights, what tells them from others wherever these lie; of all others, the config says all."""
    return {part: repr(encoder) for part, encoder in encoders.items() if isinstance(encoder, nn.Module)}


def has_no_weights(config: Mapping[str, Any] | None) -> bool:
    """Whether this is the config of an encoder, and of one that needs no weights."""
    return config is not None and _with_weights(config, "") == _with_weights(config, "elsewhere")


def _check_same(origin: Origin, part: str, encoder: Any) -> None:
    if (wanted := origin.components.get(part)) is not None and (got := repr(encoder)) != wanted:
        raise UserError(
            f"the {origin.kind} was trained with {part} by {wanted}, but these weights make {got}; give those that it "
            "was trained with"
        )


def _with_weights(config: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """The config of an encoder with another place of its weights."""
    moved = {
        key: _with_weights(value, weights) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    return moved | {"weights": weights} if "weights" in moved else moved


def _built(origin: Origin) -> Any:
    net = _instantiated(origin.network)
    # A network without weights of its own is known by its config.
    net.origin = origin if any(True for _ in net.parameters()) else replace(origin, fingerprint=_digest(origin.network))
    return net


def _instantiated(config: Mapping[str, Any]) -> Any:
    _check_targets(config)
    return hydra.utils.instantiate(config, _convert_="all")


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _check_targets(config: Any) -> None:
    """A bundle may come from anywhere: it shall build classes that this project defines, and call nothing else."""
    if isinstance(config, list | tuple):
        for value in config:
            _check_targets(value)
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if key.startswith("_") and not (key == "_target_" and _is_ours(value)):
            raise UserError(f"a bundle's config with {key}: {value!r}; only classes of this package are built")
        _check_targets(value)


def _is_ours(target: Any) -> bool:
    if not isinstance(target, str) or not target.startswith("avatar."):
        return False
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and found.__module__.startswith("avatar.")
