"""The state world's autoencoder: a "frame" is the puppet's state vector, a latent holds those of four frames.

Nothing is learned and nothing lost, so what a model of this world gets wrong is the model's. Its frames are drawn by
the world's renderer when somebody wants to look.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from avatar.types import Latents, Pixels


class StateAutoencoder(nn.Module):
    """States `b s f 1 1` ↔ latents `b (s 4) l 1 1`; the first frame's latent is that frame four times over.

    Args:
        mean, std: of each channel of the state, so that latents have unit variance.
    """

    temporal_stride, spatial_stride = 4, 1
    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"{len(mean)} means and {len(std)} deviations, the least {min(std)}; give pairs, std > 0")
        self.channels = len(mean) * self.temporal_stride
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1, 1))

    def encode(self, video: Pixels) -> Latents:
        frames = video.shape[2]
        if frames % self.temporal_stride != 1:
            raise ValueError(f"{frames} frames of states; this autoencoder takes 1 + 4k: crop them")
        x = (video - self.mean) / self.std
        x = torch.cat([x[:, :, :1].expand(-1, -1, self.temporal_stride - 1, -1, -1), x], dim=2)
        return rearrange(x, "b s (l k) h w -> b (s k) l h w", k=self.temporal_stride)

    def decode(self, latents: Latents) -> Pixels:
        return self._frames(latents)[:, :, self.temporal_stride - 1 :]

    def decoder_stream(self) -> "Stream":
        return Stream(self)

    def _frames(self, latents: Latents) -> Pixels:
        return rearrange(latents, "b (s k) l h w -> b s (l k) h w", k=self.temporal_stride) * self.std + self.mean


class Stream:
    """Nothing is remembered but whether the reference, of one frame, has been."""

    def __init__(self, autoencoder: StateAutoencoder):
        self.autoencoder, self.primed = autoencoder, False

    def push(self, latents: Latents) -> Pixels:
        frames = self.autoencoder._frames(latents)
        skipped = 0 if self.primed else self.autoencoder.temporal_stride - 1
        self.primed = True
        return frames[:, :, skipped:]

    def snapshot(self) -> Any:
        return self.primed

    def restore(self, snapshot: Any) -> None:
        self.primed = snapshot
