"""Files under a final name are always whole: written beside it under another name, then renamed."""

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
    """A temporary name beside `path` to write to, which takes the name of `path` when the block ends; nothing is left
    if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a complete file in UTF-8, or none, and create its folder. Raises FileAccessError."""
    create_folder(path.parent)
    with writing(path), atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, and create its folder. Raises FileAccessError."""
    create_folder(path.parent)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with writing(path), atomic_path(path) as temporary:
            save_file(ready, temporary, metadata=dict(metadata or {}))
    except SafetensorError as error:  # for any system error
        raise FileAccessError(
            f"can't write {path} ({error}); free some space there or choose another folder"
        ) from error


def load_tensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of these names, all that a file made here holds. Raises UserError for a damaged or another file."""
    mend = f"delete {path}, and it is made anew"
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); {mend}") from error
    if tensors.keys() != set(names):
        raise UserError(f"{path} has {', '.join(sorted(tensors))}, wanted {', '.join(sorted(names))}; {mend}")
    return tensors


def short_error(error: BaseException) -> str:
    """Why a library couldn't read a file, in few words: torch's own advise to run what pickles carry."""
    text = " ".join(str(error).split())
    if carried := re.search(r"GLOBAL (\S+)", text):
        return f"it carries code: {carried[1]}"
    return text[:200]
