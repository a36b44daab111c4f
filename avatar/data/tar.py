"""Samples out of uncompressed tars, by their place: nothing of a shard is read but what is asked for.

WebDataset's own readers go through a shard from its first byte to its last and shuffle what passes by; where such a
stream stands can't be saved, so it can't be resumed exactly. The format is the same: a sample's files stand together,
`KEY.part`, and the part begins after the first dot.
"""

import contextlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from avatar.errors import UserError

BLOCK = tarfile.BLOCKSIZE


class Tars:
    """Reads samples; remembers where those of a shard begin, once one of them was read."""

    def __init__(self):
        self._places: dict[Path, dict[str, int]] = {}

    def read(self, path: Path, key: str, parts: frozenset[str]) -> dict[str, bytes]:
        """Those of a sample's parts that it has.

        Raises:
            OSError, ValueError: a shard that is gone, or ends before or within the sample.
        """
        with path.open("rb", buffering=0) as file:
            if path not in self._places:
                self._places[path] = _places(file)
            start = self._places[path].get(key)
            if start is None:
                raise UserError("it isn't in its shard, which is cut off or another one")
            found = {}
            try:
                for member, at in _members(file, start):
                    name, _, part = member.name.partition(".")
                    if name != key:
                        break
                    if part in parts:
                        file.seek(at)
                        found[part] = file.read(member.size)
            except tarfile.HeaderError as error:
                raise UserError(f"its shard is cut off or damaged within the sample ({error})") from error
            return found


def _places(file: BinaryIO) -> dict[str, int]:
    """Where each sample's first header stands, as far as there are any."""
    places: dict[str, int] = {}
    with contextlib.suppress(tarfile.HeaderError):  # found again by whoever reads what stands there
        for member, at in _members(file, 0):
            places.setdefault(member.name.partition(".")[0], at - BLOCK)
    return places


def _members(file: BinaryIO, start: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Members and where their contents begin, from a header to the end of the archive.

    Raises:
        tarfile.HeaderError: no header where one should be.
    """
    while True:
        file.seek(start)
        try:
            member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            return
        yield member, start + BLOCK
        start += BLOCK + -(-member.size // BLOCK) * BLOCK
