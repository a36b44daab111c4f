"""Muon for the matrices inside of transformer blocks, AdamW for all other parameters.

Muon orthogonalises the momentum of a matrix (https://kellerjordan.github.io/posts/muon). Its updates are scaled to the
size of AdamW's (arXiv:2502.16982, Eq. 4), so both have one learning rate and one schedule.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from avatar.errors import UserError
from avatar.objectives.distributed import world_size

HIDDEN = re.compile(r"(^|\.)(blocks|layers)\.\d+\..*weight$")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵ in the Newton–Schulz iteration


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
            self.parts.append(Muon(hidden, momentum=momentum, **rates))
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


class Muon(torch.optim.Muon):
    """torch's Muon, whose ranks orthogonalise a share of the matrices each, on the CPU in fp32.

    torch's own orthogonalises all of them on every rank and in bf16, which takes CPUs without instructions for it tens
    of times as long as fp32.

    Args:
        parameters: matrices, the same on all ranks.
        lr: learning rate, of updates with the root mean square of AdamW's.
        momentum: of the moving average of gradients, with Nesterov's correction.
        weight_decay: per update, times the learning rate.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all matrices that have a gradient; all ranks must call it."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            directions = orthogonalise_over_ranks([self._update_momentum(p, group["momentum"]) for p in trained])
            for p, direction in zip(trained, directions, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.to(p.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
        return loss

    def _update_momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Update the momentum of a matrix and return Nesterov's direction."""
        assert p.grad is not None
        average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonalise_over_ranks(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise matrices that are the same on all ranks, each on one of them, and gather all on every rank."""
    ranks = world_size()
    if ranks == 1 or not matrices:
        return [orthogonalised(matrix) for matrix in matrices]
    rank = dist.get_rank()
    found = [orthogonalised(m) if n % ranks == rank else torch.zeros_like(m) for n, m in enumerate(matrices)]
    flat = torch.cat([matrix.flatten().to(matrices[0].dtype) for matrix in found])
    dist.all_reduce(flat)  # a sum with zeros, so every rank has the same bits
    parts = flat.split([matrix.numel() for matrix in matrices])
    return [part.view_as(matrix) for part, matrix in zip(parts, matrices, strict=True)]


def orthogonalised(matrix: Float[Tensor, "m n"], steps: int = 5) -> Float[Tensor, "m n"]:
    """A matrix with the same singular vectors, and singular values near 1: Newton–Schulz iteration.

    Args:
        matrix: in any precision; the result is bf16 on CUDA devices, else fp32.
        steps: iterations.
    """
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
