"""Rollout plan: chunks, denoising timesteps, update rule and attention window of a causal student."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from avatar.diffusion import path
from avatar.errors import UserError
from avatar.nn.masks import MaskSpec
from avatar.types import Latents, Times

DrawNoise = Callable[[], Latents]


def renoised(x_t: Latents, x0: Latents, t: Times, r: Times, draw: DrawNoise) -> Latents:
    """Predicted clean latents with fresh noise at r: multistep consistency sampling (arXiv:2303.01469, Alg. 1)."""
    return path.noised(x0, draw(), r)


def euler_step(x_t: Latents, x0: Latents, t: Times, r: Times, draw: DrawNoise) -> Latents:
    """One Euler step of the probability-flow ODE from time t to r, along the velocity that the prediction implies."""
    return path.step(x_t, path.velocity_towards(x_t, x0, t), t, r)


CONTEXTS = ("clean", "merged", "noisy")
UPDATES = {"renoise": renoised, "euler": euler_step}


@dataclass(frozen=True)
class Plan:
    """The rollout plan: chunks, denoising timesteps, update rule and attention window of a causal student.

        plan = Plan(times=(1.0, 0.75), chunk=2, first_chunk=1, window=8)
        plan.chunks(6)  # (1, 2, 2, 1)

    Args:
        times: timesteps at which each chunk is denoised, decreasing from 1.
        chunk, first_chunk: latents per chunk; a short first chunk lowers the latency of the first frame.
        window: latents that a chunk attends to, its own included.
        context: how a finished chunk becomes context: clean, merged or noisy (`avatar.diffusion.rollout`).
        update: from one timestep to the next: renoise (consistency models) or euler (ODE students).
        guidance: scale of the labels' guidance, for students that take one as an input (guidance distillation).

    Raises:
        UserError: sizes below 1, a window shorter than a chunk, timesteps that do not decrease from 1, unknown names,
            a negative guidance scale.
    """

    times: Sequence[float] = (1.0, 0.9375, 0.833, 0.625)
    chunk: int = 2
    first_chunk: int = 1
    window: int = 8
    context: str = "clean"
    update: str = "renoise"
    guidance: int | float | None = None

    def __post_init__(self):
        lengths = {"chunk": self.chunk, "first_chunk": self.first_chunk, "window": self.window}
        for name, value in lengths.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"got {name}={value!r}; expected an integer number of latents: change it")
        if (
            not isinstance(self.times, Sequence)
            or isinstance(self.times, str)
            or not all(isinstance(t, int | float) for t in self.times)
        ):
            raise UserError(f"got times={self.times!r}; expected a list of numbers, such as [1.0, 0.75]")
        object.__setattr__(self, "times", tuple(self.times))
        if (
            not self.times
            or self.times[0] != 1.0
            or any(b >= a or b <= 0 for a, b in zip(self.times, self.times[1:], strict=False))
        ):
            raise UserError(f"got times={self.times}; expected numbers that start at 1 and decrease, above 0")
        if min(self.chunk, self.first_chunk) < 1 or self.window < max(self.chunk, self.first_chunk):
            raise UserError(
                f"got chunks of {self.first_chunk}, then {self.chunk} latents in a window of {self.window}; "
                "expected chunks of at least one latent and a window that is no shorter than a chunk"
            )
        if not isinstance(self.context, str) or self.context not in CONTEXTS:
            raise UserError(f"got context={self.context!r}; choose one of {', '.join(CONTEXTS)}")
        if not isinstance(self.update, str) or self.update not in UPDATES:
            raise UserError(f"got update={self.update!r}; choose {' or '.join(UPDATES)}")
        if self.guidance is not None and not (isinstance(self.guidance, int | float) and 0 <= self.guidance < math.inf):
            raise UserError(f"got guidance={self.guidance!r}; expected a number of at least 0, or null for none")

    def check_trainable(self) -> None:
        """Raise UserError for a plan whose context pass has no teacher-forcing mask."""
        if self.context == "noisy":
            raise UserError("a plan with noisy context can be streamed, not trained; train with clean or merged")

    def chunks(self, latents: int) -> tuple[int, ...]:
        """The lengths of the chunks of a clip of `latents` latents; the last one may be shorter."""
        lengths = [min(self.first_chunk, latents)]
        while (left := latents - sum(lengths)) > 0:
            lengths.append(min(self.chunk, left))
        return tuple(lengths)

    def spec(self, latents: int) -> MaskSpec:
        """The teacher-forcing mask with the same attention as this rollout."""
        return MaskSpec(self.chunks(latents), self.window, "clean_noisy")


def plan_of(trained: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Plan:
    """The plan that a student was trained for, as recorded in its bundle (untrusted), with some fields changed.

    Raises:
        UserError: an unknown field, an invalid value, or no guidance scale for a student that was trained with one.
    """
    known, given = [f.name for f in fields(Plan)], {**(trained or {}), **changes}
    if unknown := sorted(given.keys() - set(known)):
        raise UserError(f"got plan.{', plan.'.join(unknown)}; expected one of {', '.join(known)}")
    plan = Plan(**given)
    if plan.guidance is None and (trained or {}).get("guidance") is not None:
        raise UserError(
            "got plan.guidance=null for a student that takes a guidance scale; give a number or leave it out"
        )
    return plan
