"""Parameters, FLOPs and memory of a backbone, on the meta device: `python -m avatar summarize model=wan_14b`."""

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from avatar.errors import UserError
from avatar.models import flops, wan_weights
from avatar.models.video_dit import VideoDiT


def summarize(cfg: DictConfig) -> None:
    """Print parameters, FLOPs and memory of `cfg.model`, for a clip of `cfg.clip`'s size."""
    with torch.device("meta"):
        net = hydra.utils.instantiate(cfg.model)
    if not isinstance(net, VideoDiT):
        raise UserError(f"got a {type(net).__name__}; expected a backbone: choose another model=")
    table = Table(box=None, show_header=False)
    for name, value in lines(net, clip_of(net, **cfg.clip)):
        table.add_row(name, value)
    Console().print(table)


def clip_of(
    net: VideoDiT, frames: int, height: int, width: int, text_tokens: int, image_tokens: int
) -> flops.ClipShape:
    """The latents of a clip of this many frames of height × width pixels. Raises UserError unless strides and patches
    divide it."""
    if net.strides is None:
        raise UserError("the network has no strides; give model.network.strides, such as [4, 8]")
    s, p = net.strides
    edge = p * net.patch
    if frames % s or height % edge or width % edge:
        raise UserError(
            f"{frames} frames of {height}×{width} pixels for latents of {s} frames and patches of {edge}×{edge} "
            "pixels; choose multiples by clip.frames, clip.height and clip.width"
        )
    return flops.ClipShape(frames // s, height // p, width // p, text_tokens, image_tokens)


def lines(net: VideoDiT, clip: flops.ClipShape) -> list[tuple[str, str]]:
    """(quantity, value) of a backbone for such clips."""
    shared = wan_weights.names_of(net)
    wan = sum(parameter.numel() for name, parameter in net.named_parameters() if name in shared)
    forward = flops.forward_flops(net, clip)
    tokens = net.tokens(clip.height, clip.width)
    cached = 2 * net.layers * net.dim * tokens * torch.bfloat16.itemsize
    return [
        ("blocks", f"{net.layers} of width {net.dim}, {net.heads} heads"),
        ("parameters", f"{_short(flops.parameters(net))}, of which {_short(wan)} are as in Wan's networks"),
        ("clip", f"1 + {clip.latents} latents of {clip.height}×{clip.width}, {tokens} tokens each"),
        ("forward, a latent", f"{_short(forward / clip.latents)}FLOP, of a bidirectional pass"),
        ("training, a clip", f"{_short(3 * forward)}FLOP, forward and backward, nothing recomputed"),
        ("weights in bf16", _bytes(2 * flops.parameters(net))),
        ("training state", f"{_bytes(flops.training_bytes(net))}: fp32 weights, gradients, two moments"),
        ("cached latent", f"{_bytes(cached)}: keys and values in bf16"),
    ]


def _short(number: int | float) -> str:
    power = 1e3 if number < 1e6 else 1e6 if number < 1e9 else 1e9 if number < 1e12 else 1e12 if number < 1e15 else 1e15
    return f"{number / power:.3g} { {1e3: 'k', 1e6: 'M', 1e9: 'G', 1e12: 'T', 1e15: 'P'}[power] }"


def _bytes(number: int | float) -> str:
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"
