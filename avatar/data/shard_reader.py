"""Reading samples where files may be gone or damaged: named, counted and, if the user so chooses, skipped."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch.utils.data import get_worker_info

from avatar.data.batch_schedule import Draw
from avatar.data.shard_index import Entry, Shard
from avatar.data.shard_samples import READING, Crop, Recipe
from avatar.data.tar import Tars
from avatar.errors import UserError
from avatar.protocols import TextEncoder

ON_ERROR = ("raise", "skip")
MEND = "restore it, or go on without by data.on_error=skip"
SUBSTITUTES = 20  # for one clip of a batch; so many in a row are no accident

log = logging.getLogger(__name__)


class SampleReader:
    """Crops of one split's samples; those that can't be read are named, and counted where all processes see it."""

    def __init__(self, entries: Sequence[Entry], recipe: Recipe, on_error: str, workers: int):
        self.entries, self.recipe, self.on_error = entries, recipe, on_error
        self.tars = Tars()
        # How often each was skipped, by worker (two may count at the same time) and last by this process.
        self.faults = torch.zeros(workers + 1, len(entries), dtype=torch.int32).share_memory_()

    def crop(self, draw: Draw) -> Crop:
        """The crop of a draw.

        With "skip" a sample that can't be read is replaced by another one of its bucket, drawn from (seed, step, place
        in the batch) like everything: batches stay as large, and the same on any number of ranks.

        Raises:
            UserError: with "raise", a sample that can't be read; with "skip", too many in a row.
        """
        for attempt in range(1, SUBSTITUTES + 1):
            try:
                return self.recipe.read(self.tars, self.entries[draw.sample], draw)
            except READING as error:
                fault = format_read_error(self.entries[draw.sample], error)
                if self.on_error == "raise":
                    raise UserError(f"{fault}; {MEND}") from error
                log.warning("skipped %s", fault)
                worker = get_worker_info()
                self.faults[worker.id if worker else -1, draw.sample] += 1
            draw = draw.substitute(attempt)
        raise UserError(f"{SUBSTITUTES} samples in a row can't be read, the last one {fault}; check the set")

    def summary(self) -> str | None:
        """What was skipped so far, if anything was."""
        which = self.faults.sum(0).nonzero().flatten().tolist()
        if not which:
            return None
        names = ", ".join(self.entries[i].key for i in which[:10]) + (" …" if len(which) > 10 else "")
        return f"skipped {int(self.faults.sum())} times what can't be read, of {len(which)} samples: {names}"


def format_read_error(entry: Entry, error: BaseException) -> str:
    """A sample that can't be read, and why, in one line."""
    reason = f"no {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return f"{entry.key} of {entry.shard.path}: {reason}"


def check_shards(shards: Iterable[Shard], on_error: str) -> None:
    """Names the shards that are gone or not as long as they were written, and raises UserError unless skipping."""
    wrong = []
    for shard in sorted(shards, key=lambda shard: shard.path):
        if not shard.path.is_file():
            wrong.append(f"{shard.path} is gone")
        elif (size := shard.path.stat().st_size) != shard.bytes:
            wrong.append(f"{shard.path} has {size} bytes, by its index {shard.bytes}")
    if wrong and on_error == "raise":
        raise UserError(
            f"{'; '.join(wrong[:5])}{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}: restore them, or go on "
            "without what can't be read by data.on_error=skip"
        )
    for line in wrong:
        log.warning("%s: what can't be read of it is skipped", line)


def check_captions(entries: Sequence[Entry], text: TextEncoder) -> None:
    """Raise UserError for the first sample that can't be read or whose caption the text encoder refuses.

    No file is opened of sets whose index tells the captions, or that have this encoder's features of them.
    """
    tars, encoder = Tars(), text.fingerprint
    entries = [entry for entry in entries if entry.shard.text_features != encoder]
    for entry in track(entries, f"looking through {len(entries)} captions", disable=not entries):
        try:
            text.check(_caption(tars, entry) if entry.caption is None else entry.caption)
        except READING as error:
            raise UserError(f"{format_read_error(entry, error)}; {MEND}") from error


def _caption(tars: Tars, entry: Entry) -> str:
    return tars.read(entry.shard.path, entry.key, frozenset(("txt",))).get("txt", b"").decode("utf-8")


def latent_of(entries: Sequence[Entry]) -> Mapping[str, Any] | None:
    """What a set says of its latents, in the first metadata that can be read; None: it has none.

    Raises:
        UserError: nothing can be read.
    """
    fault = ""
    for entry in entries[:SUBSTITUTES]:
        try:
            files = Tars().read(entry.shard.path, entry.key, frozenset(("meta.json",)))
            return json.loads(files["meta.json"])["latent"]
        except READING as error:
            fault = fault or format_read_error(entry, error)
    raise UserError(f"can't read {fault}; restore it")
