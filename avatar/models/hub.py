"""Published weights from a folder or the Hugging Face cache.

Nothing is downloaded, and no code of a repository runs: weights are safetensors, or pickles that contain only tensors.
"""

import pickle
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from avatar.errors import MissingFileError, UserError
from avatar.files import short_error
from avatar.models.bundle import fingerprint

# Weights that only pre-training uses; files often lack them.
UNUSED = {"masked_spec_embed"}
BROKEN = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, KeyError)


class FrozenNetwork(torch.nn.Module):
    """Base class of encoders: a frozen network `net` with published weights."""

    net: Any  # a network of another library

    @cached_property
    def weights_hash(self) -> str:
        """The hash of the weights, independent of their path."""
        return fingerprint(self.net.state_dict())


def folder(weights: str, example: str, parts: str = "") -> Path:
    """The folder of weights.

    Args:
        weights: a path, or a repository's name in the Hugging Face cache.
        example: a repository that the error names if there are no weights.
        parts: the files that are needed, as options of `hf download`.

    Raises:
        MissingFileError: neither exists; the message names the command that downloads them.
    """
    if Path(weights).is_dir():
        return Path(weights)
    try:
        return Path(huggingface_hub.snapshot_download(weights, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        owner, _, name = weights.partition("/")
        named = bool(name) and "/" not in name and not Path(owner).exists()
        quoted = shlex.quote(weights)  # it may come from a file
        command = f"hf download {quoted} {parts}" if named else f"hf download {example} {parts} --local-dir {quoted}"
        raise MissingFileError(
            f"no weights {weights}, neither as a folder nor in the Hugging Face cache; nothing is downloaded "
            f"automatically: download them by {' '.join(command.split())}"
        ) from None


def file(path: Path, weights: str) -> Path:
    """The path of a file of published weights. Raises MissingFileError if it does not exist."""
    if not path.is_file():
        raise MissingFileError(
            f"{weights} has no {path.name} in {path.parent}; download the complete repository by: "
            "hf download NAME --local-dir FOLDER"
        )
    return path


def on(device: torch.device | str, encoder: Any) -> Any:
    """Move an encoder to a device if it has weights."""
    return encoder.to(device) if isinstance(encoder, torch.nn.Module) else encoder


def load(network: Any, path: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """Load a network of transformers, frozen and in eval mode.

    Args:
        network: its class, such as `UMT5EncoderModel`.
        path: folder of config and weights.
        dtype: of the weights; "auto": as stored.

    Raises:
        MissingFileError: no weights.
        UserError: damaged or incomplete weights, or pickles with code.
    """
    file(path / "config.json", str(path))
    try:
        net, report = network.from_pretrained(
            path, local_files_only=True, weights_only=True, output_loading_info=True, dtype=dtype
        )
    except BROKEN as error:
        raise UserError(
            f"{path} has no readable weights of a {network.__name__} ({short_error(error)}); download them again"
        ) from error
    wrong = [name for name in report["missing_keys"] if name.rpartition(".")[2] not in UNUSED]
    wrong += [str(entry) for entry in report["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"{path} lacks {len(wrong)} weights of a {network.__name__}, such as {sorted(wrong)[0]}; pass complete "
            "weights of this class"
        )
    return net.eval().requires_grad_(False)
