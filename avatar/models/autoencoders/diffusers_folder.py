"""Networks from a folder in diffusers' layout, strictly: its config is understood, every weight has its place."""

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from avatar.errors import MissingFileError, UserError
from avatar.models import bundle, hub

Net = TypeVar("Net", bound=ModelMixin)
Wrapper = TypeVar("Wrapper", bound=nn.Module)


def read(kind: type[Net], weights: str, subfolder: str | None, example: str) -> Net:
    """A network of this class, in fp32; nothing is downloaded.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache.
        subfolder: of it, such as `vae` of a whole pipeline; None: the folder itself.
        example: a repository that would do, to name where there is nothing.

    Raises:
        OSError: nothing is there; the message names the command that gets it.
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


def wrapped(
    wrapper: type[Wrapper], kind: type[ModelMixin], weights: str, subfolder: str | None, example: str
) -> Wrapper:
    """The wrapper of a network that is read, ready for use: known by its config and by the hash of its weights.

    Arguments and errors are those of `read`. The wrapper takes a network by `_take`, in place of its own `__init__`,
    which makes one from a config.
    """
    net: Any = read(kind, weights, subfolder, example)
    made: Any = wrapper.__new__(wrapper)
    nn.Module.__init__(made)
    made._take(net)
    config = {name: value for name, value in net.config.items() if not name.startswith("_")}
    network = {"_target_": f"{wrapper.__module__}.{wrapper.__qualname__}", "config": config}
    made.origin = bundle.Origin({"network": network}, "autoencoder", bundle.fingerprint(made.state_dict()))
    return made.eval()


def _folder(weights: str, subfolder: str | None, example: str) -> Path:
    if subfolder is None:
        return hub.folder(weights, example)
    try:
        return hub.folder(weights, example) / subfolder
    except FileNotFoundError as error:  # whose last words are the command, for a repository of which this is a part
        raise MissingFileError(f"{error} --include '{subfolder}/*'") from None


def _config(kind: type[ModelMixin], file: Path) -> dict[str, Any]:
    """The constructor arguments in a config file; those of another class or release are refused."""
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); download it again") from error
    made = config.get("_class_name") if isinstance(config, dict) else None
    if made != kind.__name__:
        raise UserError(f"{file} is of a {made}, wanted a {kind.__name__}; give the folder of one")
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(config.keys() - inspect.signature(kind).parameters.keys()):
        raise UserError(f"{file} has {', '.join(unknown)}, which this diffusers doesn't know; install a newer one")
    return config
