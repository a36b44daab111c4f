"""Lazy tensor files: safetensors folders with an index, single .safetensors files, and .pt pickles without code.

weights = open_weights(Path("Wan2.1-T2V-1.3B-Diffusers/transformer"))
bias = weights.read["proj_out.bias"]()
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from avatar.errors import MissingFileError, UserError
from avatar.files import short_error

WRAPPERS = re.compile(r"(^|\.)(module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
PARTS = ("generator_ema", "generator")  # entries of a .pt file, by preference


@dataclass(frozen=True)
class LazyTensors:
    """Named tensors that are read from their files on demand: `read[name]()`."""

    path: Path
    read: Mapping[str, Callable[[], Tensor]]


def open_weights(path: Path) -> LazyTensors:
    """Open the tensors of a folder or file without reading them; only names are checked.

    Args:
        path: a folder with an index or one .safetensors file; a .safetensors file; or a .pt file of a state dict, also
            under `generator_ema` or `generator` (Self-Forcing, CausVid). Wrapper prefixes (FSDP, torch.compile,
            `model.`) are removed from the names of a .pt file.

    Raises:
        MissingFileError: no such path, or a shard of the index is missing.
        UserError: a damaged file, or a pickle that contains anything but named tensors.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise MissingFileError(f"no weights at {path}; expected a folder of safetensors, a .safetensors or a .pt file")
    if path.suffix == ".safetensors":
        return LazyTensors(path, {name: _reader(path, name) for name in _names(path)})
    try:
        # Files of torch < 1.6 are not zip archives and can't be memory-mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a file of tensors only ({short_error(error)}); files that contain code are rejected: save "
            "the network's state_dict"
        ) from error
    content = _describe(state)
    if isinstance(state, Mapping):
        state = next((state[part] for part in PARTS if part in state), state)
    if not _is_named_tensors(state):
        raise UserError(
            f"{path} contains {content}; expected a state dict, or one under {' or '.join(PARTS)}; save the network's "
            "state_dict only"
        )
    tensors = {WRAPPERS.sub("", name).lstrip(".").removeprefix("model."): tensor for name, tensor in state.items()}
    return LazyTensors(path, {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()})


def _is_named_tensors(state: object) -> bool:
    if not isinstance(state, Mapping) or not state:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())


def _describe(state: object) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    return f"{', '.join(map(str, list(state)[:4]))}{', …' if len(state) > 4 else ''}" if state else "nothing"


def _folder(path: Path) -> LazyTensors:
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if not indices:
        if len(files) != 1:
            raise UserError(
                f"{path} has {len(files)} .safetensors files and no index; expected the transformer's folder with its "
                "*.safetensors.index.json, or one file"
            )
        return open_weights(files[0])
    try:
        file_of = json.loads(indices[0].read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{indices[0]} is not a safetensors index ({error}); download it again") from error
    missing = sorted({file for file in file_of.values() if not (path / file).is_file()})
    if missing:
        raise MissingFileError(f"{path} lacks {', '.join(missing)}, listed in its index; download it again")
    names = {file: set(_names(path / file)) for file in sorted(set(file_of.values()))}
    if lost := [name for name, file in file_of.items() if name not in names[file]]:
        raise UserError(f"{lost[0]} isn't in {file_of[lost[0]]}, where the index lists it; download {path} again")
    return LazyTensors(path, {name: _reader(path / file, name) for name, file in file_of.items()})


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download it again") from error


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    # Reopened for each tensor: pages of an open file stay mapped, and the full file would count as memory.
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read
