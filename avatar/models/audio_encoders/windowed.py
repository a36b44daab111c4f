"""Windowed features of frozen bidirectional speech networks, the same for every cut of the audio.

Such networks are bidirectional, so a frame's features would change with every new packet of audio. Here each hop j of
`hop_frames` frames has its own window on the fixed grid of the timeline,

    [hop_frames j - past, hop_frames (j + 1) + future) frames,

and its features depend on that window alone: those of full clips and of streams are equal. 50 states per second become
25 by the mean within a frame.

The states of all layers are concatenated, each with unit variance over its channels. They are frozen and can be stored
in a data set; their mix is learned with the backbone (`avatar.nn.embeddings.LayerMix`).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.types import SAMPLES_PER_FRAME

BATCH = 16  # windows per forward pass


@runtime_checkable
class SpeechNetwork(Protocol):
    """Interface of speech networks: windows of audio → the states of all layers, aligned with the frames."""

    width: int  # channels d of a state
    depth: int  # number y of states: the first layer's input, and every layer's output
    margins: tuple[int, int]  # samples before a window's first frame and after its last frame that are passed too

    @property
    def fingerprint(self) -> str:
        """The weights, independent of their path, and the settings that states depend on."""
        ...

    def check(self, frames: int) -> None:
        """Raise UserError if windows of this many frames are too long."""
        ...

    def __call__(self, windows: Float[Tensor, "n s"]) -> Float[Tensor, "n y t d"]:
        """States of n windows of s samples; t is a multiple of the window's frames."""
        ...

    def parameters(self) -> object: ...


class WindowedEncoder(nn.Module):
    """Audio encoder (see `avatar.protocols.AudioEncoder`): a frozen speech network on sliding windows.

    The latency beyond a latent's own frames is `right_context`, rounded up to complete hops, plus `future`.

    Args:
        network: the frozen speech network.
        past: frames of audio in a window before its hop, at least 1.
        future: frames of audio in a window after its hop, at least 0.
        hop_frames: frames that share a window, a divisor of a latent's frames. Half as many cost twice as much.
        left_context, right_context: feature frames of a latent's window before and after its own frames, at least 1
            and 0.
        layers: indices of the states to keep, below the network's `depth`; None: all of them.

    Raises:
        UserError: a size below its minimum, unknown layers, or windows that are too long for the network.
    """

    def __init__(
        self,
        network: SpeechNetwork,
        past: int = 50,
        future: int = 2,
        hop_frames: int = 4,
        left_context: int = 3,
        right_context: int = 0,
        layers: Sequence[int] | None = None,
    ):
        super().__init__()
        if past < 1 or future < 0 or hop_frames < 1 or left_context < 1 or right_context < 0:
            raise UserError(
                f"got past={past}, future={future}, hop_frames={hop_frames}, left_context={left_context}, "
                f"right_context={right_context}; expected at least 1, 0, 1, 1 and 0: raise them"
            )
        self.network, self.past, self.future, self.hop_frames = network, past, future, hop_frames
        self.left_context, self.right_context = left_context, right_context
        self.layers = list(range(network.depth)) if layers is None else list(layers)
        if not self.layers or not all(0 <= layer < network.depth for layer in self.layers):
            raise UserError(
                f"got layers={self.layers}; expected some of 0 to {network.depth - 1}, or null: change them"
            )
        network.check(past + hop_frames + future)
        before, after = network.margins
        self.left_samples, self.lookahead_samples = (
            past * SAMPLES_PER_FRAME + before,
            future * SAMPLES_PER_FRAME + after,
        )

    @property
    def fingerprint(self) -> str:
        """The weights and settings that features depend on."""
        names = ("past", "future", "hop_frames", "left_context", "right_context", "layers")
        settings = ",".join(f"{name}={getattr(self, name)}" for name in names)
        return f"windowed({self.network.fingerprint},{settings})".replace(" ", "")

    @property
    def dim(self) -> int:
        """Features per frame, of all layers together."""
        return len(self.layers) * self.network.width

    @property
    def num_layers(self) -> int:
        """Layers whose states are concatenated in the features."""
        return len(self.layers)

    def tokens(self, stride: int) -> int:
        """Audio tokens per latent of `stride` frames: one per frame, contexts included."""
        if stride % self.hop_frames:
            raise UserError(
                f"got a hop of {self.hop_frames} frames with latents of {stride}; expected a divisor: change hop_frames"
            )
        return self.left_context + stride + self.right_context

    def encode(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of all complete frames, of which the first begins a hop; samples are padded with silence."""
        frames = len(samples) // SAMPLES_PER_FRAME
        hops = math.ceil(frames / self.hop_frames)
        missing = (hops * self.hop_frames - frames) * SAMPLES_PER_FRAME
        padded = nn.functional.pad(
            samples[: frames * SAMPLES_PER_FRAME], (self.left_samples, missing + self.lookahead_samples)
        )
        return self.interior(padded)[:frames]

    @torch.no_grad()
    def interior(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of complete hops, from samples with `left_samples` before and `lookahead_samples` after them."""
        step = self.hop_frames * SAMPLES_PER_FRAME
        size = self.left_samples + step + self.lookahead_samples
        if len(samples) < size:
            return samples.new_zeros(0, self.dim)
        windows = samples.unfold(0, size, step)
        return torch.cat([self._features(part) for part in windows.split(BATCH)]).flatten(0, 1).to(samples)

    def window(self, features: Float[Tensor, "f d"], stride: int) -> Float[Tensor, "l k d"]:
        """The window of each latent of `stride` frames; `features` include the contexts at both ends."""
        return features.unfold(0, self.tokens(stride), stride).transpose(1, 2)

    @cached_property
    def silence(self) -> Float[Tensor, "h d"]:
        """The features of a hop of silence, surrounded by silence."""
        return self.interior(
            torch.zeros(self.left_samples + self.hop_frames * SAMPLES_PER_FRAME + self.lookahead_samples)
        )

    def _features(self, windows: Float[Tensor, "n s"]) -> Float[Tensor, "n h d"]:
        device = next(self.parameters()).device
        states = self.network(windows.to(device))[:, self.layers]
        frames = self.past + self.hop_frames + self.future
        states = reduce(states, "n y (f t) d -> n y f d", "mean", f=frames)[
            :, :, self.past : self.past + self.hop_frames
        ]
        return rearrange(nn.functional.layer_norm(states, states.shape[-1:]), "n y h d -> n h (y d)")
