"""Latents, audio features and text features of clips, encoded once for training. Each encoder may be None."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from avatar.conditioning import audio_timeline
from avatar.conditioning.prompts import encode_prompt
from avatar.data.preprocess.reasons import Rejected
from avatar.errors import UserError
from avatar.media.frames import from_uint8
from avatar.protocols import AudioEncoder, TextEncoder, VideoAutoencoder


@dataclass(frozen=True)
class Encoders:
    """The encoders of a data set, recorded by their fingerprints."""

    autoencoder: VideoAutoencoder | None = None
    audio: AudioEncoder | None = None
    text: TextEncoder | None = None

    def check(self, temporal_stride: int, multiple: int) -> None:
        """Raise UserError for clips of other strides than the autoencoder's."""
        net = self.autoencoder
        if net is not None and (net.temporal_stride != temporal_stride or multiple % net.spatial_stride):
            raise UserError(
                f"clips of 1 + {temporal_stride} k frames and sides of multiples of {multiple}, but the autoencoder's "
                f"strides are {net.temporal_stride} and {net.spatial_stride}; set rules.temporal_stride and "
                "rules.multiple to these"
            )

    def line(self) -> dict[str, Any]:
        """The fingerprint of each encoder, for `meta.json`."""
        return {
            "latent": None if self.autoencoder is None else {"autoencoder": self.autoencoder.fingerprint},
            "audio_features": None if self.audio is None else self.audio.fingerprint,
            "text_features": None if self.text is None else self.text.fingerprint,
        }

    def write(
        self,
        stem: Path,
        frames: UInt8[np.ndarray, "f h w 3"] | None,
        reference: Path,
        around: Float32[np.ndarray, " s"],
        clip: slice,
        caption: str | None,
    ) -> None:
        """`latent.npy`, `ref_latent.npy`, `afeat.npy`, `text.npy`, for the encoders that are given.

        Args:
            stem: A path that these names are appended to.
            frames: The clip's pictures; None without an autoencoder.
            reference: The path of `ref.png`.
            around: The audio of the clip and of some frames before and after it.
            clip: The clip's frames within `around`.
            caption: None writes no text features.

        Raises:
            Rejected: "bad_caption" if the text encoder rejects it.
        """
        if self.autoencoder is not None:
            assert frames is not None
            _save(stem, "latent", self._latent(frames))
            with Image.open(reference) as picture:
                _save(stem, "ref_latent", self._latent(np.asarray(picture)[None]))
        if self.audio is not None:
            features = audio_timeline.features_until(self.audio, torch.from_numpy(around), first=-1 - clip.start)
            _save(stem, "afeat", features[clip, None].half())
        if self.text is not None and caption is not None:
            try:
                _save(stem, "text", encode_prompt(caption, self.text))
            except ValueError as error:
                raise Rejected("bad_caption", str(error)) from None

    @torch.inference_mode()
    def _latent(self, frames: UInt8[np.ndarray, "f h w 3"]) -> Tensor:
        """`c l h w` in fp16."""
        assert self.autoencoder is not None
        device = next(self.autoencoder.parameters(), torch.zeros(())).device
        video = from_uint8(torch.from_numpy(frames.copy()).to(device))
        return self.autoencoder.encode(video[None])[0].half().cpu()


def _save(stem: Path, name: str, tensor: Tensor) -> None:
    np.save(stem.with_name(f"{stem.name}.{name}.npy"), tensor.numpy())
