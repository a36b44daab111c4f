"""Packed forward passes over full clips: [sink | clip], or [sink | clean | noisy] for teacher forcing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from avatar.diffusion.guidance import Guidance, guided
from avatar.diffusion.plan import Plan
from avatar.errors import UserError
from avatar.nn.masks import MaskSpec, mask_view
from avatar.protocols import Denoiser
from avatar.types import Conditioning, Latents, Times, join

TimestepSampler = Callable[..., Times]  # (*shape, device) -> timesteps


def packed_velocity(
    net: Denoiser, x_t: Latents, t: Times, cond: Conditioning, spec: MaskSpec, clean: Latents | None = None
) -> Latents:
    """The velocity of a noisy clip under an attention mask.

    The sink and the clean latents are at t = 0. The sink is conditioned on neither audio nor text, so that its cached
    keys stay valid.

    Args:
        clean: the clean context of `clean_noisy` packing.

    Raises:
        UserError: clean latents without that packing or vice versa, or a mask of another length.
    """
    if (clean is not None) != (spec.packing == "clean_noisy"):
        raise UserError(
            f"got packing {spec.packing!r} with{'out' if clean is None else ''} clean latents; pass both or neither"
        )
    if spec.latents != x_t.shape[2]:
        raise UserError(
            f"got a mask of {spec.latents} latents; expected {x_t.shape[2]}, the clip's: build it for the clip"
        )
    clips = [x_t] if clean is None else [clean, x_t]
    times = [t] if clean is None else [torch.zeros_like(t), t]
    latents = torch.cat([cond.reference, *clips], dim=2)
    conds = join([cond.blank(1)] + [cond] * len(clips), "l")
    tokens = net.tokens(*x_t.shape[-2:])
    view = mask_view(spec, tokens, x_t.device)
    v = net(latents, torch.cat([torch.zeros_like(t[:, :1]), *times], dim=1), conds, view)
    return v[:, :, -x_t.shape[2] :]


@dataclass(frozen=True)
class Bidirectional:
    """Attention pattern of a teacher: full attention over a clip with one timestep."""

    def times(self, sampler: TimestepSampler, latents: Latents) -> Times:
        b, _, l = latents.shape[:3]
        return sampler(b, 1, device=latents.device).expand(b, l)

    def velocity(self, net: Denoiser, x_t: Latents, t: Times, cond: Conditioning, x0: Latents) -> Latents:
        return packed_velocity(net, x_t, t, cond, MaskSpec((x_t.shape[2],)))


@dataclass(frozen=True)
class TeacherForced:
    """Attention pattern of causal training: a timestep per chunk, with attention to the *clean* chunks before it."""

    plan: Plan

    def __post_init__(self):
        self.plan.check_trainable()

    def times(self, sampler: TimestepSampler, latents: Latents) -> Times:
        chunks = torch.tensor(self.plan.chunks(latents.shape[2]), device=latents.device)
        return sampler(len(latents), len(chunks), device=latents.device).repeat_interleave(chunks, dim=1)

    def velocity(self, net: Denoiser, x_t: Latents, t: Times, cond: Conditioning, x0: Latents) -> Latents:
        return packed_velocity(net, x_t, t, cond, self.plan.spec(x_t.shape[2]), clean=x0)


AttentionPattern = Bidirectional | TeacherForced


def guided_velocity(
    net: Denoiser,
    pattern: AttentionPattern,
    x_t: Latents,
    t: Times,
    cond: Conditioning,
    x0: Latents,
    guidance: Guidance,
) -> Latents:
    """The guided velocity of a full clip, its branches in one batch; `x0` is the clean context of teacher forcing."""

    def velocity(x: Latents, branches: Conditioning) -> Latents:
        copies = len(x) // len(x_t)
        return pattern.velocity(net, x, t.repeat(copies, 1), branches, x0.repeat(copies, 1, 1, 1, 1))

    return guided(velocity, x_t, cond, guidance)
