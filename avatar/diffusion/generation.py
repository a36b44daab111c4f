"""Two ways to make a clip from its conditioning: the whole at once (a teacher), or chunk by chunk (a student)."""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from avatar.diffusion.guidance import Guidance
from avatar.diffusion.packing import Bidirectional, guided_velocity
from avatar.diffusion.rollout import Noise, Plan, generate
from avatar.diffusion.samplers import euler, heun
from avatar.diffusion.timesteps import schedule
from avatar.errors import UserError
from avatar.protocols import Denoiser
from avatar.types import Conditioning, Latents, Times

SOLVERS = {"euler": euler, "heun": heun}


@runtime_checkable
class Generator(Protocol):
    """Conditioning in, clean latents out; the same seeds give the same clip."""

    def __call__(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...]) -> Latents: ...


@dataclass(frozen=True)
class WholeClip:
    """The teacher's way: integrate the guided ODE over the whole clip.

    Clips longer than `window` are made in windows of that length, each with the reference as its sink; that is how a
    teacher of short clips is scored on longer ones. Consecutive windows share no latents.
    """

    steps: int = 20
    shift: float = 1.0
    guidance: Guidance = field(default_factory=Guidance)
    solver: str = "euler"
    window: int = 8

    def __post_init__(self):
        if self.steps < 1 or self.window < 1:
            raise UserError(f"{self.steps} steps over windows of {self.window} latents; give at least one of each")
        if self.solver not in SOLVERS:
            raise UserError(f"solver {self.solver!r}; choose one of {', '.join(SOLVERS)}")

    @torch.no_grad()
    def __call__(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...]) -> Latents:
        starts = range(0, cond.latents, self.window)
        parts = [self._window(net, self._at(cond, start), seeds, start) for start in starts]
        return torch.cat(parts, dim=2)

    def _at(self, cond: Conditioning, start: int) -> Conditioning:
        part = cond.at(slice(start, start + self.window))
        # More channels tell how far the reference is, which stands before each window.
        return (
            part
            if cond.concat_latents is None
            else replace(part, concat_latents=cond.concat_latents[:, :, : part.latents])
        )

    def _window(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...], start: int) -> Latents:
        x = Noise(seeds)(cond.reference.expand(-1, -1, cond.latents, -1, -1), start, 0)

        def field_(x: Latents, t: Times) -> Latents:
            return guided_velocity(net, Bidirectional(), x, t, cond, x, self.guidance)

        return SOLVERS[self.solver](field_, x, schedule(self.steps, self.shift))


@dataclass(frozen=True)
class ChunkByChunk:
    """The student's way: the rollout of its plan."""

    plan: Plan

    @torch.no_grad()
    def __call__(self, net: Denoiser, cond: Conditioning, seeds: tuple[int, ...]) -> Latents:
        return generate(net, cond, self.plan, Noise(seeds)).latents
