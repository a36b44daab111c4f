"""Muon for the matrices inside of transformer blocks, AdamW for all other parameters.

Muon orthogonalises the momentum of a matrix (https://kellerjordan.github.io/posts/muon). Its updates are scaled to the
size of AdamW's (arXiv:2502.16982, Eq. 4), so both have one learning rate and one schedule.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from avatar.errors import UserError

HIDDEN = re.compile(r"(^|\.)(blocks|layers)\.\d+\..*weight$")


class MuonAdamW(Optimizer):
    """Muon and AdamW as one optimiser.

        python train.py optim@objective.optimizer=muon

    Args:
        parameters: names and parameters of a network. Muon takes the matrices that HIDDEN matches: weights of the
            linear layers in the blocks of the backbone and of its text embedder.
        lr: learning rate of both.
        betas: of AdamW.
        momentum: of Muon.
        weight_decay: of both.

    Raises:
        UserError: sharded parameters; orthogonalisation needs whole matrices.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        named = list(parameters)
        if any(isinstance(parameter, DTensor) for _, parameter in named):
            raise UserError("got sharded parameters; Muon needs whole matrices: choose optim=adamw or trainer=ddp")
        hidden = [p for name, p in named if p.ndim == 2 and HIDDEN.search(name)]
        others = [p for name, p in named if not (p.ndim == 2 and HIDDEN.search(name))]
        rates: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[Optimizer] = []
        if hidden:
            self.parts.append(torch.optim.Muon(hidden, momentum=momentum, adjust_lr_fn="match_rms_adamw", **rates))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=(betas[0], betas[1]), **rates))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both parts."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Make the parts work on this optimiser's groups and state, which schedules and checkpoints know."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
