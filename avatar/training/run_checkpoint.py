"""Checkpoints of training runs as they lie on disk, looked into without running anything that they may carry.

One file, or a folder with a part of each rank (torch.distributed.checkpoint), whose description and plain values are
pickles that torch reads as they come: here they are first read by readers that know tensors and plain values alone.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from avatar.errors import UserError
from avatar.files import short_error

BESIDE_WEIGHTS = "meta.pt"  # what else a folder holds; written last
AVERAGE = "average."  # before the names of averaged weights, in a folder
# What a folder's description is made of, beside dtypes and the classes of the module that describes it.
_DESCRIBING = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}
_MODULES = {"torch", _DESCRIBING, *(module for module, _ in _KNOWN)}
_BROKEN = (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, TypeError, AttributeError, SafetensorError)


def shapes(path: Path) -> dict[str, torch.Size]:
    """The weights of a checkpoint by their names, as shapes.

    Raises:
        UserError: it is no checkpoint, it isn't whole, or it carries more than tensors and plain values.
        OSError: it isn't there.
    """
    try:
        if path.is_dir():
            return _shapes_of_folder(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return {name: weight.shape for name, weight in state.items()}
    except _BROKEN as error:
        raise UserError(f"{path} is no checkpoint of a training run ({short_error(error)})") from error


def newest(folder: Path) -> Path | None:
    """The checkpoint in a folder that was written last, of those that were written to their ends."""
    written = {path: path / BESIDE_WEIGHTS if path.is_dir() else path for path in folder.glob("*.ckpt")}
    whole = {path: end.stat().st_mtime_ns for path, end in written.items() if end.is_file()}
    return max(whole, key=whole.__getitem__) if whole else None


def _shapes_of_folder(path: Path) -> dict[str, torch.Size]:
    with (path / ".metadata").open("rb") as file:
        described = _Description(file).load()
    torch.load(path / BESIDE_WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    found = {}
    for index, place in described.storage_data.items():
        entry = described.state_dict_metadata[index.fqn]
        if hasattr(entry, "size"):
            found[index.fqn] = entry.size
            continue
        with (path / Path(place.relative_path).name).open("rb") as file:
            file.seek(place.offset)
            torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    prefix = "state_dict."
    return {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix)}


class _Description(pickle.Unpickler):
    """Reads the description of a folder, made of the classes that torch writes it with; refuses any other."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if "." not in name and module in _MODULES else None
        described = isinstance(found, type) and found.__module__ == module == _DESCRIBING
        if (module, name) in _KNOWN or described or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")
