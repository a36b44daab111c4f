"""Features of frozen speech networks, the same however the sound arrives.

Such networks look both ways over all the sound they are given, so that a frame's features would change whenever more of
it comes. Here each hop of `hop` frames has a window of its own on the fixed grid of the timeline,

    [hop j - past, hop (j + 1) + future) frames,

and its features are what the network makes of exactly that: whole clips and streams agree, and 50 states a second are
brought to 25 by the mean of those within a frame.

The states of all layers come out side by side, each of unit variance over its channels. They are frozen and may lie in
a data set; how they are mixed is learned with the backbone, hence in its entrance (`avatar.nn.embeddings.LayerMix`).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.types import SAMPLES_PER_FRAME

BATCH = 16  # windows at a time


@runtime_checkable
class SpeechNetwork(Protocol):
    """Windows of sound → the states of all its layers, several for each frame, aligned with the frames.

    Its `repr` names the weights themselves, wherever they lie.
    """

    width: int  # channels of a state
    depth: int  # states that it gives: its first layer's input, and every layer's output
    margins: tuple[int, int]  # samples that it takes before a window's first frame and after its last one

    def check(self, frames: int) -> None:
        """Raise UserError for windows of so many frames that it can't look at."""
        ...

    def __call__(self, windows: Float[Tensor, "n s"]) -> Float[Tensor, "n y t d"]: ...

    def parameters(self) -> object: ...


class WindowedEncoder(nn.Module):
    """An audio encoder (see `avatar.types`) of a frozen network on trailing windows.

    Latency beyond a latent's own frames: `right_context`, up to a whole hop, and `future`.

    Args:
        network: looks at the windows.
        past: frames of sound before a hop that its features depend on.
        future: frames of sound after it.
        hop_frames: frames that share a window; a latent's frames are a multiple. Half of it costs twice as much.
        left_context, right_context: frames whose features a latent hears before and after its own.
        layers: states to keep, of the network's `depth`; None: all of them.
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
                f"past={past}, future={future}, hop_frames={hop_frames}, left_context={left_context}, right_context={right_context} "
                "frames; wanted at least 1, 0, 1, 1 and 0"
            )
        self.network, self.past, self.future, self.hop_frames = network, past, future, hop_frames
        self.left_context, self.right_context = left_context, right_context
        self.layers = list(range(network.depth)) if layers is None else list(layers)
        if strange := [layer for layer in self.layers if not 0 <= layer < network.depth] or not self.layers:
            raise UserError(f"layers={self.layers}, with {strange}; choose some of 0 to {network.depth - 1}, or null")
        network.check(past + hop_frames + future)
        before, after = network.margins
        self.left_samples, self.lookahead_samples = (
            past * SAMPLES_PER_FRAME + before,
            future * SAMPLES_PER_FRAME + after,
        )

    @property
    def dim(self) -> int:
        return len(self.layers) * self.network.width

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def tokens(self, stride: int) -> int:
        """Audio tokens per latent of `stride` frames: one per frame, contexts included."""
        if stride % self.hop_frames:
            raise UserError(
                f"a hop of {self.hop_frames} frames with latents of {stride}; choose a hop that divides these"
            )
        return self.left_context + stride + self.right_context

    def encode(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of all whole frames, of which the first begins a hop; before and after the samples is silence."""
        frames = len(samples) // SAMPLES_PER_FRAME
        whole = -(-frames // self.hop_frames) * self.hop_frames * SAMPLES_PER_FRAME
        missing = whole - frames * SAMPLES_PER_FRAME
        padded = nn.functional.pad(
            samples[: frames * SAMPLES_PER_FRAME], (self.left_samples, missing + self.lookahead_samples)
        )
        return self.interior(padded)[:frames]

    @torch.no_grad()
    def interior(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of whole hops, from samples that bring `memory` more before them and `reach` more after them."""
        step = self.hop_frames * SAMPLES_PER_FRAME
        size = self.left_samples + step + self.lookahead_samples
        if len(samples) < size:
            return samples.new_zeros(0, self.dim)
        windows = samples.unfold(0, size, step)
        return torch.cat([self._features(part) for part in windows.split(BATCH)]).flatten(0, 1).to(samples)

    def window(self, features: Float[Tensor, "f d"], stride: int) -> Float[Tensor, "l k d"]:
        """The frames that each latent of `stride` frames hears; `features` bring the contexts at both ends along."""
        return features.unfold(0, self.tokens(stride), stride).transpose(1, 2)

    @cached_property
    def silence(self) -> Float[Tensor, "h d"]:
        """The features of a hop of silence, amid silence."""
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

    def __repr__(self) -> str:
        """All that the features depend on."""
        names = ("past", "future", "hop_frames", "left_context", "right_context", "layers")
        text = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"WindowedEncoder({self.network!r}, {text})"
