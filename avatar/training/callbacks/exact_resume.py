"""Resuming where a run stopped: random states, the position in the data, and stopping where nothing is half done."""

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

# What asks a run to stop: Ctrl-C; `kill`, or a scheduler that wants its machine back; SLURM's warning (--signal).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class ExactResume(lightning.Callback):
    """Saves every rank's random state and the number of passes made; a resumed run draws what the first would have.

    A signal is heard before the next batch, by all ranks at the same one, so that none is left half done: the run ends
    with KeyboardInterrupt, whose argument is the signal, and other callbacks save. A second signal stops at once;
    then a run on one rank makes the batch under way again as it was, and one on several has what was saved before.

    A batch that is accumulated over several passes draws the same numbers in each of them, of which every pass uses
    its part. Of what is saved in the midst of a batch, the passes since its beginning count as not made.

    The data module must start its passes at `start`, with a loader as long as the whole run's, for Lightning counts on
    from the passes seen; `accumulate` of them make a batch. Of the callbacks this is to be the first.
    """

    def __init__(self):
        self.initial = torch.get_rng_state()
        self.passes = 0
        self.random: list[dict[str, Any]] | None = None  # to be restored, one of each rank
        self.before: dict[str, Any] | None = None  # what the batch under way began with
        self.asked = 0  # the signal to stop
        self.handlers: dict[int, Any] = {}

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        # Lightning has seeded anew where there are several processes, which would draw other numbers than one.
        torch.set_rng_state(self.initial)
        self.data = trainer.datamodule  # checkpoints are read after this, and loaders made later still
        self._hear(signal.SIGINT)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for number in SIGNALS:  # only now: Lightning has set handlers that act in the midst of a batch
            self._hear(number)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        # Restored as late as here, since building loaders and sanity checks draw numbers too.
        if self.random is not None:
            _restore(self.random[dist.get_rank() if len(self.random) == world_size() > 1 else 0])
            self.random = None
        if self.passes % self.data.accumulate:
            assert self.before is not None
            _restore(self.before)
            return
        if trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False):
            raise KeyboardInterrupt(self.asked or signal.SIGTERM)
        self.before = _random_state()

    def on_train_batch_end(self, *_: Any) -> None:
        self.passes += 1
        if self.passes % self.data.accumulate == 0:
            self.before = None

    def state_dict(self) -> dict[str, Any]:
        own = self.before or _random_state()
        states = [own] * world_size()
        if world_size() > 1:
            dist.all_gather_object(states, own)
        return {"passes": self._whole, "random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.passes, self.random = state_dict["passes"], state_dict["random"]
        self.data.start = self.passes

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if self._whole != self.passes:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update(dict.fromkeys(counts, self._whole))

    @property
    def _whole(self) -> int:
        """Passes up to the end of the last batch that is whole."""
        return self.passes - self.passes % self.data.accumulate

    def _hear(self, number: int) -> None:
        if threading.current_thread() is threading.main_thread():  # signals are the main thread's
            before = signal.signal(number, self._ask)
            self.handlers.setdefault(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and world_size() > 1:
            os._exit(128 + number)  # the ranks stand at different places, and would wait for each other
        if self.asked:
            raise KeyboardInterrupt(number)
        self.asked = number
        print(f"{signal.Signals(number).name}: stopping after this batch; again stops at once", file=sys.stderr)


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
