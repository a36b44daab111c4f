"""Distributed helpers: any split of a global batch over ranks or micro-batches equals training in one process.

`Batch.shard` are the samples of the global batch that this process has. All ranks have the same random state, so random
numbers are drawn for the global batch everywhere, and each rank keeps its shard of them. Losses are means over samples
that do not depend on each other, so the mean over shards equals that over the global batch.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from avatar.types import Latents

Sampler = Callable[..., Tensor]  # (*shape, device) -> numbers; the first axis is the batch


def sample_globally(sampler: Sampler, shard: slice) -> Sampler:
    """A sampler for a shard of a batch that draws for the global batch and returns the numbers of the shard."""

    def draw(batch: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        numbers = sampler(batch * shard.step, *shape, device=device)
        return numbers if shard.step == 1 else numbers[shard].clone()

    return draw


def noise_like(x: Latents, shard: slice) -> Latents:
    """Gaussian noise in the shape of the latents of a shard, drawn for the global batch."""
    return sample_globally(torch.randn, shard)(*x.shape, device=x.device)


def local_gradients(module: lightning.LightningModule) -> AbstractContextManager:
    """Context in which backward passes do not average gradients over ranks; `average_gradients` does it later."""
    if world_size() == 1:
        return nullcontext()
    strategy = module.trainer.strategy
    assert isinstance(strategy, ParallelStrategy)
    return strategy.block_backward_sync()  # pyright: ignore[reportReturnType]


def average_gradients(net: nn.Module) -> None:
    """Average gradients over the ranks; FSDP has averaged those of sharded weights already."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()  # pyright: ignore[reportOptionalMemberAccess]
    for gradient in gradients:
        gradient /= world_size()


def full_tensor(value: Tensor) -> Tensor:
    """Gather a tensor that may be sharded, on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather weights that may be sharded, on the CPU of rank 0; all ranks must call it.

    The other ranks return an empty dict and have at most one full weight in memory at a time.
    """
    first = world_size() == 1 or dist.get_rank() == 0
    found = {}
    for name, weight in weights.items():
        tensor = full_tensor(weight)
        if first:
            found[name] = tensor.cpu()
    return found


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
