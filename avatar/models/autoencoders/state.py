"""The state world's autoencoder: a "frame" is the puppet's state vector, a latent holds those of four frames.

Nothing is learned and nothing lost, so what a model of this world gets wrong is the model's. Its frames are drawn by
the world's renderer when somebody wants to look.
"""

from typing import Any

from einops import rearrange
from torch import nn

from avatar.models.autoencoders.normalise import Normalise
from avatar.models.autoencoders.stream import Memory, Stream, check_video, padded
from avatar.types import Latents, Pixels


class StateAutoencoder(nn.Module):
    """States `b s f 1 1` ↔ latents `b (s 4) l 1 1`; the first frame's latent is that frame four times over.

    Args:
        mean, std: of each channel of the state, so that latents have unit variance.
    """

    temporal_stride, spatial_stride = 4, 1
    origin: Any

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.channels = len(mean) * self.temporal_stride
        self.normalise = Normalise(mean, std)

    def encode(self, video: Pixels) -> Latents:
        return self.encoder_stream().push(video)

    def decode(self, latents: Latents) -> Pixels:
        return self.decoder_stream().push(latents)

    def encoder_stream(self) -> Stream:
        return Stream(self._encoded)

    def decoder_stream(self) -> Stream:
        return Stream(self._decoded)

    def _encoded(self, video: Pixels, memory: Memory, first: bool) -> Latents:
        check_video(video, first, self.temporal_stride, self.spatial_stride)
        x = self.normalise(video)
        x = padded(x, self.temporal_stride) if first else x
        return rearrange(x, "b s (l k) h w -> b (s k) l h w", k=self.temporal_stride)

    def _decoded(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        states = rearrange(latents, "b (s k) l h w -> b s (l k) h w", k=self.temporal_stride)
        return self.normalise.inverse(states)[:, :, self.temporal_stride - 1 if first else 0 :]
