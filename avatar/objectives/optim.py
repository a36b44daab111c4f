"""Optimisation shared by the objectives: trainable parameters, learning-rate schedules, optimiser with schedule."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from avatar.errors import UserError

Schedule = Callable[[int], float]  # update -> factor of the learning rate


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warm-up, a plateau, and linear decay of the learning rate.

    Args:
        steps: updates of the run.
        warmup: share of the run over which the factor rises from 1 % to 1.
        decay_from: share of the run after which the factor falls.
        final: factor at the end of the run.

    Raises:
        UserError: shares outside [0, 1), or a final factor outside [0, 1].
    """

    steps: int
    warmup: float = 0.05
    decay_from: float = 0.5
    final: float = 0.1

    def __post_init__(self):
        if not (0 <= self.warmup < 1 and 0 <= self.decay_from < 1 and 0 <= self.final <= 1):
            raise UserError(
                f"got lr_schedule.warmup={self.warmup}, decay_from={self.decay_from}, final={self.final}; expected "
                "shares of the run in [0, 1) and a final factor in [0, 1]"
            )

    def __call__(self, step: int) -> float:
        done = step / max(self.steps, 1)
        rise = min(1.0, done / self.warmup + 1e-2) if self.warmup else 1.0
        slope = (1 - self.final) / (1 - self.decay_from)
        return rise * (1.0 if done < self.decay_from else max(self.final, 1 - slope * (done - self.decay_from)))


@dataclass(frozen=True)
class Constant:
    """The same learning rate at every update."""

    def __call__(self, step: int) -> float:
        return 1.0


def trainable_parameters(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of a network that are not frozen."""
    return [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]


def with_schedule(optimizer: Optimizer, schedule: Schedule) -> dict:
    """An optimiser and its learning-rate schedule, as Lightning takes them; one schedule step per update."""
    # A closure: LambdaLR saves the fields of callable objects, and a resumed run would restore the schedule's settings.
    rates = LambdaLR(optimizer, lambda step: schedule(step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}
