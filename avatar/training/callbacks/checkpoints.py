"""Periodic checkpoints of a run, and one when it is interrupted or fails."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from avatar.objectives.distributed import world_size


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with its arguments, except that one failed rank of several saves nothing.

    All ranks take part in saving a checkpoint. If one rank fails, the others are still training, and all would wait for
    each other. After a signal all ranks stop at the same batch (`ExactResume`), and they save.
    """

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if world_size() == 1 or isinstance(exception, KeyboardInterrupt):
            super().on_exception(trainer, module, exception)
