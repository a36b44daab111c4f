"""Clip samplers: conditioning → clean latents, bidirectionally (a teacher) or by causal rollout (a student)."""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from avatar.diffusion.guidance import Guidance
from avatar.diffusion.packing import Bidirectional, guided_velocity
from avatar.diffusion.plan import Plan
from avatar.diffusion.rollout import Noise, generate
from avatar.diffusion.samplers import euler, heun
from avatar.diffusion.timesteps import schedule
from avatar.errors import UserError
from avatar.protocols import Denoiser
from avatar.types import Conditioning, Latents, Times

SOLVERS = {"euler": euler, "heun": heun}


@runtime_checkable
class ClipSampler(Protocol):
    """Interface of samplers: conditioning → clean latents; equal seeds give equal clips."""

    def __call__(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...]) -> Latents: ...


@dataclass(frozen=True)
class BidirectionalSampler:
    """Sampler of a bidirectional network: integrates the guided probability-flow ODE over the full clip.

    A clip longer than `window` is generated in windows of that length, each with the reference as its sink, so that a
    teacher of short clips can be scored on longer ones. Consecutive windows share no latents.

    Args:
        steps: number of solver steps.
        shift: of the timesteps towards noise; 1: evenly spaced.
        guidance: scales of classifier-free guidance.
        solver: euler or heun.
        window: latents per window.

    Raises:
        UserError: a number below 1, or an unknown solver.
    """

    steps: int = 20
    shift: float = 1.0
    guidance: Guidance = field(default_factory=Guidance)
    solver: str = "euler"
    window: int = 8

    def __post_init__(self):
        if self.steps < 1 or self.window < 1:
            raise UserError(f"got steps={self.steps}, window={self.window}; expected at least 1 each: raise them")
        if self.solver not in SOLVERS:
            raise UserError(f"got solver={self.solver!r}; choose one of {', '.join(SOLVERS)}")

    @torch.no_grad()
    def __call__(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...]) -> Latents:
        starts = range(0, cond.latents, self.window)
        windows = [self._generate_window(net, self._at(cond, start), seeds, start) for start in starts]
        return torch.cat(windows, dim=2)

    def _at(self, cond: Conditioning, start: int) -> Conditioning:
        part = cond.at(slice(start, start + self.window))
        if cond.concat_latents is None:
            return part
        # These channels encode the distance from the reference, which is the sink of each window.
        return replace(part, concat_latents=cond.concat_latents[:, :, : part.latents])

    def _generate_window(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...], start: int) -> Latents:
        x = Noise(seeds)(cond.reference.expand(-1, -1, cond.latents, -1, -1), start, 0)

        def velocity(x: Latents, t: Times) -> Latents:
            return guided_velocity(net, Bidirectional(), x, t, cond, x, self.guidance)

        return SOLVERS[self.solver](velocity, x, schedule(self.steps, self.shift))


@dataclass(frozen=True)
class RolloutSampler:
    """Sampler of a causal student: the rollout of a plan."""

    plan: Plan

    @torch.no_grad()
    def __call__(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...]) -> Latents:
        return generate(net, cond, self.plan, Noise(seeds)).latents
