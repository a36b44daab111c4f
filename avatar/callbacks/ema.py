"""An exponential moving average of the trained network, kept beside it and written into its bundle."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn


class EMA(lightning.Callback):
    """Averages `module.net` after each batch that updated it.

    The decay rises with the updates seen, (1 + n) / (10 + n), up to `decay`: short runs average over their own length.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}; an average needs one in [0, 1)")
        self.decay, self.updates = decay, 0
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.seen = _version(module.net)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.seen == (version := _version(module.net)):
            return  # another network's turn
        self.seen = version
        state = module.net.state_dict()
        if not self.weights:
            self.weights = {name: tensor.clone() for name, tensor in state.items()}
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in state.items():
            average = self.weights[name].to(tensor.device)
            # counters and other integers are copied, not averaged
            self.weights[name] = average.lerp_(tensor, 1 - decay) if tensor.is_floating_point() else tensor.clone()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self.weights = state_dict["updates"], state_dict["weights"]


def _version(net: nn.Module) -> int:
    """A number that grows with every change to the parameters in place."""
    return sum(parameter._version for parameter in net.parameters())
