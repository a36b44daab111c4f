"""Guard against NaN and infinite losses and gradients, before the optimiser step."""

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
    """Checks every loss and the norm of the gradients; skips the update or stops the run if one is not finite.

    The value and the keys of the batch are logged, and the batch is saved in `folder` as
    `updates{n}_rank{r}_{micro-batch}.pt` (a dict of tensors, to be read by `torch.load` with `weights_only`).

    Args:
        folder: where the batches of such updates are saved.
        skips: consecutive updates that may be skipped; 0 stops the run at the first.

    Raises:
        UserError: more consecutive updates with NaN or infinity than `skips`; on all ranks at the same update.
    """

    def __init__(self, folder: str, skips: int = 0):
        if skips < 0:
            raise UserError(f"skips={skips}; expected 0 or more updates: set callbacks.nonfinite_guard.skips")
        self.folder, self.skips, self.skipped = Path(folder), skips, 0
        self.batches: list[Any] = []  # micro-batches of the current update
        self.bad_loss: str | None = None  # describes its loss if that is NaN or infinite

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        if not loss.isfinite():
            self.bad_loss = f"a loss is {loss.item()}"

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm(weight.grad for weight in weights if weight.grad is not None)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        found = self.bad_loss or (None if norm.isfinite() else f"the norm of gradients is {norm.item()}")
        batches, self.batches, self.bad_loss = self.batches, [], None
        if not trainer.strategy.reduce_boolean_decision(found is not None, all=False):
            self.skipped = 0
            return
        found = f"{found or 'a loss of another rank is not finite'} after {trainer.global_step} updates"
        keys = ", ".join(key for batch in batches for key in batch.keys)
        log.error("%s, on %s: see %s", found, keys, self._dump(batches, trainer.global_step, trainer.global_rank))
        if self.skipped == self.skips:
            trainer.strategy.barrier()  # the first rank to raise ends all ranks, and some may still be writing
            raise UserError(
                f"{found}; lower the learning rate (objective.optimizer.lr), or check the data: the batch is in "
                f"{self.folder} (callbacks.nonfinite_guard.skips=N skips up to N consecutive updates like this)"
            )
        self.skipped += 1
        optimizer.zero_grad()  # the step then changes neither weights nor their optimiser states

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
    """Dataclasses as dicts, slices as lists and tensors on the CPU, which torch.load reads with `weights_only`."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return value.cpu() if isinstance(value, Tensor) else value
