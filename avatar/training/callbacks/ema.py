"""Exponential moving average (EMA) of the trained network's weights, which is exported in its bundle."""

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, distribute_tensor

from avatar.errors import UserError
from avatar.objectives.distributed import gather_state_dict
from avatar.training.run_checkpoint import AVERAGE


class EMA(lightning.Callback):
    """Averages the weights of `module.net` after each batch that has updated it.

    The decay after n updates is min(decay, (1 + n) / (10 + n)), so short runs average over their own length. If the
    network is sharded, each rank averages its shards.

    Args:
        decay: the largest decay, in [0, 1).

    Raises:
        UserError: a decay outside of [0, 1).
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise UserError(f"decay={decay}; expected a number in [0, 1): set callbacks.ema.decay")
        self.decay, self.updates = decay, 0
        self.weights: dict[str, Tensor] = {}
        self.updated = False  # whether the current batch has updated `module.net`

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        own = set(module.net.parameters())
        learned = [weight for group in optimizer.param_groups for weight in group["params"] if weight in own]
        self.updated |= any(weight.grad is not None for weight in learned)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if not self.updated:
            return  # the batch has updated another network, such as the critic
        self.updated = False
        state = module.net.state_dict()
        if not self.weights:
            self.weights = {name: tensor.clone() for name, tensor in state.items()}
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in state.items():
            average = self.weights[name] = self.weights[name].to(tensor.device)
            if tensor.is_floating_point():
                _local(average).lerp_(_local(tensor), 1 - decay)
            else:
                average.copy_(tensor)  # counters and other integers are copied, not averaged

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if any(isinstance(weight, DTensor) for weight in checkpoint["state_dict"].values()):
            checkpoint["state_dict"] |= {AVERAGE + name: weight for name, weight in self.weights.items()}
        else:
            checkpoint["average"] = gather_state_dict(self.weights)

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if not checkpoint["callbacks"][self.state_key]["updates"]:
            return
        state = module.net.state_dict()
        if "average" in checkpoint:
            self.weights = {name: _like(state[name], weight) for name, weight in checkpoint["average"].items()}
        else:
            empty = {AVERAGE + name: torch.empty_like(weight) for name, weight in state.items()}
            load({"state_dict": empty}, checkpoint_id=trainer.ckpt_path)
            self.weights = {name: empty[AVERAGE + name] for name in state}


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a tensor; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(own: Tensor, weight: Tensor) -> Tensor:
    """A full tensor, sharded like the network's own."""
    return distribute_tensor(weight, own.device_mesh, own.placements) if isinstance(own, DTensor) else weight
