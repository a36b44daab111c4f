"""Tensors in files that others published: folders of safetensors with an index, single files, pickles without code."""

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
PARTS = ("generator_ema", "generator")  # of a .pt file, the better one first


@dataclass(frozen=True)
class Published:
    """Tensors by name, read when they are asked for."""

    path: Path
    read: Mapping[str, Callable[[], Tensor]]


def opened(path: Path) -> Published:
    """The tensors of a folder or file. Raises OSError or ValueError for what can't be read, and for code in pickles."""
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise MissingFileError(f"no weights at {path}; give a folder of safetensors, a .safetensors or a .pt file")
    if path.suffix == ".safetensors":
        return Published(path, {name: _reader(path, name) for name in _names(path)})
    try:
        # What torch wrote before 1.6 is no archive, and can't be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is no file of tensors alone ({short_error(error)}); files that carry code are refused"
        ) from error
    held = _described(state)
    if isinstance(state, Mapping):
        state = next((state[part] for part in PARTS if part in state), state)
    if not _is_named_tensors(state):
        raise UserError(
            f"{path} holds {held}; wanted tensors by their names, or {' or '.join(PARTS)} with such: save the "
            "network's state_dict alone"
        )
    tensors = {WRAPPERS.sub("", name).lstrip(".").removeprefix("model."): tensor for name, tensor in state.items()}
    return Published(path, {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()})


def _is_named_tensors(state: object) -> bool:
    if not isinstance(state, Mapping) or not state:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())


def _described(state: object) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    return f"{', '.join(map(str, list(state)[:4]))}{', …' if len(state) > 4 else ''}" if state else "nothing"


def _folder(path: Path) -> Published:
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if not indices:
        if len(files) != 1:
            raise UserError(
                f"{path} has {len(files)} .safetensors files and no index; give the folder that holds the transformer "
                "with its *.safetensors.index.json, or one file"
            )
        return opened(files[0])
    try:
        places = json.loads(indices[0].read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{indices[0]} is no index of safetensors ({error}); copy it again") from error
    missing = sorted({file for file in places.values() if not (path / file).is_file()})
    if missing:
        raise MissingFileError(f"{path} lacks {', '.join(missing)}, which its index names; copy it again")
    held = {file: set(_names(path / file)) for file in sorted(set(places.values()))}
    if lost := [name for name, file in places.items() if name not in held[file]]:
        raise UserError(f"{lost[0]} isn't in {places[lost[0]]}, where the index has it; copy {path} again")
    return Published(path, {name: _reader(path / file, name) for name, file in places.items()})


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); copy it again") from error


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    # Opened anew for each tensor: pages of an open file stay mapped, and a whole file would count as memory.
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read
