"""The rollout: a causal student generates chunk after chunk. Distillation and streaming run this same code.

A chunk starts as noise at t = 1. At each time of the plan the network predicts the clean latents, which are noised
again to the next time with *fresh* noise (multistep consistency sampling, arXiv:2303.01469, Alg. 1). The clean chunk
then becomes context, in one of three ways:

    clean    one more pass over it, at t = 0, writes the keys and values that later chunks see
    merged   the same pass, done together with the next chunk's first one
    noisy    no such pass: the keys and values of its last denoising pass stay

Noise is indexed by (seed, latent, step): how a stream was cut into chunks or calls never changes a draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from avatar.diffusion import path
from avatar.errors import UserError
from avatar.nn.kv_cache import Cache, PrefixCache
from avatar.nn.masks import MaskSpec
from avatar.protocols import Denoiser, View
from avatar.types import Conditioning, Latents, join


@dataclass(frozen=True)
class Plan:
    """The chunk × step schedule.

    Args:
        times: at which each chunk is denoised, falling from 1.
        chunk, first_chunk: latents per chunk; a short first chunk is seen sooner.
        window: latents attended to, the chunk's own included.
    """

    times: Sequence[float] = (1.0, 0.9375, 0.833, 0.625)
    chunk: int = 2
    first_chunk: int = 1
    window: int = 8
    context: str = "clean"  # or merged, noisy

    def __post_init__(self):
        lengths = {"chunk": self.chunk, "first_chunk": self.first_chunk, "window": self.window}
        for name, value in lengths.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{name} {value!r}; wanted a whole number of latents")
        if not isinstance(self.times, Sequence) or not all(isinstance(t, int | float) for t in self.times):
            raise UserError(f"times {self.times!r}; wanted a list of numbers, such as [1.0, 0.75]")
        object.__setattr__(self, "times", tuple(self.times))
        if (
            not self.times
            or self.times[0] != 1.0
            or any(b >= a or b <= 0 for a, b in zip(self.times, self.times[1:], strict=False))
        ):
            raise UserError(f"times {self.times}; a plan's times start at 1 and fall, staying above 0")
        if min(self.chunk, self.first_chunk) < 1 or self.window < max(self.chunk, self.first_chunk):
            raise UserError(
                f"chunks of {self.first_chunk}, then {self.chunk} latents in a window of {self.window}; "
                "chunks need at least one latent, and the window must hold a chunk"
            )
        if self.context not in ("clean", "merged", "noisy"):
            raise UserError(f"context {self.context!r}; choose clean, merged or noisy")

    def check_trainable(self) -> None:
        """Refuse a plan whose rollout training can't show to the network as it will stream."""
        if self.context == "noisy":
            raise UserError("a plan with noisy context can be streamed, not trained; train with clean or merged")

    def chunks(self, latents: int) -> tuple[int, ...]:
        """The lengths of the chunks that make a clip of so many latents; the last may be shorter."""
        lengths = [min(self.first_chunk, latents)]
        while (left := latents - sum(lengths)) > 0:
            lengths.append(min(self.chunk, left))
        return tuple(lengths)

    def spec(self, latents: int) -> MaskSpec:
        """The teacher-forcing mask under which training sees what this rollout sees."""
        return MaskSpec(self.chunks(latents), self.window, "clean_noisy")

    @property
    def evaluations(self) -> int:
        """Passes of the network per chunk."""
        return len(self.times) + (self.context == "clean")


def plan_of(trained: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Plan:
    """The plan that a student was trained for, as its bundle tells it, with some fields changed."""
    known = [f.name for f in fields(Plan)]
    if unknown := sorted(set(changes) - set(known)):
        raise UserError(f"a plan has no {', '.join(unknown)}; change one of {', '.join(known)}")
    return Plan(**{**{name: value for name, value in (trained or {}).items() if name in known}, **changes})


@dataclass(frozen=True)
class Noise:
    """Gaussian noise as a function of (seed, latent, step), one seed per sample."""

    seeds: tuple[int, ...]

    def __call__(self, like: Latents, start: int, step: int) -> Latents:
        """Noise for latents from `start` on, in the shape of `like`."""
        frame = (like.shape[1], *like.shape[3:])
        draws = [[self._draw(seed, start + i, step, frame) for i in range(like.shape[2])] for seed in self.seeds]
        return torch.stack([torch.stack(row, dim=1) for row in draws]).to(like)

    def _draw(self, seed: int, latent: int, step: int, frame: tuple[int, ...]) -> Tensor:
        digest = blake2b(f"{seed} {latent} {step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        return torch.randn(frame, generator=generator)


def chunk_step(net: Denoiser, x_t: Latents, t: float, cond: Conditioning, view: View) -> Latents:
    """One pass over a chunk at time t: the clean latents that the network sees in it."""
    times = x_t.new_full((x_t.shape[0], x_t.shape[2]), t)
    return path.clean(x_t, net(x_t, times, cond, view), times)


@dataclass(frozen=True)
class ExitStep:
    """The pass whose prediction a chunk ended with: enough to run it again against the same prefix."""

    x_t: Latents
    t: float
    cond: Conditioning
    positions: range

    def again(self, net: Denoiser, cache: Cache) -> Latents:
        """The same prediction, from a read-only prefix; with gradients, it is one chunk's part of a replayed
        rollout."""
        view = cache.view(self.positions, [self.positions.stop] * len(self.positions))
        return chunk_step(net, self.x_t, self.t, self.cond, view)


class Rollout:
    """A generation in progress. `prime` it with the reference once, then ask for chunks.

    Gradients, where enabled, follow one policy: `exit_step` lets them through each chunk's last denoising pass alone;
    `history` also through the passes that turn earlier chunks into context (with a cache that doesn't detach).
    """

    def __init__(self, net: Denoiser, plan: Plan, cache: Cache, noise: Noise, gradient: str = "exit_step"):
        if gradient not in ("exit_step", "history"):
            raise UserError(f"gradient {gradient!r}; choose exit_step or history")
        self.net, self.plan, self.cache, self.noise, self.gradient = net, plan, cache, noise, gradient
        self.position = 0
        self.pending_context: tuple[Latents, Conditioning] | None = None  # a chunk that awaits its merged context pass
        self.last: ExitStep | None = None

    def prime(self, cond: Conditioning) -> "Rollout":
        """Read the reference in; in mid-stream, another one, for the chunks to come."""
        if self.pending_context is not None:
            self._cache_context()  # a chunk made with the old reference becomes context with it
        view = self.cache.prime()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "history"):
            chunk_step(self.net, cond.reference, 0.0, cond.blank(1), view)
        self.cache.advance(view, 1)
        return self

    def chunk(self, cond: Conditioning, exit_step: int | None = None) -> Latents:
        """The next chunk, as long as its conditioning; denoising stops after `exit_step` (default: the plan's last)."""
        exit_step = len(self.plan.times) - 1 if exit_step is None else exit_step
        if self.pending_context is not None and torch.is_grad_enabled():
            self._cache_context()  # a merged pass would carry gradients into the context half, or lose its history
        start, length = self.position, cond.latents
        positions = range(start, start + length)
        x = self.noise(cond.reference.expand(-1, -1, length, -1, -1), start, 0)
        with torch.no_grad():
            for step in range(exit_step):
                x0 = self._denoise(x, self.plan.times[step], cond, positions)[0]
                t = x.new_full((len(x), length), self.plan.times[step + 1])
                x = path.noised(x0, self.noise(x, start, step + 1), t)
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
        """The chunk's first pass together with the last chunk's context pass; each half keeps its time and
        conditions."""
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
        """The context pass of the pending chunk."""
        assert self.pending_context is not None
        x0, cond = self.pending_context
        self.pending_context = None
        positions = range(self.position - x0.shape[2], self.position)
        view = self.cache.view(positions, [positions.stop] * len(positions))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "history"):
            chunk_step(self.net, x0, 0.0, cond, view)
        self.cache.advance(view, len(positions))


def aligned(parts: list[Conditioning]) -> Conditioning:
    """Conditionings joined along the timeline though each has texts of its own: their events are stacked."""
    lengths = [part.text.shape[2] for part in parts]
    if len(set(lengths)) > 1:
        raise UserError(f"prompts padded to {lengths} tokens stand in one pass; pad them to one length")
    offsets = [sum(part.text.shape[1] for part in parts[:i]) for i in range(len(parts))]
    moved = [
        replace(part, text_event=torch.where(part.text_event < 0, part.text_event, part.text_event + offset))
        for part, offset in zip(parts, offsets, strict=True)
    ]
    return replace(
        join(moved, "l"),
        text=torch.cat([part.text for part in parts], dim=1),
        text_mask=torch.cat([part.text_mask for part in parts], dim=1),
    )


@dataclass(frozen=True)
class Generated:
    """A finished training rollout: its latents, and what a replayed backward pass needs."""

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
    """A whole clip, chunk by chunk, over a read-only prefix."""
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
    """Backpropagate the gradient of a loss in the generated latents, one chunk at a time.

    Equals the `exit_step` policy, with the memory of one chunk: the rollout itself is run without gradients
    (Causal-rCM, arXiv:2606.25473).
    """
    for step in generated.exits:
        part = slice(step.positions.start, step.positions.stop)
        step.again(net, generated.cache).backward(gradient[:, :, part])
