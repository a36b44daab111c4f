"""Log-mel features per frame, without weights.

A frame of 640 samples has four hops of 160. The spectrum of a hop is computed over 400 samples centred on it, so it
reaches 120 samples past its end, and a frame's features need 120 samples of the next frame. The latency of a latent is
therefore its own frames, the `right_context` after them, and these 120 samples (7.5 ms).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import librosa
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from avatar.errors import UserError, require_int
from avatar.types import SAMPLE_RATE, SAMPLES_PER_FRAME

HOP, WINDOW = 160, 400
OVERLAP = (WINDOW - HOP) // 2  # samples of a hop's window beyond each end of the hop


@dataclass(frozen=True)
class LogMel:
    """Audio encoder: log-mel energies of the four hops of a frame, scaled to about unit range.

    Args:
        mels: bands of the filterbank; a frame has 4 · mels features.
        left_context, right_context: feature frames of a latent's window before and after its own frames, at least 1.

    Raises:
        UserError: a size below 1.
    """

    hop_frames: ClassVar[int] = 1  # frames whose features are computed together
    left_samples: ClassVar[int] = OVERLAP  # samples before a frame that its features depend on
    lookahead_samples: ClassVar[int] = OVERLAP  # samples after it
    num_layers: ClassVar[int] = 1
    mels: int = 40
    left_context: int = 3
    right_context: int = 2

    def __post_init__(self):
        require_int(1, mels=self.mels)
        if self.right_context < 1 or self.left_context < 1:
            raise UserError(
                f"got left_context={self.left_context}, right_context={self.right_context}; expected at least 1 each, "
                "for the windows of a frame's hops: raise them"
            )

    @property
    def fingerprint(self) -> str:
        """The settings that features depend on."""
        return f"log_mel(mels={self.mels},left_context={self.left_context},right_context={self.right_context})"

    @property
    def dim(self) -> int:
        """Features per frame."""
        return self.mels * SAMPLES_PER_FRAME // HOP

    def tokens(self, stride: int) -> int:
        """Audio tokens per latent of `stride` frames: one per frame, contexts included."""
        return self.left_context + stride + self.right_context

    def encode(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of all complete frames; samples are padded with silence at both ends."""
        frames = samples.shape[-1] // SAMPLES_PER_FRAME
        padded = torch.nn.functional.pad(samples[: frames * SAMPLES_PER_FRAME], (OVERLAP, OVERLAP))
        return self.interior(padded)

    def interior(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of complete frames, from samples with `OVERLAP` more at each end."""
        if samples.shape[-1] < WINDOW:
            return samples.new_zeros(0, self.dim)
        hops = samples.unfold(-1, WINDOW, HOP) * self._window.to(samples)
        power = torch.fft.rfft(hops, n=512).abs().square()
        energy = torch.log10(torch.clamp(power @ self._filters.to(samples), min=1e-6))
        per_frame = SAMPLES_PER_FRAME // HOP
        return rearrange((energy + 2.0) / 2.0, "(f k) m -> f (k m)", k=per_frame)

    def window(self, features: Float[Tensor, "f d"], stride: int) -> Float[Tensor, "l k d"]:
        """The window of each latent of `stride` frames; `features` include the contexts at both ends."""
        return features.unfold(0, self.tokens(stride), stride).transpose(1, 2)

    @cached_property
    def silence(self) -> Float[Tensor, "1 d"]:
        """The features of a silent frame."""
        return self.interior(torch.zeros(SAMPLES_PER_FRAME + 2 * OVERLAP))

    @cached_property
    def _window(self) -> Tensor:
        return torch.hann_window(WINDOW)

    @cached_property
    def _filters(self) -> Tensor:
        return torch.from_numpy(librosa.filters.mel(sr=SAMPLE_RATE, n_fft=512, n_mels=self.mels).T.copy())
