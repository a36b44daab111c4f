"""Causal rollout: a student generates a clip chunk by chunk. Distillation and streaming share this code.

A chunk starts as noise at t = 1. At each timestep of the plan the network predicts the clean latents, and the plan's
update moves the chunk to the next timestep. The clean chunk then becomes context, in one of three ways:

    clean    one more forward pass over it, at t = 0, writes the keys and values that later chunks attend to
    merged   the same pass, batched with the next chunk's first pass
    noisy    no such pass: the keys and values of its last denoising pass stay in the cache

Noise is indexed by (seed, latent, step), so that how a stream is cut into chunks or calls never changes a draw.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from avatar.diffusion import path
from avatar.errors import UserError
from avatar.nn.kv_cache import Cache, PrefixCache
from avatar.nn.masks import MaskSpec
from avatar.protocols import Denoiser, View
from avatar.types import Conditioning, Latents, Times, join

DrawNoise = Callable[[], Latents]


def renoised(x_t: Latents, x0: Latents, t: Times, r: Times, draw: DrawNoise) -> Latents:
    """Predicted clean latents with fresh noise at r: multistep consistency sampling (arXiv:2303.01469, Alg. 1)."""
    return path.noised(x0, draw(), r)


def euler_step(x_t: Latents, x0: Latents, t: Times, r: Times, draw: DrawNoise) -> Latents:
    """One Euler step of the probability-flow ODE from time t to r, along the velocity that the prediction implies."""
    return path.step(x_t, path.velocity_towards(x_t, x0, t), t, r)


UPDATES = {"renoise": renoised, "euler": euler_step}


@dataclass(frozen=True)
class Plan:
    """The rollout plan: chunks, denoising timesteps, update rule and attention window of a causal student.

    Args:
        times: timesteps at which each chunk is denoised, decreasing from 1.
        chunk, first_chunk: latents per chunk; a short first chunk lowers the latency of the first frame.
        window: latents that a chunk attends to, its own included.
        context: how a finished chunk becomes context: clean, merged or noisy (see the module).
        update: from one timestep to the next: renoise (consistency models) or euler (ODE students).

    Raises:
        UserError: sizes below 1, a window shorter than a chunk, timesteps that do not decrease from 1, unknown names.

    Example:
        >>> Plan(times=(1.0, 0.75), chunk=2, first_chunk=1, window=8).chunks(6)
        (1, 2, 2, 1)
    """

    times: Sequence[float] = (1.0, 0.9375, 0.833, 0.625)
    chunk: int = 2
    first_chunk: int = 1
    window: int = 8
    context: str = "clean"
    update: str = "renoise"

    def __post_init__(self):
        lengths = {"chunk": self.chunk, "first_chunk": self.first_chunk, "window": self.window}
        for name, value in lengths.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"got {name}={value!r}; expected an integer number of latents: change it")
        if not isinstance(self.times, Sequence) or not all(isinstance(t, int | float) for t in self.times):
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
        if self.context not in ("clean", "merged", "noisy"):
            raise UserError(f"got context={self.context!r}; choose clean, merged or noisy")
        if self.update not in UPDATES:
            raise UserError(f"got update={self.update!r}; choose {' or '.join(UPDATES)}")

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
    """The plan that a student was trained for, as recorded in its bundle, with some fields changed."""
    known = [f.name for f in fields(Plan)]
    if unknown := sorted(set(changes) - set(known)):
        raise UserError(f"got plan.{', plan.'.join(unknown)}; expected one of {', '.join(known)}")
    return Plan(**{**{name: value for name, value in (trained or {}).items() if name in known}, **changes})


@dataclass(frozen=True)
class Noise:
    """Counter-based Gaussian noise: a function of (seed, latent, step), with one seed per sample.

    Drawn on the CPU, so that every device gives the same draws.
    """

    seeds: tuple[int, ...]

    def __call__(self, like: Latents, start: int, step: int) -> Latents:
        """Noise in the shape of `like`, whose first latent has the position `start` on the timeline."""
        frame = (like.shape[1], *like.shape[3:])
        draws = [[self._draw(seed, start + i, step, frame) for i in range(like.shape[2])] for seed in self.seeds]
        return torch.stack([torch.stack(row, dim=1) for row in draws]).to(like)

    def _draw(self, seed: int, latent: int, step: int, frame: tuple[int, ...]) -> Tensor:
        digest = blake2b(f"{seed} {latent} {step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        return torch.randn(frame, generator=generator)


def chunk_step(net: Denoiser, x_t: Latents, t: float, cond: Conditioning, view: View) -> Latents:
    """One forward pass over a chunk at time t: the clean latents that the network predicts."""
    times = x_t.new_full((x_t.shape[0], x_t.shape[2]), t)
    return path.clean(x_t, net(x_t, times, cond, view), times)


@dataclass(frozen=True)
class ExitStep:
    """The last denoising pass of a chunk, with the inputs that are needed to rerun it against the same prefix."""

    x_t: Latents
    t: float
    cond: Conditioning
    positions: range

    def rerun(self, net: Denoiser, cache: Cache) -> Latents:
        """Predict the same clean latents from a read-only prefix; with gradients, one chunk of a replayed rollout."""
        view = cache.view(self.positions, [self.positions.stop] * len(self.positions))
        return chunk_step(net, self.x_t, self.t, self.cond, view)


class Rollout:
    """A generation in progress: `prime` it with the reference once, then generate chunk after chunk.

    Args:
        net: the causal student.
        plan: chunks, timesteps, update rule and window.
        cache: keys and values of the context: `RingCache` to stream, `PrefixCache` to train.
        noise: the source of all noise.
        gradient: which passes gradients flow through, where enabled. `exit_step`: only the last denoising pass of each
            chunk. `history`: also the context passes of earlier chunks (with a cache that does not detach).

    Raises:
        UserError: an unknown gradient policy.

    Example:
        >>> rollout = Rollout(net, plan, cache, Noise((0,))).prime(cond)
        >>> latents = rollout.chunk(cond.at(slice(0, plan.first_chunk)))
    """

    def __init__(self, net: Denoiser, plan: Plan, cache: Cache, noise: Noise, gradient: str = "exit_step"):
        if gradient not in ("exit_step", "history"):
            raise UserError(f"got gradient={gradient!r}; choose exit_step or history")
        self.net, self.plan, self.cache, self.noise, self.gradient = net, plan, cache, noise, gradient
        self.position = 0
        self.pending_context: tuple[Latents, Conditioning] | None = None  # a chunk without its context pass yet
        self.last: ExitStep | None = None

    def prime(self, cond: Conditioning) -> "Rollout":
        """Cache the reference as the sink; during a stream, replace it for the chunks that follow."""
        if self.pending_context is not None:
            self._cache_context()  # the pending chunk was generated with the old reference
        view = self.cache.prime()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "history"):
            chunk_step(self.net, cond.reference, 0.0, cond.blank(1), view)
        self.cache.advance(view, 1)
        return self

    def chunk(self, cond: Conditioning, exit_step: int | None = None) -> Latents:
        """Generate the next chunk, of its conditioning's length, up to `exit_step` (default: the last of the plan)."""
        exit_step = len(self.plan.times) - 1 if exit_step is None else exit_step
        if self.pending_context is not None and torch.is_grad_enabled():
            self._cache_context()  # a merged pass would carry gradients into the context half, or lose its history
        start, length = self.position, cond.latents
        positions = range(start, start + length)
        x = self.noise(cond.reference.expand(-1, -1, length, -1, -1), start, 0)
        with torch.no_grad():
            for step in range(exit_step):
                x0 = self._denoise(x, self.plan.times[step], cond, positions)[0]
                t, r = (x.new_full((len(x), length), time) for time in self.plan.times[step : step + 2])
                x = UPDATES[self.plan.update](x, x0, t, r, partial(self.noise, x, start, step + 1))
        self.last = ExitStep(x, self.plan.times[exit_step], cond, positions)
        x0, view = self._denoise(x, self.last.t, cond, positions)
        self.position = positions.stop
        if self.plan.context == "noisy":
            self.cache.advance(view, length)
        else:
            self.pending_context = (x0, cond)
            if self.plan.context == "clean":
                self._cache_context()
        return x0

    def _denoise(self, x: Latents, t: float, cond: Conditioning, positions: range) -> tuple[Latents, View]:
        if self.pending_context is not None:
            return self._merged(x, t, cond, positions)
        view = self.cache.view(positions, [positions.stop] * len(positions))
        return chunk_step(self.net, x, t, cond, view), view

    def _merged(self, x: Latents, t: float, cond: Conditioning, positions: range) -> tuple[Latents, View]:
        """Batch the first pass of a chunk with the context pass of the chunk before it, along the timeline."""
        assert self.pending_context is not None
        before, before_cond = self.pending_context
        n = before.shape[2]
        start = positions.start
        view = self.cache.view(range(start - n, positions.stop), [start] * n + [positions.stop] * len(positions))
        times = torch.cat([x.new_zeros(len(x), n), x.new_full((len(x), len(positions)), t)], dim=1)
        both = torch.cat([before, x], dim=2)
        v = self.net(both, times, aligned([before_cond, cond]), view)
        self.cache.advance(view, n)
        self.pending_context = None
        return path.clean(both, v, times)[:, :, n:], view

    def _cache_context(self) -> None:
        """Write the keys and values of the pending chunk: its context pass."""
        assert self.pending_context is not None
        x0, cond = self.pending_context
        self.pending_context = None
        positions = range(self.position - x0.shape[2], self.position)
        view = self.cache.view(positions, [positions.stop] * len(positions))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "history"):
            chunk_step(self.net, x0, 0.0, cond, view)
        self.cache.advance(view, len(positions))


def aligned(parts: list[Conditioning]) -> Conditioning:
    """Conditionings with different prompts, joined along the timeline: their prompt events are stacked."""
    lengths = [part.text.shape[2] for part in parts]
    if len(set(lengths)) > 1:
        raise UserError(f"got prompts padded to {lengths} tokens in one pass; expected equal lengths: pad them")
    offsets = [sum(part.text.shape[1] for part in parts[:i]) for i in range(len(parts))]
    parts_with_offsets = [
        replace(part, text_event=torch.where(part.text_event < 0, part.text_event, part.text_event + offset))
        for part, offset in zip(parts, offsets, strict=True)
    ]
    return replace(
        join(parts_with_offsets, "l"),
        text=torch.cat([part.text for part in parts], dim=1),
        text_mask=torch.cat([part.text_mask for part in parts], dim=1),
    )


@dataclass(frozen=True)
class Generated:
    """A finished training rollout: its latents, and the passes and prefix that `replay` reruns."""

    latents: Latents
    exits: list[ExitStep]
    cache: PrefixCache


def generate(
    net: Denoiser,
    cond: Conditioning,
    plan: Plan,
    noise: Noise,
    exit_step: int | None = None,
    gradient: str = "exit_step",
) -> Generated:
    """Generate a full clip chunk by chunk, over a read-only prefix; the arguments are those of `Rollout`."""
    h, w = cond.reference.shape[-2:]
    cache = PrefixCache(net.tokens(h, w), plan.window, cond.reference.device, detach=gradient != "history")
    rollout = Rollout(net, plan, cache, noise, gradient).prime(cond)
    chunks, exits = [], []
    for length in plan.chunks(cond.latents):
        start = rollout.position
        chunks.append(rollout.chunk(cond.at(slice(start, start + length)), exit_step))
        exits.append(rollout.last)
    return Generated(torch.cat(chunks, dim=2), exits, cache)


def replay(net: Denoiser, generated: Generated, gradient: Latents) -> None:
    """Backpropagate the gradient of a loss with respect to the generated latents, one chunk at a time.

    Equal to the `exit_step` policy, with the memory of one chunk: the rollout itself runs without gradients
    (Causal-rCM, arXiv:2606.25473).
    """
    for step in generated.exits:
        part = slice(step.positions.start, step.positions.stop)
        step.rerun(net, generated.cache).backward(gradient[:, :, part])
