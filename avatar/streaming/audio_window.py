"""Streaming audio features: samples in, the feature window of each latent out.

Latent l of a timeline with stride s is conditioned on the features of frames [s·l - left, s·(l+1) + right). They are
computed a hop of frames at a time and depend on `lookahead` samples after their hop, so the window of latent l is
complete (see `avatar.conditioning.audio_timeline`) after

    640 hop ⌈(s (l + 1) + right) / hop⌉ + lookahead    samples.

Before the timeline there are `left` frames of silence.

Each hop is encoded from a piece of audio of one fixed length: the features do not depend on how the audio was cut into
packets, bit by bit, and equal those of `encode` for the full track.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.conditioning import audio_timeline
from avatar.errors import UserError
from avatar.protocols import AudioEncoder
from avatar.types import SAMPLES_PER_FRAME


class AudioWindow:
    """The audio of one role, from packets to feature windows.

    Args:
        encoder: of the features.
        stride: frames per latent.
        history: latents that `rewind` can go back by; their audio is kept.
    """

    def __init__(self, encoder: AudioEncoder, stride: int, history: int = 0):
        self.encoder, self.stride, self.history = encoder, stride, history
        self.latent, self.frame, self.received = 0, 0, 0  # the next latent, the next frame to encode, samples so far
        self.start = -encoder.left_samples  # position of `samples` on the timeline
        self.samples = torch.zeros(encoder.left_samples)
        self.features = audio_timeline.silent_features(
            encoder, -encoder.left_context, encoder.left_context
        )  # of those before `frame`

    def samples_needed(self, latents: int) -> int:
        """Samples after which the windows of the first latents are complete."""
        return audio_timeline.samples_needed(self.encoder, latents * self.stride + self.encoder.right_context)

    def push(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "l k d"]:
        """Append samples, and return the windows of the latents that they complete."""
        self.samples = torch.cat([self.samples, samples])
        self.received += len(samples)
        rows = [self.features]
        while self.received >= audio_timeline.samples_needed(self.encoder, self.frame + self.encoder.hop_frames):
            rows.append(self._hop())
            self.frame += self.encoder.hop_frames
        self.features = torch.cat(rows)
        begun = self._first(self.latent) - (
            self.frame - len(self.features)
        )  # rows before the window of the next latent
        features, tokens = self.features[begun:], self.encoder.tokens(self.stride)
        if len(features) < tokens:
            return self.features.new_zeros(0, tokens, self.encoder.dim)
        windows = self.encoder.window(features, self.stride)
        self.latent += len(windows)
        self.features = features[len(windows) * self.stride :].clone()  # a view would keep all of it alive
        self._forget()
        return windows

    def finish(self) -> Float[Tensor, "l k d"]:
        """Pad with silence, and return the windows of the last latents with audio."""
        latents = math.ceil(self.received / (self.stride * SAMPLES_PER_FRAME))
        missing = self.samples_needed(latents) - self.received if latents > self.latent else 0
        return self.push(torch.zeros(missing))

    def rewind(self, latent: int) -> None:
        """Go back to the start of a latent, and drop the audio from there on."""
        if not max(0, self.latent - self.history) <= latent <= self.latent:
            raise UserError(
                f"can't rewind to latent {latent} from latent {self.latent} with a history of {self.history}; "
                "choose a later one or keep a longer history"
            )
        self.latent, self.frame = latent, self._hop_of(latent)
        self.received = latent * self.stride * SAMPLES_PER_FRAME
        self.samples = self.samples[: self.received - self.start]
        silent = max(0, -self._first(latent))
        self.features = audio_timeline.silent_features(self.encoder, -silent, silent)

    def _first(self, latent: int) -> int:
        """The first frame of a latent's window."""
        return latent * self.stride - self.encoder.left_context

    def _hop_of(self, latent: int) -> int:
        """The first frame of the hop that contains the first frame of a latent's window."""
        return max(0, self._first(latent)) // self.encoder.hop_frames * self.encoder.hop_frames

    def _hop(self) -> Float[Tensor, "h d"]:
        """Encode the next hop, from its receptive field alone."""
        begin = self.frame * SAMPLES_PER_FRAME - self.encoder.left_samples - self.start
        length = (
            self.encoder.left_samples + self.encoder.hop_frames * SAMPLES_PER_FRAME + self.encoder.lookahead_samples
        )
        return self.encoder.interior(self.samples[begin : begin + length])

    def _forget(self) -> None:
        """Drop the audio that neither the next hop nor a rewind needs."""
        oldest = min(self.frame, self._hop_of(self.latent - self.history))
        gone = max(0, oldest * SAMPLES_PER_FRAME - self.encoder.left_samples - self.start)
        self.samples, self.start = self.samples[gone:].clone(), self.start + gone
