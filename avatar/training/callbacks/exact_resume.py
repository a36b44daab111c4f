"""Bit-exact resume: saves RNG states and the position in the data, and stops on signals at a batch boundary."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning
import torch
import torch.distributed as dist

from avatar.objectives.distributed import world_size

# Ctrl-C; `kill` or a scheduler's preemption; SLURM's warning (--signal).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class ExactResume(lightning.Callback):
    """Saves the RNG state of each rank and the number of micro-batches; a resumed run draws the same random numbers.

    Signals are handled before the next batch, on all ranks at the same one, so that no batch remains unfinished: the
    run ends with KeyboardInterrupt, whose argument is the signal, and other callbacks save. A second signal stops at
    once. Then a run on one rank saves too, and repeats the unfinished batch when it is resumed; a run on several ranks
    resumes from its last checkpoint.

    Each micro-batch of a batch draws the same numbers, for the global batch, and uses its shard. In a checkpoint that
    is saved within a batch, the micro-batches since its beginning do not count.

    The data module must start with micro-batch `start`, and its loader must have the length of the full run, because
    Lightning continues to count from there; `accumulate` micro-batches are one batch. This callback must be the first.
    """

    def __init__(self):
        self.initial = torch.get_rng_state()
        self.micro_batches = 0  # finished ones
        self.saved: list[dict[str, Any]] | None = None  # RNG states of all ranks, still to be restored
        self.before: dict[str, Any] | None = None  # RNG state at the beginning of the current batch
        self.received = 0  # the signal
        self.handlers: dict[int, Any] = {}  # the previous handlers

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        # With several processes Lightning seeds again; they must draw the same numbers as one process.
        torch.set_rng_state(self.initial)
        self.data = trainer.datamodule  # a checkpoint is loaded after this, and loaders are created after that
        self._install_handler(signal.SIGINT)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for number in SIGNALS:  # not earlier: these replace Lightning's handlers, which stop within a batch
            self._install_handler(number)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        # Restored only here, since building loaders and sanity checks draw numbers too.
        if self.saved is not None:
            _restore(self.saved[dist.get_rank() if len(self.saved) == world_size() > 1 else 0])
            self.saved = None
        if self.micro_batches % self.data.accumulate:
            assert self.before is not None
            _restore(self.before)
            return
        if trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            raise KeyboardInterrupt(self.received or signal.SIGTERM)
        self.before = _random_state()

    def on_train_batch_end(self, *_: Any) -> None:
        self.micro_batches += 1
        if self.micro_batches % self.data.accumulate == 0:
            self.before = None

    def state_dict(self) -> dict[str, Any]:
        own = self.before or _random_state()
        states = [own] * world_size()
        if world_size() > 1:
            dist.all_gather_object(states, own)
        return {"micro_batches": self._in_complete_batches, "random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.micro_batches, self.saved = state_dict["micro_batches"], state_dict["random"]
        self.data.start = self.micro_batches

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if self._in_complete_batches != self.micro_batches:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update(dict.fromkeys(counts, self._in_complete_batches))

    @property
    def _in_complete_batches(self) -> int:
        """Micro-batches of the complete batches."""
        return self.micro_batches - self.micro_batches % self.data.accumulate

    def _install_handler(self, number: int) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it in the main thread only
            previous = signal.signal(number, self._handle)
            self.handlers.setdefault(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and world_size() > 1:
            os._exit(128 + number)  # the ranks are at different points and would wait for each other
        if self.received:
            raise KeyboardInterrupt(number)
        self.received = number
        name = signal.Signals(number).name
        print(f"{name}: stopping after this batch; a second signal stops at once", file=sys.stderr)


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
