"""Reading of samples from files that can be missing or damaged: errors are reported, or counted and skipped."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch.utils.data import get_worker_info

from avatar.data.batch_schedule import Draw
from avatar.data.shard_batches import Crop
from avatar.data.shard_index import Entry, Shard
from avatar.data.shard_samples import READ_ERRORS, SampleDecoder, read_metadata
from avatar.data.tar import TarReader
from avatar.errors import UserError
from avatar.protocols import TextEncoder

ON_ERROR = ("raise", "skip")
FIX = "restore it, or skip unreadable samples by data.on_error=skip"
MAX_SUBSTITUTES = 20  # for one clip of a batch; more in a row are no coincidence

log = logging.getLogger(__name__)


class SampleReader:
    """Reads crops of one split's samples; unreadable ones are logged, and counted in memory shared by all workers.

    Args:
        entries: the samples.
        decoder: files → crop.
        on_error: "raise" or "skip".
        workers: loader processes that share this reader.
    """

    def __init__(self, entries: Sequence[Entry], decoder: SampleDecoder, on_error: str, workers: int):
        self.entries, self.decoder, self.on_error = entries, decoder, on_error
        self.tars = TarReader()
        # One row of counts per worker, which may count at the same time, and the last one for this process.
        self.faults = torch.zeros(workers + 1, len(entries), dtype=torch.int32).share_memory_()

    def crop(self, draw: Draw) -> Crop:
        """Read the crop of a draw.

        With "skip", an unreadable sample is replaced by another one of its bucket, drawn from (seed, step, slot):
        batches keep their size and are equal on any number of ranks.

        Raises:
            UserError: with "raise", an unreadable sample; with "skip", too many in a row.
        """
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            try:
                return self.decoder.crop(self.tars, self.entries[draw.sample], draw)
            except READ_ERRORS as error:
                fault = format_read_error(self.entries[draw.sample], error)
                if self.on_error == "raise":
                    raise UserError(f"{fault}; {FIX}") from error
                log.warning("skipped %s", fault)
                worker = get_worker_info()
                self.faults[worker.id if worker else -1, draw.sample] += 1
            draw = draw.substitute(attempt)
        raise UserError(f"got {MAX_SUBSTITUTES} unreadable samples in a row, the last one {fault}; check the set")

    def summary(self) -> str | None:
        """A line about the samples that were skipped so far; None if there are none."""
        which = self.faults.sum(0).nonzero().flatten().tolist()
        if not which:
            return None
        names = ", ".join(self.entries[i].key for i in which[:10]) + (" …" if len(which) > 10 else "")
        return f"skipped {len(which)} unreadable samples, {int(self.faults.sum())} times: {names}"


def format_read_error(entry: Entry, error: BaseException) -> str:
    """One line that names an unreadable sample and the reason."""
    reason = f"no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return f"{entry.key} of {entry.shard.path}: {reason}"


def check_shards(shards: Iterable[Shard], on_error: str) -> None:
    """Check that shards exist with the size of their index; raise UserError, or log each if `on_error` is "skip"."""
    wrong = []
    for shard in sorted(shards, key=lambda shard: shard.path):
        if not shard.path.is_file():
            wrong.append(f"{shard.path} is missing")
        elif (size := shard.path.stat().st_size) != shard.bytes:
            wrong.append(f"{shard.path} has {size} bytes; expected {shard.bytes} by its index")
    if wrong and on_error == "raise":
        raise UserError(
            f"{'; '.join(wrong[:5])}{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}: restore them, or skip "
            "unreadable samples by data.on_error=skip"
        )
    for line in wrong:
        log.warning("%s: its unreadable samples are skipped", line)


def check_captions(entries: Sequence[Entry], text: TextEncoder) -> None:
    """Raise UserError for the first sample that is unreadable or whose caption the text encoder rejects.

    Files are opened only for sets without captions in the index and without features of this encoder.
    """
    tars, encoder = TarReader(), text.fingerprint
    entries = [entry for entry in entries if entry.shard.text_features != encoder]
    for entry in track(entries, f"checking {len(entries)} captions", disable=not entries):
        try:
            caption = _read_caption(tars, entry) if entry.caption is None else entry.caption
        except READ_ERRORS as error:
            raise UserError(f"{format_read_error(entry, error)}; {FIX}") from error
        try:
            text.check(caption)
        except UserError as error:
            raise UserError(f"{format_read_error(entry, error)}; {FIX}") from error


def _read_caption(tars: TarReader, entry: Entry) -> str:
    return tars.read(entry.shard.path, entry.key, frozenset(("txt",))).get("txt", b"").decode("utf-8")


def latent_metadata(entries: Sequence[Entry]) -> Mapping[str, Any] | None:
    """The metadata of a set's latents, from its first readable sample; None if it has no latents.

    Raises:
        UserError: no readable sample.
    """
    fault = ""
    for entry in entries[:MAX_SUBSTITUTES]:
        try:
            files = TarReader().read(entry.shard.path, entry.key, frozenset(("meta.json",)))
            return read_metadata(files)["latent"]
        except READ_ERRORS as error:
            fault = fault or format_read_error(entry, error)
    raise UserError(f"can't read {fault}; restore it")
