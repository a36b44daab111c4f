"""The one backbone: latents, their times and their conditioning in, velocity out.

Its blocks are Wan's (arXiv:2503.20314): self-attention over time × space with rotary positions, cross-attention to the
text, feed-forward, all modulated by time; beside the text each latent attends to the sound around it. Teacher, causal
teacher, student and critic are this class: who attends to whom, and what is cached, is the view's business.

Times and labels are per latent, so clean and noisy latents may stand in one sequence.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avatar.nn.attention import CrossAttention, SelfAttention, silence
from avatar.nn.embeddings import (
    AudioEntrance,
    Carry,
    LabelEmbedding,
    PatchEmbedding,
    ScalarEmbedding,
    per_latent_text,
    unpatched,
)
from avatar.nn.norm import LayerNorm, gated, modulate
from avatar.nn.rope import Rope, Rotation
from avatar.types import Conditioning, Latents, Times, View


class Block(nn.Module):
    """Wan's block, with audio after text."""

    def __init__(self, dim: int, ffn: int, heads: int, layer: int):
        super().__init__()
        self.norm1 = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(dim, heads, layer)
        self.norm_text = LayerNorm(dim, eps=1e-6)
        self.text = CrossAttention(dim, heads)
        self.norm_audio = LayerNorm(dim, eps=1e-6)
        self.audio = CrossAttention(dim, heads)
        self.norm2 = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.randn(6, dim) / math.sqrt(dim))
        silence(self.audio.out)

    def forward(self, x: Tensor, time: Float[Tensor, "b l 6 d"], text, audio, view: View, rotation: Rotation) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (time + self.modulation).unbind(2)
        x = x + gated(self.attention(modulate(self.norm1(x), shift, scale), view, rotation), gate)
        x = x + self.text(self.norm_text(x), *text)
        x = x + self._hear(self.norm_audio(x), *audio)
        return x + gated(self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)

    def _hear(self, x: Tensor, tokens: Float[Tensor, "b l m d"], mask: Tensor) -> Tensor:
        """Every latent listens to its own tokens alone."""
        b, l = tokens.shape[:2]
        y = self.audio(x.reshape(b * l, -1, x.shape[-1]), tokens.flatten(0, 1), mask.flatten(0, 1)[:, None])
        return y.reshape(x.shape)


class VideoDiT(nn.Module):
    """Predicts v = eps - x0 for every latent of a pass.

    Args:
        channels: of the latents.
        patch: edge of a patch, in latent pixels.
        audio_features, audio_tokens: width and number of audio tokens per latent and role.
        text: the entrance of the text (byte ids or a frozen encoder's features → tokens of width `dim`).
        reference_channels: whether the reference also enters by the patches and the carry, beside being the sink.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        ffn: int,
        heads: int,
        layers: int,
        patch: int,
        audio_features: int,
        audio_tokens: int,
        text: nn.Module,
        reference_channels: bool = True,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} can't be shared by {heads} heads; choose a multiple of {heads}")
        self.channels, self.dim, self.heads, self.layers, self.patch = channels, dim, heads, layers, patch
        self.rope = Rope(dim // heads)
        self.patches = PatchEmbedding(channels, patch, dim, reference_channels)
        self.time = ScalarEmbedding(dim)
        self.target_time, self.guidance = ScalarEmbedding(dim), ScalarEmbedding(dim)
        self.labels = LabelEmbedding(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.audio = AudioEntrance(audio_features, audio_tokens, dim)
        self.text = text
        self.blocks = nn.ModuleList(Block(dim, ffn, heads, layer) for layer in range(layers))
        self.norm_out = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Parameter(torch.randn(2, dim) / math.sqrt(dim))
        self.out = nn.Linear(dim, channels * patch * patch)
        self.carry = Carry(dim, channels, patch, reference_channels)
        for late in (self.target_time.linear_2, self.guidance.linear_2, self.out):
            silence(late)

    def tokens(self, height: int, width: int) -> int:
        """Tokens per latent of height × width."""
        return (height // self.patch) * (width // self.patch)

    def forward(
        self,
        x: Latents,
        t: Times,
        cond: Conditioning,
        view: View,
        r: Times | None = None,
        guidance: Float[Tensor, "b l"] | None = None,
    ) -> Latents:
        """The velocity of latents `x` at times `t`.

        `r` is the time that a flow map jumps to, `guidance` the scale that a guidance-distilled network imitates; a
        network that was trained without them ignores them.
        """
        height, width = x.shape[-2:]
        rows, columns = height // self.patch, width // self.patch
        places = torch.tensor(view.sink_positions, device=x.device)
        rotation = Rotation(
            self.rope.table(view.positions, rows, columns),
            [self.rope.table(place, rows, columns) for place in places.split(1)],
        )
        time = self.time(t) + self.labels(cond)
        time = time if r is None else time + self.target_time(r)
        time = time if guidance is None else time + self.guidance(guidance)
        modulation = self.modulation(nn.functional.silu(time)).unflatten(-1, (6, self.dim))

        tokens = self.patches(x, cond.reference)
        latents, per_latent = tokens.shape[1:3]
        words, on = self.text(cond.text, cond.text_mask)
        text, spoken = per_latent_text(words, on, cond.text_event)
        text = (text, spoken.repeat_interleave(per_latent, dim=1))
        audio = self.audio(cond.audio, cond.audio_mask)

        y = tokens.flatten(1, 2)
        for block in self.blocks:
            y = block(y, modulation, text, audio, view, rotation)
        shift, scale = (time[:, :, None] + self.modulation_out).unbind(2)
        y = modulate(self.norm_out(y), shift, scale).unflatten(1, (latents, per_latent))
        return unpatched(self.out(y), self.patch, height, width) + self.carry(y, x, cond.reference)
