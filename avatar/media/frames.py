"""Pixel conversion: 8-bit frames, channels last, to and from tensors in [-1, 1], channels first."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def from_uint8(frames: UInt8[np.ndarray, "f h w c"] | UInt8[Tensor, "f h w c"]) -> Float[Tensor, "c f h w"]:
    """Frames of 0 … 255 as a tensor in [-1, 1], on the device of the frames."""
    return torch.as_tensor(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f h w c"]:
    """The inverse of `from_uint8`, on the CPU; values outside [-1, 1] are clipped."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
