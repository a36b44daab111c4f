"""Diffusion transformer: the one backbone of teacher, causal teacher, student and critic.

Its blocks are Wan's (arXiv:2503.20314): self-attention over time × space with rotary positions, cross-attention to the
text, and feed-forward, modulated by the timestep. In addition each latent attends to the audio around it. Causality and
caching belong to the view, never to the network.

Timesteps and labels are per latent, so one sequence can contain clean and noisy latents.
"""

import math
from collections.abc import Collection, Sequence
from typing import get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.nn.attention import zero_init_
from avatar.nn.block import Block, Injection
from avatar.nn.embeddings import (
    AudioEmbedder,
    ByteTextEncoder,
    ImageProjection,
    LabelEmbedding,
    ScalarEmbedding,
    TextProjection,
    per_latent_text,
)
from avatar.nn.masks import SINK
from avatar.nn.norm import LayerNorm, modulate
from avatar.nn.patches import InputSkip, PatchEmbedding, unpatched
from avatar.nn.rope import Rope, Rotation
from avatar.protocols import AudioEncoder, ImageEncoder, VideoAutoencoder, View
from avatar.types import ROLES, Conditioning, Latents, Times


class VideoDiT(nn.Module):
    """Diffusion transformer that predicts the velocity v = eps - x0 of every latent.

        net = VideoDiT(48, dim=96, ffn=384, heads=3, layers=4, patch=1, audio_features=160, audio_tokens=9,
                       text=ByteTextEncoder(96))
        view = mask_view(MaskSpec((5,)), net.tokens(8, 8), x.device)  # [sink | 5 latents], bidirectional
        v = net(x, t, join([cond.blank(1), cond], "l"), view)  # x and v: b 48 6 8 8, t: b 6 in [0, 1]

    Args:
        channels: channels c of the latents.
        dim: width of the tokens, a multiple of `heads`.
        ffn: width of the feed-forward's hidden layer.
        heads: attention heads per block; dim / heads is even, for the rotary positions.
        layers: number of blocks.
        patch: edge of a square patch, in latent pixels; divides the latents' height and width.
        audio_features: width of the features per audio token (`AudioEncoder.dim`).
        audio_tokens: audio tokens per latent and role (`AudioEncoder.tokens(stride)`).
        text: text embedder, from byte ids or a frozen encoder's features to tokens of width `dim`.
        reference_channels: whether the reference's patches are added to every latent's, and the input skip has it.
        reference_sink: whether the sink holds the reference; if not, the sink's input is zero.
        audio_injection: "attention": a latent's tokens attend to its audio tokens, in every block; "addition": a sum of
            its audio tokens is added to all of them.
        extra_in_channels: channels of `Conditioning.concat_latents`, concatenated to the latents.
        image: image embedder, for `Conditioning.image`; None: the network takes no image features.
        audio_layers: layers of a frozen network whose states are concatenated in the audio features; their mix is
            learned. 1: no layers to mix.
        strides: frames and pixels per latent of the autoencoder that the network is for; None: any autoencoder.
        flow_map: whether it takes a target timestep `r` (flow maps, consistency models with two timesteps).
        guidance_embedding: whether it takes `Conditioning.guidance` (guidance distillation, arXiv:2210.03142).

    Raises:
        UserError: a size below 1 or that does not divide another, embedders of another width, no input for the
            reference, or an unknown `audio_injection`.
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
                raise UserError(f"{name}={value}; expected an integer of at least 1: change it")
        if dim % heads:
            raise UserError(f"got dim={dim} for {heads} heads; expected a multiple of the heads: change one of them")
        for name, embedder in (("text", text), ("image", image)):
            if embedder is not None and embedder.dim != dim:
                raise UserError(
                    f"got {name} of width {embedder.dim} for a network of width {dim}; set network.{name}.dim={dim}"
                )
        if strides is not None and ([*map(type, strides)] != [int, int] or min(strides) < 1):
            raise UserError(f"strides={strides}; expected the frames and pixels per latent, such as [4, 8]")
        if not (reference_channels or reference_sink):
            raise UserError(
                "got neither reference_channels nor reference_sink, so the network has no reference; set one or both"
            )
        if audio_injection not in get_args(Injection):
            raise UserError(f"audio_injection={audio_injection!r}; expected one of {', '.join(get_args(Injection))}")
        self.reference_sink, self.extra_in_channels = reference_sink, extra_in_channels
        self.ffn = ffn
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
        audio_tokens = 1 + len(ROLES) * audio_tokens  # with the null token
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
        """Initialise the output's modulation; submodules initialise themselves."""
        nn.init.normal_(self.modulation_out, std=1 / math.sqrt(self.dim))

    def zero_init_added_layers(self) -> None:
        """Zero-initialise the layers that Wan lacks, so that loaded weights of Wan give the same output."""
        added = [*self._optional_outputs(), self.input_skip.weights, self.patches.reference]
        added += [self.labels.state, self.labels.emotion, self.labels.gesture]
        for layer in (*added, *(block.get_submodule("audio.out") for block in self.blocks)):
            if layer is not None:
                zero_init_(layer)

    def check_inputs(self, autoencoder: VideoAutoencoder, audio: AudioEncoder, image: ImageEncoder | None) -> None:
        """Raise UserError unless the network takes the latents and features of these components."""
        if self.channels != autoencoder.channels:
            raise UserError(
                f"got a network for latents of {self.channels} channels with an autoencoder of {autoencoder.channels}; "
                "choose the autoencoder that it was trained with, or a model= for these latents"
            )
        temporal, spatial = autoencoder.temporal_stride, autoencoder.spatial_stride
        if self.strides is not None and self.strides != (temporal, spatial):
            frames, pixels = self.strides
            raise UserError(
                f"got a network for latents of {frames} frames of {pixels}×{pixels} pixels with an autoencoder of "
                f"{temporal} of {spatial}×{spatial}; choose the autoencoder= of its latents, such as autoencoder=wan22"
            )
        self.check_audio(audio, temporal)
        expected = (0 if self.image is None else self.image.features, self.extra_in_channels)
        got = (0, 0) if image is None else (image.dim, temporal + self.channels)
        if got != expected:
            raise UserError(
                f"got image features of width {got[0]} and {got[1]} extra channels for a network that takes "
                f"{expected[0]} and {expected[1]}; image-to-video networks need their image encoder "
                "(image_encoder=clip), others have none (image=null)"
            )

    def check_audio(self, audio: AudioEncoder, stride: int) -> None:
        """Raise UserError unless the network takes this encoder's features, for latents of `stride` frames."""
        expected, got = (self.audio.tokens, self.audio.features), (audio.tokens(stride), audio.dim)
        if got != expected:
            raise UserError(
                f"got audio of {got[0]} tokens × {got[1]} features for a network that takes {expected[0]} × "
                f"{expected[1]}; choose the audio encoder that it was trained with, or set model.network.audio_tokens "
                "and audio_features"
            )

    def check_shapes(
        self, audio_layers: int, text: Shaped[Tensor, "e n ..."], sizes: Collection[tuple[int, int]]
    ) -> None:
        """Raise UserError unless the network takes inputs of these shapes.

        Args:
            audio_layers: layers of the audio encoder (`AudioEncoder.num_layers`).
            text: an encoded prompt.
            sizes: heights and widths of latents.
        """
        if self.audio.layers not in (1, audio_layers):
            raise UserError(
                f"got audio features of {audio_layers} layers for a network that mixes {self.audio.layers}; set "
                f"model.network.audio_layers={audio_layers}"
            )
        self.text.check(text)
        for height, width in sizes:
            if height % self.patch or width % self.patch:
                raise UserError(
                    f"got latents of {height}×{width}; expected multiples of the patch size {self.patch}: choose "
                    "another frame size, or a model= with smaller patches"
                )

    def check_guidance(self, scale: float | None) -> None:
        """Raise UserError for a guidance scale, if the network takes none."""
        if scale is not None and self.guidance is None:
            raise UserError(
                f"got plan.guidance={scale} for a network that takes no guidance scale; leave it out, or train a "
                "student with objective.guidance_range"
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
    ) -> Latents:
        """The velocity of the latents.

        Args:
            x: noisy latents in the order of the view, sink first where the pass has it.
            t: the timestep of each latent, from 0 (data) to 1 (noise).
            cond: the conditioning of the same latents.
            view: what they may attend to: a mask or a KV cache.
            r: target timesteps, for networks with `flow_map`.
        """
        height, width = x.shape[-2:]
        rows, columns = height // self.patch, width // self.patch
        sinks = torch.tensor(view.sink_positions, device=x.device, dtype=torch.long)
        rotation = Rotation(
            self.rope.table(view.positions, rows, columns, x.dtype),
            [self.rope.table(sinks[n : n + 1], rows, columns, x.dtype) for n in range(len(view.sink_positions))],
        )
        if not self.reference_sink:
            x = x * (view.positions > SINK)[:, None, None]
        time = self.time(t) + self.labels(cond)
        if r is not None:
            assert self.target_time is not None, "r for a network without flow_map"
            time = time + self.target_time(r)
        if self.guidance is not None and cond.guidance is not None:
            time = time + self.guidance(cond.guidance)
        modulation = self.modulation(nn.functional.silu(time)).unflatten(-1, (6, self.dim))

        tokens = self.patches(self._with_concat_latents(x, cond), cond.reference)
        latents, per_latent = tokens.shape[1:3]
        event_tokens, mask = self.text(cond.text, cond.text_mask)
        text, attended = per_latent_text(event_tokens, mask, cond.text_event)
        image = None if self.image is None else self.image(cond.image)
        # A float mask, once: attention would convert a boolean mask to it in every block.
        bias = torch.zeros_like(attended, dtype=text.dtype).masked_fill(~attended, -math.inf)
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

    def _with_concat_latents(self, x: Latents, cond: Conditioning) -> Float[Tensor, "b k l h w"]:
        given = 0 if cond.concat_latents is None else cond.concat_latents.shape[1]
        if given != self.extra_in_channels:
            raise UserError(
                f"got {given} channels in Conditioning.concat_latents; expected {self.extra_in_channels}: set it with "
                "avatar.conditioning.image_to_video"
            )
        if (cond.image is None) != (self.image is None):
            got, expected = ("none", "some") if self.image else ("some", "none")
            raise UserError(f"got {got} image features; expected {expected}: see Conditioning.image")
        return x if cond.concat_latents is None else torch.cat([x, cond.concat_latents], dim=1)
