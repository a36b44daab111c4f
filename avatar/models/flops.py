"""Parameters, training memory and FLOPs of a backbone, from shapes only: its weights can be on the meta device."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from avatar.errors import UserError
from avatar.models.video_dit import VideoDiT
from avatar.nn.embeddings import TextProjection
from avatar.nn.masks import MaskSpec, mask_view
from avatar.types import ROLES, Conditioning


@dataclass(frozen=True)
class ClipShape:
    """The size of a clip and of its conditioning.

    Args:
        latents: on the timeline, without the sink.
        height, width: of the latents.
        text_tokens: tokens of the prompt; for a byte-level text embedder they are limited to its `max_bytes`.
        image_tokens: tokens of the image encoder's features, for networks that take them.

    Raises:
        UserError: a size below 1.
    """

    latents: int
    height: int
    width: int
    text_tokens: int
    image_tokens: int

    def __post_init__(self):
        if min(vars(self).values()) < 1:
            raise UserError(f"got {self}; expected sizes of at least 1: change the smaller ones")


def parameters(net: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def training_bytes(net: nn.Module) -> int:
    """Bytes of weights, gradients and AdamW's two moments, all in fp32; activations not included."""
    return 16 * parameters(net)


def forward_flops(net: VideoDiT, clip: ClipShape) -> int:
    """Count the FLOPs (a multiply-add is two) of one bidirectional forward pass over [sink | clip], batch size 1.

    Matrix products and attention are counted, by torch's FlopCounterMode in a pass on the meta device. A 20 B network
    takes two seconds. Call this before transforms: compiled blocks can't run on the meta device.
    """
    with torch.device("meta") as meta, FlopCounterMode(display=False) as counter:
        # fp32 like the inputs, for a network of any precision.
        weights = {name: torch.empty(parameter.shape) for name, parameter in net.named_parameters()}
        x = torch.empty(1, net.channels, 1 + clip.latents, clip.height, clip.width)
        t = torch.empty(1, 1 + clip.latents)
        view = mask_view(MaskSpec((clip.latents,)), net.tokens(clip.height, clip.width), meta)
        torch.func.functional_call(net, weights, (x, t, _conditioning(net, clip), view))
    return counter.get_total_flops()


def _conditioning(net: VideoDiT, clip: ClipShape) -> Conditioning:
    """Conditioning of [sink | clip] in the shapes that the network takes, without values."""
    latents, space = 1 + clip.latents, (clip.height, clip.width)
    labels = torch.empty(1, latents, dtype=torch.long)
    if isinstance(net.text, TextProjection):
        text = torch.empty(1, 1, clip.text_tokens, net.text.features)
    else:
        text = torch.empty(1, 1, min(clip.text_tokens, len(net.text.place)), dtype=torch.long)
    return Conditioning(
        reference=torch.empty(1, net.channels, 1, *space),
        audio=torch.empty(1, len(ROLES), latents, net.audio.tokens, net.audio.features),
        audio_mask=torch.empty(1, len(ROLES), latents, dtype=torch.bool),
        text=text,
        text_mask=torch.empty(text.shape[:3], dtype=torch.bool),
        text_event=labels,
        state=labels,
        emotion=labels,
        emotion_intensity=torch.empty(1, latents),
        gesture=labels,
        image=None if net.image is None else torch.empty(1, clip.image_tokens, net.image.features),
        concat_latents=torch.empty(1, net.extra_in_channels, latents, *space) if net.extra_in_channels else None,
    )
