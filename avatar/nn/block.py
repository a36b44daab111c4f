"""Transformer block of the backbone: Wan's (arXiv:2503.20314), with audio cross-attention after that of the text."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from avatar.nn.attention import AdditiveInjection, CrossAttention, ImageKeys, SelfAttention, zero_init_
from avatar.nn.norm import LayerNorm, gated, modulate
from avatar.nn.rope import Rotation
from avatar.protocols import View

Injection = Literal["attention", "addition"]


class Block(nn.Module):
    """Self-attention, text and audio cross-attention, and feed-forward; the first and last are modulated by time.

    Args:
        dim, ffn: width of the tokens and of the feed-forward's hidden layer.
        heads: attention heads; divides `dim`.
        layer: index of the block, for the view's cache.
        image: whether the text cross-attention also attends to image tokens.
        audio: how audio enters, "attention" or "addition" (see `VideoDiT`).
        audio_tokens: audio tokens per latent, the null token included.
    """

    def __init__(self, dim: int, ffn: int, heads: int, layer: int, image: bool, audio: Injection, audio_tokens: int):
        super().__init__()
        self.norm1 = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(dim, heads, layer)
        self.norm_text = LayerNorm(dim, eps=1e-6)
        self.text = CrossAttention(dim, heads, ImageKeys(dim) if image else None)
        self.norm_audio = LayerNorm(dim, eps=1e-6) if audio == "attention" else nn.Identity()
        self.audio = CrossAttention(dim, heads) if audio == "attention" else AdditiveInjection(dim, audio_tokens)
        self.norm2 = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.empty(6, dim))
        self.reset_parameters()
        zero_init_(self.audio.out)

    def reset_parameters(self) -> None:
        """Initialise the modulation; submodules initialise themselves."""
        nn.init.normal_(self.modulation, std=1 / math.sqrt(self.modulation.shape[-1]))

    def forward(self, x: Tensor, time: Float[Tensor, "b l 6 d"], text, audio, view: View, rotation: Rotation) -> Tensor:
        """The tokens `b n d` after this block.

        Args:
            x: tokens of l latents, n = l · tokens per latent.
            time: shift, scale and gate of self-attention and of the feed-forward, per latent.
            text: the memory, mask and image tokens of `CrossAttention`.
            audio: tokens and mask of each latent.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (time + self.modulation).unbind(2)
        x = gated(x, self.attention(modulate(self.norm1(x), shift, scale), view, rotation), gate)
        x = x + self.text(self.norm_text(x), *text)
        x = self._audio_attention(x, *audio)
        return gated(x, self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)

    def _audio_attention(self, x: Tensor, tokens: Float[Tensor, "b l m d"], mask: Bool[Tensor, "b l m"]) -> Tensor:
        """Add the cross-attention of each latent's tokens to its own audio tokens."""
        b, l = tokens.shape[:2]
        queries = self.norm_audio(x).reshape(b * l, -1, x.shape[-1])
        y = self.audio(queries, tokens.flatten(0, 1), mask.flatten(0, 1)[:, None])
        return (x.reshape(queries.shape) + y).reshape(x.shape)
