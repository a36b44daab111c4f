"""Atomic files: written under a temporary name in the same folder, then renamed."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatar.errors import FileAccessError, UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise FileAccessError for a system error in the block, such as no permission or a full disk."""
    try:
        yield
    except FileAccessError:
        raise
    except OSError as error:
        raise FileAccessError(
            f"can't write {path} ({error.strerror or error}); free some space there or choose another folder"
        ) from error


def create_folder(path: Path) -> None:
    """Create a folder and its parents, unless it exists. Raises FileAccessError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to `path` when the block ends; removed if it fails.

    Raises FileAccessError for a system error in the block.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically, and create its folder. Raises FileAccessError."""
    create_folder(path.parent)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file atomically, and create its folder. Raises FileAccessError."""
    create_folder(path.parent)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(contiguous, temporary, metadata=dict(metadata or {}))
    except SafetensorError as error:  # for any system error
        raise FileAccessError(
            f"can't write {path} ({error}); free some space there or choose another folder"
        ) from error


def load_tensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Load exactly the tensors of these names. Raises UserError for a damaged file or one with other tensors."""
    fix = f"delete {path}; it is then created again"
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); {fix}") from error
    if tensors.keys() != set(names):
        raise UserError(f"{path} contains {', '.join(sorted(tensors))}; expected {', '.join(sorted(names))}; {fix}")
    return tensors


def short_error(error: BaseException) -> str:
    """Why a library could not read a file, in a few words, without torch's advice to run pickled code."""
    text = " ".join(str(error).split())
    if code := re.search(r"GLOBAL (\S+)", text):
        return f"it contains code: {code[1]}"
    return text[:200]
