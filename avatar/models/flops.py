"""What a backbone weighs and what a pass through it costs, from its shapes alone: it may be on the meta device."""

from dataclasses import dataclass

from torch import nn

from avatar.errors import UserError
from avatar.models.video_dit import VideoDiT
from avatar.types import ROLES


@dataclass(frozen=True)
class ClipShape:
    """The size of what goes through: latents on the timeline, their height and width, and the tokens of the text and,
    for networks that take them, of the reference as an image encoder sees it."""

    latents: int
    height: int
    width: int
    text_tokens: int
    image_tokens: int

    def __post_init__(self):
        if min(vars(self).values()) < 1:
            raise UserError(f"a clip of {self}; every number must be at least 1")


def parameters(net: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def training_bytes(net: nn.Module) -> int:
    """Weights, gradients and AdamW's two moments, all in fp32, without activations."""
    return 16 * parameters(net)


def forward_flops(net: VideoDiT, clip: ClipShape) -> int:
    """Floating-point operations (a multiply-add is two) of one bidirectional pass over [sink | clip], batch 1.

    Matrix products and attention, as torch.utils.flop_counter counts them.
    """
    per_latent = net.tokens(clip.height, clip.width)
    passed = 1 + clip.latents
    return net.layers * _block(net, passed, per_latent, clip) + _around(net, passed, per_latent, clip)


def _block(net: VideoDiT, latents: int, per_latent: int, clip: ClipShape) -> int:
    d, tokens = net.dim, latents * per_latent
    audio_tokens = 1 + len(ROLES) * net.audio.tokens  # the null token first
    # The sink attends to itself, all others to everything.
    pairs = per_latent * per_latent + (tokens - per_latent) * tokens
    itself = _matmul(tokens, d, 4 * d) + 2 * _matmul(pairs, d, 1)
    # Text and image share their queries and what comes out.
    text, words = _matmul(tokens, d, 2 * d), clip.text_tokens + 1
    for memory in (words,) if net.image is None else (words, clip.image_tokens):
        text += _matmul(memory, d, 2 * d) + 2 * _matmul(tokens * memory, d, 1)
    if net.audio_injection == "attention":
        audio = (
            _matmul(tokens, d, 2 * d)
            + _matmul(latents * audio_tokens, d, 2 * d)
            + 2 * _matmul(tokens * audio_tokens, d, 1)
        )
    else:
        audio = _matmul(latents, d, d)
    return itself + text + audio + 2 * _matmul(tokens, d, net.ffn)


def _around(net: VideoDiT, latents: int, per_latent: int, clip: ClipShape) -> int:
    d, tokens, patch = net.dim, latents * per_latent, net.channels * net.patch**2
    entering = _matmul(tokens, net.patches.proj.in_features, d)
    if net.patches.reference is not None:
        entering += _matmul(per_latent, patch, d)
    leaving = _matmul(tokens, d, patch + net.input_skip.weights.out_features)
    time = _matmul(latents, net.time.frequencies, d) + _matmul(latents, d, d + 6 * d)
    audio_tokens = latents * len(ROLES) * net.audio.tokens
    audio = _matmul(audio_tokens, net.audio.width + d, d)
    image = 0 if net.image is None else net.image.flops(clip.image_tokens)
    return entering + leaving + time + audio + net.text.flops(clip.text_tokens) + image


def _matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns
