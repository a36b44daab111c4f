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
    """A whole file in UTF-8, or none; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Tensors as a safetensors file, in a folder that is made if need be. Raises OSError if it can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(ready, temporary, metadata=dict(metadata or {}))
    except SafetensorError as error:  # no OSError, whatever the system said
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
