"""Samples in, the sound around each latent out, as it becomes known.

Latent l of a timeline with stride s hears the features of frames [s·l - left, s·(l+1) + right). Features come a hop of
frames at a time and depend on `reach` samples after their hop, so latent l is known once (see
`avatar.conditioning.audio_timeline`)

    640 hop ⌈(s (l + 1) + right) / hop⌉ + reach    samples

have come. Before the timeline stand `left` frames of the encoder's silence.

Features are made hop by hop, each from a piece of sound of one fixed length: the bits that come out never depend on
how the sound was cut into packets, and equal what `encode` makes of the whole track.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.conditioning import audio_timeline
from avatar.errors import UserError
from avatar.protocols import AudioEncoder
from avatar.types import SAMPLES_PER_FRAME


class AudioWindow:
    """The sound of one role, on its way from packets to latents.

    Args:
        encoder: makes the features.
        stride: frames per latent.
        history: latents that `rewind` can go back by; their sound is kept.
    """

    def __init__(self, encoder: AudioEncoder, stride: int, history: int = 0):
        self.encoder, self.stride, self.history = encoder, stride, history
        self.latent, self.frame, self.received = 0, 0, 0  # the next to leave, the next to encode, samples so far
        self.start = -encoder.left_samples  # where on the timeline `samples` begins
        self.samples = torch.zeros(encoder.left_samples)
        self.features = audio_timeline.silent_features(
            encoder, -encoder.left_context, encoder.left_context
        )  # of those before `frame`

    def samples_needed(self, latents: int) -> int:
        """Samples after which so many latents are known."""
        return audio_timeline.samples_needed(self.encoder, latents * self.stride + self.encoder.right_context)

    def push(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "l k d"]:
        """The windows of the latents that these samples complete."""
        self.samples = torch.cat([self.samples, samples])
        self.received += len(samples)
        rows = [self.features]
        while self.received >= audio_timeline.samples_needed(self.encoder, self.frame + self.encoder.hop_frames):
            rows.append(self._hop())
            self.frame += self.encoder.hop_frames
        self.features = torch.cat(rows)
        begun = self._first(self.latent) - (self.frame - len(self.features))  # rows before what the next latent hears
        features, tokens = self.features[begun:], self.encoder.tokens(self.stride)
        if len(features) < tokens:
            return self.features.new_zeros(0, tokens, self.encoder.dim)
        windows = self.encoder.window(features, self.stride)
        self.latent += len(windows)
        self.features = features[len(windows) * self.stride :].clone()  # a view would keep all of it alive
        self._forget()
        return windows

    def finish(self) -> Float[Tensor, "l k d"]:
        """The windows of the last latents that anything was heard of, followed by silence."""
        latents = -(-self.received // (self.stride * SAMPLES_PER_FRAME))
        missing = self.samples_needed(latents) - self.received if latents > self.latent else 0
        return self.push(torch.zeros(missing))

    def rewind(self, latent: int) -> None:
        """Go back to the start of a latent: what was heard from there on has never come."""
        if not max(0, self.latent - self.history) <= latent <= self.latent:
            raise UserError(
                f"latent {latent} to go back to, from latent {self.latent} with a history of {self.history}; "
                "choose a later one or keep a longer history"
            )
        self.latent, self.frame = latent, self._hop_of(latent)
        self.received = latent * self.stride * SAMPLES_PER_FRAME
        self.samples = self.samples[: self.received - self.start]
        silent = max(0, -self._first(latent))
        self.features = audio_timeline.silent_features(self.encoder, -silent, silent)

    def _first(self, latent: int) -> int:
        """The first frame that a latent hears."""
        return latent * self.stride - self.encoder.left_context

    def _hop_of(self, latent: int) -> int:
        """Where the hop begins that holds the first frame of sound that a latent hears."""
        return max(0, self._first(latent)) // self.encoder.hop_frames * self.encoder.hop_frames

    def _hop(self) -> Float[Tensor, "h d"]:
        """The features of the next hop, from no more of its surroundings than they depend on."""
        begin = self.frame * SAMPLES_PER_FRAME - self.encoder.left_samples - self.start
        length = (
            self.encoder.left_samples + self.encoder.hop_frames * SAMPLES_PER_FRAME + self.encoder.lookahead_samples
        )
        return self.encoder.interior(self.samples[begin : begin + length])

    def _forget(self) -> None:
        """Let go of the sound that neither a coming hop nor a rewind asks for."""
        oldest = min(self.frame, self._hop_of(self.latent - self.history))
        gone = max(0, oldest * SAMPLES_PER_FRAME - self.encoder.left_samples - self.start)
        self.samples, self.start = self.samples[gone:].clone(), self.start + gone
