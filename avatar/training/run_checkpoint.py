"""Safe inspection of checkpoints of training runs: the shapes of their weights, without running pickled code.

A checkpoint is one file, or a folder with the shards of each rank (torch.distributed.checkpoint). The metadata and the
plain values of a folder are pickles, which torch loads without restrictions. Here they are first read by a restricted
unpickler, which accepts tensors and plain values only.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from avatar.errors import UserError
from avatar.files import short_error

META_FILE = "meta.pt"  # the file of a folder that contains everything but weights; written last
AVERAGE = "average."  # prefix of the names of averaged weights in a folder
# Globals that the metadata of a folder may name, in addition to dtypes and the classes of torch's metadata module.
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}
_MODULES = {"torch", _METADATA_MODULE, *(module for module, _ in _ALLOWED)}
_READ_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    EOFError,
    TypeError,
    ValueError,
    AttributeError,
    SafetensorError,
)


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """Read the shapes of a checkpoint's weights, by name.

    Raises:
        UserError: the path is not a checkpoint, is incomplete, or contains more than tensors and plain values.
        OSError: the path does not exist.
    """
    try:
        if path.is_dir():
            return _read_shapes_of_folder(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return {name: weight.shape for name, weight in state.items()}
    except _READ_ERRORS as error:
        raise UserError(f"{path} is not a checkpoint of a training run ({short_error(error)})") from error


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    last_files = {path: path / META_FILE if path.is_dir() else path for path in folder.glob("*.ckpt")}
    complete = {path: file.stat().st_mtime_ns for path, file in last_files.items() if file.is_file()}
    return max(complete, key=complete.__getitem__) if complete else None


def _read_shapes_of_folder(path: Path) -> dict[str, torch.Size]:
    with (path / ".metadata").open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    torch.load(path / META_FILE, map_location="cpu", weights_only=True, mmap=True)
    found = {}
    for index, location in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        # The types, not their attributes: torch runs the pickles of all entries but tensors.
        if type(entry) is TensorStorageMetadata and type(entry.size) is torch.Size:
            found[index.fqn] = entry.size
            continue
        with (path / _file_name(location)).open("rb") as file:
            file.seek(location.offset)
            torch.load(io.BytesIO(file.read(location.length)), weights_only=True)
    prefix = "state_dict."
    return {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix)}


def _file_name(location: Any) -> str:
    """The file of a value, which must be in the checkpoint's folder and stored as it is: torch reads the same bytes."""
    name = location.relative_path
    if type(location) is not _StorageInfo or location.transform_descriptors or Path(name).name != name:
        raise pickle.UnpicklingError(f"it stores a value in {name!r}, outside of its folder or transformed")
    return name


class _MetadataUnpickler(pickle._Unpickler):
    """Restricted unpickler of a folder's metadata: accepts the classes that torch writes there, rejects all others.

    In Python, since the unpickler in C has no hook for BUILD, which could set attributes of an allowed class.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if "." not in name and module in _MODULES else None
        is_metadata = isinstance(found, type) and found.__module__ == module == _METADATA_MODULE
        if (module, name) in _ALLOWED or is_metadata or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed")

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):  # pyright: ignore[reportAttributeAccessIssue]
            raise pickle.UnpicklingError("it sets attributes of a class, which is not allowed")
        super().load_build()  # pyright: ignore[reportAttributeAccessIssue]

    dispatch[pickle.BUILD[0]] = load_build
