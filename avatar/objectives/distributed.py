"""What makes the parts of a batch, on several ranks or in several passes, equal to the whole.

A batch belongs to all of them together; `Batch.part` says which of its samples are here. What is drawn at random is
drawn for the whole batch, everywhere alike, since all ranks hold the same random state, and each keeps its part. Losses
are means over samples, of which no one's depends on another, so that the mean over parts is that of the whole.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Sampler = Callable[..., Tensor]  # (*shape, device) -> numbers; the first axis is the batch


def sample_globally(sampler: Sampler, part: slice) -> Sampler:
    """A sampler for a part of a batch, whose draws are those that the part has of the whole batch's.

    The whole batch's numbers exist for a moment; they are gone before a network runs.
    """

    def draw(batch: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        numbers = sampler(batch * part.step, *shape, device=device)
        return numbers if part.step == 1 else numbers[part].clone()

    return draw


def local_gradients(module: lightning.LightningModule) -> AbstractContextManager:
    """Backward passes inside leave each rank its own gradients, for `average_gradients` to average."""
    if world_size() == 1:
        return nullcontext()
    strategy = module.trainer.strategy
    assert isinstance(strategy, ParallelStrategy)
    return strategy.block_backward_sync()  # pyright: ignore[reportReturnType]


def average_gradients(net: nn.Module) -> None:
    """Replace gradients by their mean over the ranks. Those of sharded weights are averaged already."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()  # pyright: ignore[reportOptionalMemberAccess]
    for gradient in gradients:
        gradient /= world_size()


def full_tensor(value: Tensor) -> Tensor:
    """A tensor that may be sharded, whole on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that may be sharded, whole and on the CPU of the first rank; of the other ranks, which all have to call
    it, none holds more than one of them at a time."""
    first = world_size() == 1 or dist.get_rank() == 0
    found = {}
    for name, weight in weights.items():
        tensor = full_tensor(weight)
        if first:
            found[name] = tensor.cpu()
    return found


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
