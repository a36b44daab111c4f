"""Checkpoints under a final name are always whole, and hold nothing but tensors and plain values."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from avatar.errors import UserError
from avatar.files import atomic_path, create_folder, writing


class WholeFiles(TorchCheckpointIO):
    """Writes beside the file and renames, so that a run that is killed while it saves leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        create_folder(path.parent)
        with writing(path), atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        if Path(path).is_dir():
            raise UserError(
                f"{path} was saved in parts by trainer=fsdp, which resumes it; another strategy needs one file of all "
                "weights, saved with trainer.strategy.save_distributed_checkpoint=false"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # once for all ranks of a machine
