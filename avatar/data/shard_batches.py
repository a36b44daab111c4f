"""Batches of crops from preprocessed sets: of latents, or of frames that are encoded during training."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from avatar.media.frames import from_uint8
from avatar.protocols import VideoAutoencoder
from avatar.types import GLOBAL_BATCH, Batch, Conditioning


@dataclass(frozen=True)
class Crop:
    """A crop of one sample: latents or frames, and its conditioning without the reference."""

    key: str
    video: Float[Tensor, "c l h w"] | UInt8[Tensor, "f h w 3"]
    reference: Float[Tensor, "c 1 h w"] | UInt8[Tensor, "h w 3"]
    regions: Float[Tensor, "m l _ _"]  # share of each region in each latent pixel; zeros without boxes
    fields: dict[str, Tensor]  # of Conditioning


@dataclass
class VideoBatch:
    """A batch of frames that are not encoded yet."""

    video: list[
        UInt8[Tensor, "_ h w 3"]
    ]  # of each clip: frames before its crop, as context of the encoder, and the crop
    reference: UInt8[Tensor, "b h w 3"]
    conditioning: Conditioning  # without a reference
    regions: Float[Tensor, "b m l _ _"]  # as in Batch
    keys: list[str]
    shard: slice = field(default_factory=lambda: GLOBAL_BATCH)  # as in Batch


def collate(crops: list[Crop]) -> Batch | VideoBatch:
    """Collate crops of equal length and size; shorter texts are padded."""
    tokens = max(crop.fields["text"].shape[1] for crop in crops)
    for crop in crops:
        crop.fields.update({name: _pad_text(crop.fields[name], tokens) for name in ("text", "text_mask")})
    fields = {name: torch.stack([crop.fields[name] for crop in crops]) for name in crops[0].fields}
    keys = [crop.key for crop in crops]
    reference = torch.stack([crop.reference for crop in crops])
    regions = torch.stack([crop.regions for crop in crops])
    if crops[0].video.dtype == torch.uint8:
        cond = Conditioning(reference=torch.zeros(len(crops), 0, 1, 0, 0), **fields)
        return VideoBatch([crop.video for crop in crops], reference, cond, regions, keys)
    latents = torch.stack([crop.video for crop in crops])
    return Batch(latents, Conditioning(reference=reference, **fields), regions, keys)


def encode_batch(batch: VideoBatch, autoencoder: VideoAutoencoder) -> Batch:
    """Encode the frames of a batch, clip by clip, since the frames before their crops differ in number."""
    length = batch.conditioning.latents
    latents = torch.stack([encode_frames(video, autoencoder)[0, :, -length:] for video in batch.video])
    references = torch.cat([encode_frames(image[None], autoencoder) for image in batch.reference])
    return Batch(latents, replace(batch.conditioning, reference=references), batch.regions, batch.keys, batch.shard)


@torch.no_grad()
def encode_frames(
    frames: UInt8[Tensor, "f h w 3"] | UInt8[np.ndarray, "f h w 3"], autoencoder: VideoAutoencoder
) -> Float[Tensor, "1 c l y x"]:
    """Latents of RGB frames, batch size 1, on the device of the autoencoder."""
    weight = next(autoencoder.parameters(), torch.zeros(()))
    return autoencoder.encode(from_uint8(torch.as_tensor(frames).to(weight.device))[None])


def _pad_text(row: Shaped[Tensor, "e n ..."], tokens: int) -> Shaped[Tensor, "e m ..."]:
    return torch.cat([row, row.new_zeros(len(row), tokens - row.shape[1], *row.shape[2:])], dim=1)
