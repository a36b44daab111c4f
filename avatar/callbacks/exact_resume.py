"""Resuming where a run stopped: the random state and the position in the data travel with the checkpoint."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning
import torch


class ExactResume(lightning.Callback):
    """Saves torch's random state and the number of batches seen; a resumed run draws what the first would have drawn.

    Ctrl-C is heard between two batches, so that none is left half done; a second one stops at once, and then the batch
    under way is drawn again as it was.

    The data module must start its batches at `start`, with a loader as long as the whole run's: Lightning counts on
    from the batches seen. Of the callbacks this is to be the first.
    """

    def __init__(self):
        self.batches = 0
        self.random: dict[str, Any] | None = None  # to be restored
        self.before: dict[str, Any] | None = None  # what the batch under way began with
        self.asked = False  # to stop

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.data = trainer.datamodule  # checkpoints are read after this, and loaders made later still
        self.here = threading.current_thread() is threading.main_thread()  # signals are the main thread's
        if self.here:
            self.handler = signal.signal(signal.SIGINT, self._ask)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        if self.here:
            signal.signal(signal.SIGINT, self.handler)

    def on_train_batch_start(self, *_: Any) -> None:
        # Restored as late as here, since building loaders and sanity checks draw numbers too.
        if self.random is not None:
            torch.set_rng_state(self.random["cpu"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(self.random["cuda"])
            self.random = None
        if self.asked:
            raise KeyboardInterrupt
        self.before = _random_state()

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1
        self.before = None

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "random": self.before or _random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.random = state_dict["batches"], state_dict["random"]
        self.data.start = self.batches

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this batch; Ctrl-C again stops at once", file=sys.stderr)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
