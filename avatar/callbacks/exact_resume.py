"""Resuming where a run stopped: the random state and the position in the data travel with the checkpoint."""

from typing import Any

import lightning
import torch


class ExactResume(lightning.Callback):
    """Saves torch's random state and the number of batches seen; a resumed run draws what the first would have drawn.

    The data module must start its batches at `start`, with a loader as long as the whole run's: Lightning counts on
    from the batches seen.
    """

    def __init__(self):
        self.batches = 0
        self.random: dict[str, Any] | None = None

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.data = trainer.datamodule  # checkpoints are read after this, and loaders made later still

    def on_train_batch_start(self, *_: Any) -> None:
        # Restored as late as here, since building loaders and sanity checks draw numbers too.
        if self.random is not None:
            torch.set_rng_state(self.random["cpu"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(self.random["cuda"])
            self.random = None

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"batches": self.batches, "random": {"cpu": torch.get_rng_state(), "cuda": cuda}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.random = state_dict["batches"], state_dict["random"]
        self.data.start = self.batches
