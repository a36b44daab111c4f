"""When the checkpoints of a run are saved: every so many updates, and when it ends before its time."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from avatar.objectives.distributed import world_size


class Checkpoints(ModelCheckpoint):
    """Lightning's, and its arguments; of several ranks, one that fails alone saves nothing.

    All ranks have a hand in a checkpoint, and those that didn't fail are elsewhere: they would wait for each other. A
    signal stops them together (`ExactResume`), and then they save.
    """

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if world_size() == 1 or isinstance(exception, KeyboardInterrupt):
            super().on_exception(trainer, module, exception)
