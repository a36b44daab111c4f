"""Alternating optimisation: n updates of a critic, then one of the generator, each over accumulated micro-batches."""

from dataclasses import dataclass
from typing import Any

import lightning
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.objectives.distributed import average_gradients, full_tensor, local_gradients


@dataclass(frozen=True)
class Alternation:
    """Which network a micro-batch updates, and when its gradients are applied.

    Args:
        critic_steps: critic updates per generator update.
        accumulate: micro-batches per update of either.
        clip: bound of the norm of an update's gradient.
    """

    critic_steps: int
    accumulate: int
    clip: float

    def __post_init__(self):
        if self.critic_steps < 1 or self.accumulate < 1:
            raise UserError(
                f"got critic_steps={self.critic_steps}, accumulate={self.accumulate}; expected at least 1 each"
            )

    def updates_generator(self, index: int) -> bool:
        """Whether micro-batch `index` belongs to an update of the generator."""
        return index // self.accumulate % (self.critic_steps + 1) == self.critic_steps

    def backward(
        self, module: lightning.LightningModule, optimizer: Any, net: nn.Module, loss: Tensor, index: int
    ) -> Tensor | None:
        """Accumulate a micro-batch's gradient; after the last one of an update, step and return the gradient norm."""
        # DDP averages during one backward pass through one graph, but a replayed rollout has many.
        with local_gradients(module):
            module.manual_backward(loss / self.accumulate)
        if (index + 1) % self.accumulate:
            return None
        average_gradients(net)
        norm = full_tensor(nn.utils.clip_grad_norm_(net.parameters(), self.clip))
        optimizer.step()
        optimizer.zero_grad()
        return norm
