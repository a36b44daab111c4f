"""A run whose losses are no numbers any more ends at once, before it spoils checkpoints and bundles."""

from typing import Any

import lightning


class Finite(lightning.Callback):
    """Looks at every logged loss and gradient norm after each batch. Raises ValueError for NaN and infinity."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train/") and not value.isfinite():
                raise ValueError(
                    f"{name} is {float(value)} at batch {index}; lower the learning rate (objective.optimizer.lr), or "
                    "look at the data"
                )
