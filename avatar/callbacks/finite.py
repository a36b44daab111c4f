"""A run whose losses are no numbers any more ends at once, before it spoils weights, checkpoints and bundles."""

from typing import Any

import lightning
import torch
from torch import Tensor


class Finite(lightning.Callback):
    """Looks at every loss and gradient before they are used. Raises ValueError for NaN and infinity."""

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        _check("a loss", loss, trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm(weight.grad for weight in weights if weight.grad is not None)
        _check("the norm of gradients", norm, trainer.global_step)


def _check(what: str, value: Tensor, step: int) -> None:
    if not value.isfinite():
        raise ValueError(
            f"{what} is {value.item()} after {step} updates; lower the learning rate (objective.optimizer.lr), or look "
            "at the data"
        )
