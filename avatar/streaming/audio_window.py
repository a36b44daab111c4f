"""Samples in, the sound around each latent out, as it becomes known.

Latent l of a timeline with stride s hears the features of frames [s·l - left, s·(l+1) + right). A frame's features also
depend on `reach` samples to either side of it, so latent l is known once

    640 (s (l + 1) + right) + reach    samples

have come. Before the timeline stand `left` frames of the encoder's silence.

Features are made frame by frame, each from a piece of sound of one fixed length: the bits that come out never depend on
how the sound was cut into packets, and equal what `encode` makes of the whole track.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.types import SAMPLES_PER_FRAME, AudioEncoder


@runtime_checkable
class LocalAudioEncoder(AudioEncoder, Protocol):
    """An encoder that needs little sound beyond a frame for its features, so that they can be made while it comes."""

    reach: int  # samples before and after a frame that its features depend on


class AudioWindow:
    """The sound of one role, on its way from packets to latents.

    Args:
        encoder: makes the features.
        stride: frames per latent.
        history: latents that `rewind` can go back by; their sound is kept.
    """

    def __init__(self, encoder: LocalAudioEncoder, stride: int, history: int = 0):
        self.encoder, self.stride, self.history = encoder, stride, history
        self.margin = -(-encoder.reach // SAMPLES_PER_FRAME)  # whole frames that hold the reach
        self.latent, self.frame, self.received = 0, 0, 0  # the next to leave, the next to encode, samples so far
        self.start = -self.margin * SAMPLES_PER_FRAME  # where on the timeline `samples` begins
        self.samples = torch.zeros(-self.start)
        self.features = encoder.silence.expand(encoder.left_context, -1)  # of the frames just before `frame`

    def needed(self, latents: int) -> int:
        """Samples after which so many latents are known."""
        return (latents * self.stride + self.encoder.right_context) * SAMPLES_PER_FRAME + self.encoder.reach

    def push(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "l k d"]:
        """The windows of the latents that these samples complete."""
        self.samples = torch.cat([self.samples, samples])
        self.received += len(samples)
        rows = [self.features]
        while self.received >= (self.frame + 1) * SAMPLES_PER_FRAME + self.encoder.reach:
            rows.append(self._features(self.frame))
            self.frame += 1
        self.features = torch.cat(rows)
        tokens = self.encoder.tokens(self.stride)
        if len(self.features) < tokens:
            return self.features.new_zeros(0, tokens, self.encoder.dim)
        windows = self.encoder.window(self.features, self.stride)
        self.latent += len(windows)
        self.features = self.features[len(windows) * self.stride :].clone()  # a view would keep all of it alive
        self._forget()
        return windows

    def finish(self) -> Float[Tensor, "l k d"]:
        """The windows of the last latents that anything was heard of, followed by silence."""
        latents = -(-self.received // (self.stride * SAMPLES_PER_FRAME))
        missing = self.needed(latents) - self.received if latents > self.latent else 0
        return self.push(torch.zeros(missing))

    def rewind(self, latent: int) -> None:
        """Go back to the start of a latent: what was heard from there on has never come."""
        if not max(0, self.latent - self.history) <= latent <= self.latent:
            raise ValueError(
                f"latent {latent} to go back to, from latent {self.latent} with a history of {self.history}; "
                "choose a later one or keep a longer history"
            )
        first = latent * self.stride - self.encoder.left_context
        self.latent, self.frame, self.received = latent, max(0, first), latent * self.stride * SAMPLES_PER_FRAME
        self.samples = self.samples[: self.received - self.start]
        self.features = self.encoder.silence.expand(max(0, -first), -1)

    def _features(self, frame: int) -> Float[Tensor, "1 d"]:
        """The features of one frame, of whose surroundings no more is looked at than they depend on."""
        begin = (frame - self.margin) * SAMPLES_PER_FRAME - self.start
        known = (1 + self.margin) * SAMPLES_PER_FRAME + self.encoder.reach
        length = (1 + 2 * self.margin) * SAMPLES_PER_FRAME
        piece = torch.nn.functional.pad(self.samples[begin : begin + known], (0, length - known))
        return self.encoder.encode(piece)[self.margin : self.margin + 1]

    def _forget(self) -> None:
        """Let go of the sound that neither a coming frame nor a rewind asks for."""
        oldest = min(self.frame, (self.latent - self.history) * self.stride - self.encoder.left_context) - self.margin
        gone = max(0, oldest * SAMPLES_PER_FRAME - self.start)
        self.samples, self.start = self.samples[gone:].clone(), self.start + gone
