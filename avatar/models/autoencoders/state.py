"""Autoencoder of the state world: a "frame" is the puppet's state vector, a latent contains those of four frames.

It is lossless and has no parameters, so all errors are the network's. The puppet world renders its frames.
"""

from einops import rearrange

from avatar.models.autoencoders.normalise import Normalise
from avatar.models.autoencoders.stream import Memory, padded
from avatar.models.autoencoders.streamed import StreamedAutoencoder
from avatar.types import Latents, Pixels


class StateAutoencoder(StreamedAutoencoder):
    """States `b s f 1 1` ↔ latents `b (s 4) l 1 1`; the first latent is the first frame, repeated four times.

    Args:
        mean, std: statistics of each channel of the state, so that latents have unit variance.
    """

    temporal_stride, spatial_stride = 4, 1

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.channels = len(mean) * self.temporal_stride
        self.normalise = Normalise(mean, std)

    def _encode_piece(self, video: Pixels, memory: Memory, first: bool) -> Latents:
        x = self.normalise(video)
        x = padded(x, self.temporal_stride) if first else x
        return rearrange(x, "b s (l k) h w -> b (s k) l h w", k=self.temporal_stride)

    def _decode_piece(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        states = rearrange(latents, "b (s k) l h w -> b s (l k) h w", k=self.temporal_stride)
        return self.normalise.inverse(states)[:, :, self.temporal_stride - 1 if first else 0 :]
