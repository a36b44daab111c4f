"""Whole clips through the network in one pass: [sink | clip], or [sink | clean | noisy] for teacher forcing."""

import torch

from avatar.nn.masks import MaskSpec, mask_view
from avatar.types import Conditioning, Denoiser, Latents, Times, join


def packed_velocity(
    net: Denoiser, x_t: Latents, t: Times, cond: Conditioning, spec: MaskSpec, clean: Latents | None = None
) -> Latents:
    """The velocity of a noisy clip under a mask; `clean` is the context of `clean_noisy` packing.

    The sink and the clean latents stand at t = 0. The sink hears and reads nothing, so that it never goes stale.
    """
    if (clean is not None) != (spec.packing == "clean_noisy"):
        raise ValueError(f"packing {spec.packing!r} with{'out' if clean is None else ''} clean latents; give both or none")
    if spec.latents != x_t.shape[2]:
        raise ValueError(f"a mask for {spec.latents} latents over a clip of {x_t.shape[2]}; build it for the clip")
    clips = [x_t] if clean is None else [clean, x_t]
    times = [t] if clean is None else [torch.zeros_like(t), t]
    latents = torch.cat([cond.reference, *clips], dim=2)
    conds = join([cond.blank(1)] + [cond] * len(clips), "l")
    tokens = net.tokens(*x_t.shape[-2:])
    view = mask_view(spec, tokens, x_t.device)
    v = net(latents, torch.cat([torch.zeros_like(t[:, :1]), *times], dim=1), conds, view)
    return v[:, :, -x_t.shape[2] :]
