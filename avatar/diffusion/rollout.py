"""Causal rollout: a student generates a clip chunk by chunk. Distillation and streaming share this code.

A chunk starts as noise at t = 1. At each timestep of the plan the network predicts the clean latents, and the plan's
update moves the chunk to the next timestep. The clean chunk then becomes context, in one of three ways:

    clean    one more forward pass over it, at t = 0, writes the keys and values that later chunks attend to
    merged   the same pass, batched with the next chunk's first pass
    noisy    no such pass: the keys and values of its last denoising pass stay in the cache

Noise is indexed by (seed, latent, step), so that how a stream is cut into chunks or calls never changes a draw.
"""

from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b

import torch
from torch import Tensor

from avatar.diffusion import path
from avatar.diffusion.plan import UPDATES, Plan
from avatar.errors import UserError
from avatar.nn.kv_cache import Cache, PrefixCache
from avatar.protocols import Denoiser, View
from avatar.types import Conditioning, Latents, join


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

        rollout = Rollout(net, plan, cache, Noise((seed,))).prime(cond)
        latents = rollout.chunk(cond.at(slice(0, plan.first_chunk)))  # 1 c l h w

    Args:
        net: the causal student.
        plan: chunks, timesteps, update rule and window.
        cache: keys and values of the context: `RingCache` to stream, `PrefixCache` to train.
        noise: the source of all noise.
        gradient: which passes gradients flow through, where enabled. `exit_step`: only the last denoising pass of each
            chunk. `history`: also the context passes of earlier chunks (with a cache that does not detach).

    Raises:
        UserError: an unknown gradient policy, or a guidance scale that the network does not take.
    """

    def __init__(self, net: Denoiser, plan: Plan, cache: Cache, noise: Noise, gradient: str = "exit_step"):
        if gradient not in ("exit_step", "history"):
            raise UserError(f"got gradient={gradient!r}; choose exit_step or history")
        net.check_guidance(plan.guidance)
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
            chunk_step(self.net, cond.reference, 0.0, self._with_guidance(cond).blank(1), view)
        self.cache.advance(view, 1)
        return self

    def chunk(self, cond: Conditioning, exit_step: int | None = None) -> Latents:
        """Generate the next chunk, of its conditioning's length, up to `exit_step` (default: the last of the plan)."""
        exit_step = len(self.plan.times) - 1 if exit_step is None else exit_step
        cond = self._with_guidance(cond)
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

    def _with_guidance(self, cond: Conditioning) -> Conditioning:
        """The conditioning with the plan's guidance scale, unless it has one, as in training."""
        if self.plan.guidance is None or cond.guidance is not None:
            return cond
        return replace(cond, guidance=torch.full_like(cond.emotion_intensity, self.plan.guidance))

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
