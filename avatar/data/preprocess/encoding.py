"""Latents, audio features and text features of clips, encoded before training. Each encoder is optional."""

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
from avatar.data.shard_batches import encode_frames
from avatar.errors import UserError
from avatar.protocols import AudioEncoder, TextEncoder, VideoAutoencoder


@dataclass(frozen=True)
class Encoders:
    """The encoders of a data set; None where there is none. Their fingerprints are stored."""

    autoencoder: VideoAutoencoder | None = None
    audio: AudioEncoder | None = None
    text: TextEncoder | None = None

    def check(self, temporal_stride: int, multiple: int) -> None:
        """Raise UserError if the strides of the clips differ from the autoencoder's."""
        net = self.autoencoder
        if net is not None and (net.temporal_stride != temporal_stride or multiple % net.spatial_stride):
            raise UserError(
                f"got rules.temporal_stride={temporal_stride} and rules.multiple={multiple}; expected the strides of "
                f"the autoencoder, {net.temporal_stride} frames and multiples of {net.spatial_stride} pixels: change "
                "these settings or the autoencoder"
            )

    def fingerprints(self) -> dict[str, Any]:
        """The fingerprint of each encoder, as stored in `meta.json`."""
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
        audio: Float32[np.ndarray, " s"],
        clip: slice,
        caption: str | None,
    ) -> None:
        """Write `latent.npy`, `ref_latent.npy`, `afeat.npy` and `text.npy`, each if its encoder is given.

        Args:
            stem: path to which these names are appended.
            frames: RGB frames of the clip; None without an autoencoder.
            reference: path of `ref.png`.
            audio: samples of the clip and of the frames before and after it that its features depend on.
            clip: the frames of the clip within `audio`.
            caption: None: no text features.

        Raises:
            Rejected: "bad_caption" if the text encoder rejects the caption.
        """
        if self.autoencoder is not None:
            assert frames is not None
            _save(stem, "latent", encode_frames(frames, self.autoencoder)[0].half())
            with Image.open(reference) as image:
                _save(stem, "ref_latent", encode_frames(np.array(image)[None], self.autoencoder)[0].half())
        if self.audio is not None:
            features = audio_timeline.features_until(self.audio, torch.from_numpy(audio), first=-1 - clip.start)
            _save(stem, "afeat", features[clip, None].half())
        if self.text is not None and caption is not None:
            try:
                _save(stem, "text", encode_prompt(caption, self.text))
            except UserError as error:
                raise Rejected("bad_caption", str(error)) from None


def _save(stem: Path, name: str, tensor: Tensor) -> None:
    np.save(stem.with_name(f"{stem.name}.{name}.npy"), tensor.cpu().numpy())
