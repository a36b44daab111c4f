"""Model summary: parameters, FLOPs and memory of a backbone, built on the meta device."""

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from avatar.errors import UserError
from avatar.models import flops, wan_weights
from avatar.models.video_dit import VideoDiT


def summarize(cfg: DictConfig) -> None:
    """Print parameters, FLOPs and memory of the backbone of a config, for a clip of the size in `cfg.clip`.

        python -m avatar summarize model=dit_20b

    Args:
        cfg: config `summarize`, whose comments describe each setting.

    Raises:
        UserError: a model that is not a backbone.
    """
    with torch.device("meta"):
        net = hydra.utils.instantiate(cfg.model)
    if not isinstance(net, VideoDiT):
        raise UserError(f"got a {type(net).__name__}; expected a backbone (VideoDiT); choose another model=")
    table = Table(box=None, show_header=False)
    for name, value in lines(net, clip_of(net, **cfg.clip)):
        table.add_row(name, value)
    Console().print(table)


def clip_of(
    net: VideoDiT, frames: int, height: int, width: int, text_tokens: int, image_tokens: int
) -> flops.ClipShape:
    """The size in latents of a clip in pixels, by the strides of the network's latents.

    Args:
        net: the network.
        frames, height, width: of the clip, in frames and pixels; multiples of the strides and the patch size.
        text_tokens, image_tokens: see ClipShape.

    Raises:
        UserError: a network without strides, or a clip that they and the patch size don't divide.
    """
    if net.strides is None:
        raise UserError(
            "got a network without strides; expected frames and pixels per latent, such as [4, 8]; "
            "give model.network.strides"
        )
    s, p = net.strides
    patch = p * net.patch
    if frames % s or height % patch or width % patch:
        raise UserError(
            f"got a clip of {frames} frames of {height}×{width} pixels; expected multiples of {s} frames and "
            f"patches of {patch}×{patch} pixels; change frames, height or width"
        )
    return flops.ClipShape(frames // s, height // p, width // p, text_tokens, image_tokens)


def lines(net: VideoDiT, clip: flops.ClipShape) -> list[tuple[str, str]]:
    """Rows (name, value) of the summary of a backbone and clips of this size."""
    shared = wan_weights.names_of(net)
    wan = sum(parameter.numel() for name, parameter in net.named_parameters() if name in shared)
    forward = flops.forward_flops(net, clip)
    tokens = net.tokens(clip.height, clip.width)
    cached = 2 * net.layers * net.dim * tokens * torch.bfloat16.itemsize
    return [
        ("blocks", f"{net.layers} of width {net.dim}, {net.heads} heads"),
        ("parameters", f"{_short(flops.parameters(net))}, {_short(wan)} of them in Wan's layers"),
        ("clip", f"1 + {clip.latents} latents of {clip.height}×{clip.width}, {tokens} tokens each"),
        ("forward per latent", f"{_short(forward / clip.latents)}FLOP, in a bidirectional pass"),
        ("training per clip", f"{_short(3 * forward)}FLOP: forward, backward, no checkpointing"),
        ("weights in bf16", _bytes(2 * flops.parameters(net))),
        ("training state", f"{_bytes(flops.training_bytes(net))}: fp32 weights, gradients, two moments"),
        ("KV cache per latent", f"{_bytes(cached)} in bf16"),
    ]


def _short(number: int | float) -> str:
    power = 1e3 if number < 1e6 else 1e6 if number < 1e9 else 1e9 if number < 1e12 else 1e12 if number < 1e15 else 1e15
    return f"{number / power:.3g} { {1e3: 'k', 1e6: 'M', 1e9: 'G', 1e12: 'T', 1e15: 'P'}[power] }"


def _bytes(number: int | float) -> str:
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"
