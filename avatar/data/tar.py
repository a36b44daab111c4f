"""Random access to the samples of uncompressed WebDataset tars.

WebDataset's own readers iterate over a shard and shuffle in a buffer, whose position cannot be saved, so that runs
cannot be resumed exactly. Its indexed reader, `wids`, needs an index of its own and reads samples by number; here they
have keys, and a damaged shard loses only its damaged samples. The format is the same: the files of a sample,
`KEY.part`, follow each other, and the part begins after the first dot.
"""

import contextlib
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from avatar.errors import UserError

BLOCK = tarfile.BLOCKSIZE


class TarReader:
    """Reads samples of shards by key; the offsets of a shard's samples are kept after its first read."""

    def __init__(self):
        self._offsets: dict[Path, dict[str, int]] = {}

    def read(self, path: Path, key: str, parts: frozenset[str]) -> dict[str, bytes]:
        """Read those of `parts` that a sample has.

        Raises:
            OSError: the shard is missing.
            UserError: the sample is missing or incomplete.
        """
        with path.open("rb", buffering=0) as file:
            if path not in self._offsets:
                self._offsets[path] = _sample_offsets(file)
            start = self._offsets[path].get(key)
            if start is None:
                raise UserError("the shard does not contain this sample: it is cut off, or another file")
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
                raise UserError(f"the shard is cut off or damaged within the sample ({error})") from error
            return found


def _sample_offsets(file: BinaryIO) -> dict[str, int]:
    """The offset of each sample's first header, up to the first damaged one."""
    offsets: dict[str, int] = {}
    with contextlib.suppress(tarfile.HeaderError):  # reported when a sample after it is read
        for member, at in _members(file, 0):
            offsets.setdefault(member.name.partition(".")[0], at - BLOCK)
    return offsets


def _members(file: BinaryIO, start: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members from the header at `start` on, each with the offset of its content.

    Raises:
        tarfile.HeaderError: a damaged header.
    """
    while True:
        file.seek(start)
        try:
            member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            return
        if member.size < 0:
            raise tarfile.HeaderError("negative size")
        yield member, start + BLOCK
        start += BLOCK + math.ceil(member.size / BLOCK) * BLOCK
