"""The one backbone: latents, their times and their conditioning in, velocity out.

Its blocks are Wan's (arXiv:2503.20314): self-attention over time × space with rotary positions, cross-attention to the
text, feed-forward, all modulated by time; beside the text each latent attends to the sound around it. Teacher, causal
teacher, student and critic are this class: who attends to whom, and what is cached, is the view's business.

Times and labels are per latent, so clean and noisy latents may stand in one sequence.
"""

import math
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.nn.attention import AdditiveInjection, CrossAttention, ImageKeys, SelfAttention, zero_init_
from avatar.nn.embeddings import (
    AudioEmbedder,
    ByteTextEncoder,
    ImageProjection,
    InputSkip,
    LabelEmbedding,
    PatchEmbedding,
    ScalarEmbedding,
    TextProjection,
    per_latent_text,
    unpatched,
)
from avatar.nn.masks import SINK
from avatar.nn.norm import LayerNorm, gated, modulate
from avatar.nn.rope import Rope, Rotation
from avatar.protocols import AudioEncoder, ImageEncoder, VideoAutoencoder, View
from avatar.types import ROLES, Conditioning, Latents, Times

Injection = Literal["attention", "addition"]


class Block(nn.Module):
    """Wan's block, with audio after text; the other arguments are VideoDiT's."""

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
        """The start of its own parameter, not of its layers'."""
        nn.init.normal_(self.modulation, std=1 / math.sqrt(self.modulation.shape[-1]))

    def forward(self, x: Tensor, time: Float[Tensor, "b l 6 d"], text, audio, view: View, rotation: Rotation) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (time + self.modulation).unbind(2)
        x = gated(x, self.attention(modulate(self.norm1(x), shift, scale), view, rotation), gate)
        x = x + self.text(self.norm_text(x), *text)
        x = self._audio_attention(x, *audio)
        return gated(x, self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)

    def _audio_attention(self, x: Tensor, tokens: Float[Tensor, "b l m d"], mask: Tensor) -> Tensor:
        """The tokens x with what their latent hears; every latent listens to its own sound alone."""
        b, l = tokens.shape[:2]
        queries = self.norm_audio(x).reshape(b * l, -1, x.shape[-1])
        y = self.audio(queries, tokens.flatten(0, 1), mask.flatten(0, 1)[:, None])
        return (x.reshape(queries.shape) + y).reshape(x.shape)


class VideoDiT(nn.Module):
    """Predicts v = eps - x0 for every latent of a pass.

    Args:
        channels: of the latents.
        patch: edge of a patch, in latent pixels.
        audio_features, audio_tokens: width and number of audio tokens per latent and role.
        text: the entrance of the text (byte ids or a frozen encoder's features → tokens of width `dim`).
        reference_channels: whether the reference enters by the patches and the carry.
        reference_sink: whether it stands before the timeline; if not, the sink is there and empty.
        audio_injection: a latent's tokens attend to its sound ("attention"), or its sound is added to all of them
            ("addition"), in every block.
        extra_in_channels: that the patches take beside the latents' own, from `Conditioning.concat_latents`.
        image: the entrance of the reference as an image encoder sees it, from `Conditioning.image`.
        audio_layers: of a frozen network that the audio features are the states of, mixed as the network learns.
        strides: frames and pixels of a latent, of the autoencoder that it is made for; None: of any.
        flow_map: whether it takes a target timestep `r` (flow maps, consistency models with two timesteps).
        guidance_embedding: whether it takes a guidance scale (guidance distillation, arXiv:2210.03142).
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
        text: ByteTextEncoder | TextProjection,
        reference_channels: bool = True,
        reference_sink: bool = True,
        audio_injection: Injection = "attention",
        extra_in_channels: int = 0,
        image: ImageProjection | None = None,
        audio_layers: int = 1,
        strides: Sequence[int] | None = None,
        flow_map: bool = False,
        guidance_embedding: bool = False,
    ):
        super().__init__()
        sizes = {"channels": channels, "dim": dim, "ffn": ffn, "heads": heads, "layers": layers, "patch": patch}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value}; wanted a whole number from 1 on")
        if dim % heads:
            raise UserError(f"a width of {dim} can't be shared by {heads} heads; choose a multiple of {heads}")
        for name, entrance in (("text", text), ("image", image)):
            if entrance is not None and entrance.dim != dim:
                raise UserError(
                    f"{name} of width {entrance.dim} for a network of width {dim}; set network.{name}.dim to this"
                )
        if strides is not None and ([*map(type, strides)] != [int, int] or min(strides) < 1):
            raise UserError(f"strides={strides}; wanted the frames and the pixels of a latent, such as [4, 8]")
        if not (reference_channels or reference_sink):
            raise UserError("the reference enters nowhere; give reference_channels or reference_sink or both")
        if audio_injection not in get_args(Injection):
            raise UserError(f"audio_injection={audio_injection!r}; choose one of {', '.join(get_args(Injection))}")
        self.reference_sink, self.extra_in_channels = reference_sink, extra_in_channels
        self.audio_injection, self.ffn = audio_injection, ffn
        self.channels, self.dim, self.heads, self.layers, self.patch = channels, dim, heads, layers, patch
        self.strides = None if strides is None else tuple(strides)
        self.rope = Rope(dim // heads)
        self.patches = PatchEmbedding(channels, patch, dim, reference_channels, extra_in_channels)
        self.time = ScalarEmbedding(dim)
        self.target_time = ScalarEmbedding(dim) if flow_map else None
        self.guidance = ScalarEmbedding(dim) if guidance_embedding else None
        self.labels = LabelEmbedding(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.audio = AudioEmbedder(audio_features, audio_tokens, dim, audio_layers)
        self.text, self.image = text, image
        audio_tokens = 1 + len(ROLES) * audio_tokens  # the entrance's null token is one of them
        self.blocks = nn.ModuleList(
            Block(dim, ffn, heads, layer, image is not None, audio_injection, audio_tokens) for layer in range(layers)
        )
        self.norm_out = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Parameter(torch.empty(2, dim))
        self.reset_parameters()
        self.out = nn.Linear(dim, channels * patch * patch)
        self.input_skip = InputSkip(dim, channels, patch, reference_channels)
        for layer in (*self._optional_outputs(), self.out):
            zero_init_(layer)

    def reset_parameters(self) -> None:
        """The start of its own parameter, not of its layers'."""
        nn.init.normal_(self.modulation_out, std=1 / math.sqrt(self.dim))

    def zero_init_added_layers(self) -> None:
        """Let all that Wan's networks lack start at zero, so that a loaded network computes what it computed."""
        added = [*self._optional_outputs(), self.input_skip.weights, self.patches.reference]
        added += [self.labels.state, self.labels.emotion, self.labels.gesture]
        for layer in (*added, *(block.get_submodule("audio.out") for block in self.blocks)):
            if layer is not None:
                zero_init_(layer)

    def check_inputs(self, autoencoder: VideoAutoencoder, audio: AudioEncoder, image: ImageEncoder | None) -> None:
        """Raise UserError unless it takes what these make."""
        if self.channels != autoencoder.channels:
            raise UserError(
                f"a network for latents of {self.channels} channels with an autoencoder of {autoencoder.channels}; "
                "take the autoencoder that it was trained with, or a model= for these latents"
            )
        stride, edge = autoencoder.temporal_stride, autoencoder.spatial_stride
        if self.strides is not None and self.strides != (stride, edge):
            frames, pixels = self.strides
            raise UserError(
                f"a network for latents of {frames} frames of {pixels}×{pixels} pixels with an autoencoder of {stride} "
                f"of {edge}×{edge}; choose the autoencoder= of its latents, such as autoencoder=wan22"
            )
        self.check_audio(audio, stride)
        wanted = (0 if self.image is None else self.image.features, self.extra_in_channels)
        given = (0, 0) if image is None else (image.dim, stride + self.channels)
        if wanted != given:
            raise UserError(
                f"image features of width {given[0]} and {given[1]} more channels for a network that takes {wanted[0]} "
                f"and {wanted[1]}; image-to-video networks want their image encoder (image_encoder=clip), others "
                "none (image=null)"
            )

    def check_audio(self, audio: AudioEncoder, stride: int) -> None:
        """Raise UserError unless it takes what this makes of latents of so many frames."""
        wanted, given = (self.audio.tokens, self.audio.features), (audio.tokens(stride), audio.dim)
        if wanted != given:
            raise UserError(
                f"audio of {given[0]} tokens × {given[1]} features for a network that takes {wanted[0]} × {wanted[1]}; "
                "take the audio encoder that it was trained with, or set model.network.audio_tokens and audio_features"
            )

    def check_shapes(
        self, audio_layers: int, text: Shaped[Tensor, "e n ..."], sizes: Collection[tuple[int, int]]
    ) -> None:
        """Raise UserError unless it can read audio of the states of so many layers, texts like this, and latents of
        these heights and widths."""
        if self.audio.layers not in (1, audio_layers):
            raise UserError(
                f"audio features of {audio_layers} layers for a network that mixes {self.audio.layers}; set "
                f"model.network.audio_layers={audio_layers}"
            )
        self.text.check(text)
        for height, width in sizes:
            if height % self.patch or width % self.patch:
                raise UserError(
                    f"latents of {height}×{width} can't be cut into patches of {self.patch}; choose another size of "
                    "frames, or a model= of smaller patches"
                )

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

        `r` is the target timestep of a flow map, `guidance` the scale of a guidance-distilled network; each needs the
        embedding of its name.
        """
        height, width = x.shape[-2:]
        rows, columns = height // self.patch, width // self.patch
        places = torch.tensor(view.sink_positions, device=x.device, dtype=torch.long)
        rotation = Rotation(
            self.rope.table(view.positions, rows, columns, x.dtype),
            [self.rope.table(places[n : n + 1], rows, columns, x.dtype) for n in range(len(view.sink_positions))],
        )
        if not self.reference_sink:
            x = x * (view.positions > SINK)[:, None, None]
        time = self.time(t) + self.labels(cond)
        for name, value, embedding in (("r", r, self.target_time), ("guidance", guidance, self.guidance)):
            if value is not None:
                assert embedding is not None, f"{name} for a network without its embedding; see VideoDiT's arguments"
                time = time + embedding(value)
        modulation = self.modulation(nn.functional.silu(time)).unflatten(-1, (6, self.dim))

        tokens = self.patches(self._with_more(x, cond), cond.reference)
        latents, per_latent = tokens.shape[1:3]
        words, on = self.text(cond.text, cond.text_mask)
        text, spoken = per_latent_text(words, on, cond.text_event)
        image = None if self.image is None else self.image(cond.image)
        # As numbers at once: attention would turn them into these in every block.
        bias = torch.zeros_like(spoken, dtype=text.dtype).masked_fill(~spoken, -math.inf)
        text = (text, bias.repeat_interleave(per_latent, dim=1), image)
        audio = self.audio(cond.audio, cond.audio_mask)

        y = tokens.flatten(1, 2)
        for block in self.blocks:
            y = block(y, modulation, text, audio, view, rotation)
        shift, scale = (time[:, :, None] + self.modulation_out).unbind(2)
        y = modulate(self.norm_out(y), shift, scale).unflatten(1, (latents, per_latent))
        return unpatched(self.out(y), self.patch, height, width) + self.input_skip(y, x, cond.reference)

    def _optional_outputs(self) -> list[nn.Linear]:
        return [embedding.linear_2 for embedding in (self.target_time, self.guidance) if embedding is not None]

    def _with_more(self, x: Latents, cond: Conditioning) -> Float[Tensor, "b k l h w"]:
        given = 0 if cond.concat_latents is None else cond.concat_latents.shape[1]
        if given != self.extra_in_channels:
            raise UserError(
                f"{given} channels beside the latents' own, wanted {self.extra_in_channels}: see "
                "Conditioning.concat_latents"
            )
        if (cond.image is None) != (self.image is None):
            raise UserError(f"image features are {'missing' if self.image else 'not wanted'}: see Conditioning.image")
        return x if cond.concat_latents is None else torch.cat([x, cond.concat_latents], dim=1)
