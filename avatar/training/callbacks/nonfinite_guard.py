"""Losses and gradients that are no numbers any more never reach weights, checkpoints and bundles."""

import logging
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from avatar.errors import UserError
from avatar.files import atomic_path, create_folder

log = logging.getLogger(__name__)


class NonFiniteGuard(lightning.Callback):
    """Looks at every loss and gradient before they are used; what it finds is logged, with the keys of the batch, and
    the batch is written to `folder` as `updates{n}_rank{r}_{pass}.pt` (a dict of tensors: `torch.load` with
    `weights_only`).

    Args:
        skips: updates in a row that may be left out; 0 stops the run at the first.

    Raises:
        UserError: NaN or infinity once more than that, on all ranks at the same update.
    """

    def __init__(self, folder: str, skips: int = 0):
        if skips < 0:
            raise UserError(f"skips={skips}; wanted a number of updates, 0 or more")
        self.folder, self.skips, self.skipped = Path(folder), skips, 0
        self.batches: list[Any] = []  # of the update under way
        self.lost: str | None = None  # what its losses were, if no numbers

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        if not loss.isfinite():
            self.lost = f"a loss is {loss.item()}"

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm(weight.grad for weight in weights if weight.grad is not None)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        found = self.lost or (None if norm.isfinite() else f"the norm of gradients is {norm.item()}")
        batches, self.batches, self.lost = self.batches, [], None
        if not trainer.strategy.reduce_boolean_decision(found is not None, all=False):
            self.skipped = 0
            return
        found = f"{found or 'a loss of another rank is no number'} after {trainer.global_step} updates"
        keys = ", ".join(key for batch in batches for key in batch.keys)
        log.error("%s, on %s: see %s", found, keys, self._dump(batches, trainer.global_step, trainer.global_rank))
        if self.skipped == self.skips:
            trainer.strategy.barrier()  # the first rank to raise ends all, of which some may still be writing
            raise UserError(
                f"{found}; lower the learning rate (objective.optimizer.lr), or look at the data: its batch is in "
                f"{self.folder} (callbacks.nonfinite_guard.skips=N leaves out up to N such updates in a row)"
            )
        self.skipped += 1
        optimizer.zero_grad()  # weights without gradients are left as they are, and so is what is known of them

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _dump(self, batches: list[Any], updates: int, rank: int) -> str:
        create_folder(self.folder)
        paths = [self.folder / f"updates{updates}_rank{rank}_{n}.pt" for n in range(len(batches))]
        for path, batch in zip(paths, batches, strict=True):
            with atomic_path(path) as temporary:
                torch.save(_plain(batch), temporary)
        return ", ".join(map(str, paths))


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, so that what is saved can be read by anything."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return value.cpu() if isinstance(value, Tensor) else value
