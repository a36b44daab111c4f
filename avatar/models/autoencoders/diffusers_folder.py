"""Autoencoders from a folder in diffusers' layout, read strictly: unknown settings and weights are errors."""

import inspect
import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from avatar.errors import MissingFileError, UserError
from avatar.models import bundle, hub, registry

Net = TypeVar("Net", bound=ModelMixin)
Wrapper = TypeVar("Wrapper", bound="FromDiffusers")


class FromDiffusers:
    """Mixin of autoencoders that wrap a network of diffusers.

    A class sets `diffusers_class` and `example`, a repository on the Hugging Face hub with such a network. Its method
    `_take` moves the layers of a network of diffusers to the wrapper.
    """

    diffusers_class: ClassVar[type[ModelMixin]]
    example: ClassVar[str]

    @classmethod
    def pretrained(cls: type[Wrapper], weights: str, subfolder: str | None = "vae") -> Wrapper:
        """Load published weights, in eval mode; for arguments and errors see `read`."""
        net: Any = read(cls.diffusers_class, weights, subfolder, cls.example)
        wrapper: Any = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._take(net)
        config = {name: value for name, value in net.config.items() if not name.startswith("_")}
        network = registry.registered({"_target_": f"{cls.__module__}.{cls.__qualname__}", "config": config})
        wrapper.origin = bundle.Origin({"network": network}, "autoencoder", bundle.fingerprint(wrapper.state_dict()))
        return wrapper.eval()


def read(kind: type[Net], weights: str, subfolder: str | None, example: str) -> Net:
    """Read a network of diffusers, in fp32; nothing is downloaded.

    Args:
        kind: the class of the network.
        weights: a folder, or a repository's name in the Hugging Face cache.
        subfolder: subfolder of it, such as `vae` in a pipeline's folder; None: the folder itself.
        example: a repository that the error names if there are no weights.

    Raises:
        MissingFileError: no weights; the message names the command that downloads them.
        UserError: another class, a damaged file, weights missing, unknown or of other shapes.
    """
    folder = _folder(weights, subfolder, example)
    config = _config(kind, hub.file(folder / "config.json", weights))
    file = hub.file(folder / "diffusion_pytorch_model.safetensors", weights)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); download it again") from error
    with torch.device("meta"):
        net = kind(**config)
    if wrong := bundle.state_dict_mismatches(net.state_dict(), tensors):
        raise UserError(f"{file} does not fit its own config: {'; '.join(wrong[:8])}; download both again")
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return net


def _folder(weights: str, subfolder: str | None, example: str) -> Path:
    if subfolder is None:
        return hub.folder(weights, example)
    try:
        return hub.folder(weights, example) / subfolder
    except FileNotFoundError as error:  # its message ends with the download command
        raise MissingFileError(f"{error} --include '{subfolder}/*'") from None


def _config(kind: type[ModelMixin], file: Path) -> dict[str, Any]:
    """Read the constructor arguments in a config file; those of another class or release are rejected."""
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != kind.__name__:
        raise UserError(f"{file} is the config of {name}; expected {kind.__name__}: pass the folder of one")
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(config.keys() - inspect.signature(kind).parameters.keys()):
        raise UserError(
            f"{file} has {', '.join(unknown)}, unknown to the installed version of diffusers; install a newer one"
        )
    return config
