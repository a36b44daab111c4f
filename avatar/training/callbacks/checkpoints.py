"""Checkpoints of a run: when they are saved, and atomic files that are read without running pickled code."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from avatar.errors import UserError
from avatar.files import atomic_path, create_folder
from avatar.objectives.distributed import world_size


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with its arguments, except that one failed rank of several saves nothing.

    All ranks take part in saving a checkpoint. If one rank fails, the others are still training, and all would wait for
    each other. After a signal all ranks stop at the same batch (`ExactResume`), and they save.
    """

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if world_size() == 1 or isinstance(exception, KeyboardInterrupt):
            super().on_exception(trainer, module, exception)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO plugin for single files: writes to a temporary file and renames it, loads tensors and plain values.

    If a run is killed while it saves, the previous checkpoint remains intact.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        create_folder(path.parent)
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        if Path(path).is_dir():
            raise UserError(
                f"got {path}, a sharded checkpoint of trainer=fsdp; expected one file: resume it with trainer=fsdp, or "
                "save it with trainer.strategy.save_distributed_checkpoint=false"
            )
        # Memory-mapped, so that all ranks of a machine share one copy.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
