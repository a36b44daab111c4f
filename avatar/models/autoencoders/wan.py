"""Wan's video autoencoders, 2.1 (8×8×4, 16 channels) and 2.2 (16×16×4, 48 channels), arXiv:2503.20314.

The networks and weights are diffusers'. They run piece by piece, first one frame and then the frames of a latent at a
time. Their convolutions over time cache the last two inputs in a list that the caller passes: an attribute in
`AutoencoderKLWan`, a part of the stream here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from einops import rearrange
from torch import nn

from avatar.errors import UserError
from avatar.models.autoencoders.diffusers_folder import FromDiffusers
from avatar.models.autoencoders.normalise import Normalise
from avatar.models.autoencoders.stream import Memory
from avatar.models.autoencoders.streamed import StreamedAutoencoder
from avatar.types import Latents, Pixels


class WanAutoencoder(FromDiffusers, StreamedAutoencoder):
    """Wan's autoencoder: a wrapper of diffusers' `AutoencoderKLWan`.

    Latents are the mean of the posterior, normalised.

    Args:
        config: constructor arguments of `AutoencoderKLWan`; an empty mapping gives Wan 2.1's.

    Raises:
        UserError: statistics for another number of channels.
    """

    diffusers_class = AutoencoderKLWan
    example = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    decoder_parts = ("decoder", "post_quant_conv")

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self._take(AutoencoderKLWan(**config))

    def _take(self, net: AutoencoderKLWan) -> None:
        config: Any = net.config
        self.channels, self.patch = config.z_dim, config.patch_size or 1
        self.temporal_stride = 2 ** sum(config.temperal_downsample)
        self.spatial_stride = self.patch * 2 ** (len(config.dim_mult) - 1)
        if len(config.latents_mean) != self.channels:
            raise UserError(
                f"got {len(config.latents_mean)} means and standard deviations for {self.channels} channels; expected "
                "one per channel: set latents_mean and latents_std for z_dim channels"
            )
        self.normalise = Normalise(config.latents_mean, config.latents_std)
        self.encoder, self.quant_conv = net.encoder, net.quant_conv
        self.decoder, self.post_quant_conv = net.decoder, net.post_quant_conv

    def _encode_piece(self, video: Pixels, memory: Memory, first: bool) -> Latents:
        x = rearrange(video, "b c f (h p) (w q) -> b (c q p) f h w", p=self.patch, q=self.patch)
        latents = video.shape[2] // self.temporal_stride
        groups = x.split([1] * first + [self.temporal_stride] * latents, dim=2)
        cache = _feature_cache(self.encoder, memory)
        moments = [self.encoder(group, feat_cache=cache, feat_idx=[0]) for group in groups]
        memory.update(enumerate(cache))
        return self.normalise(self.quant_conv(torch.cat(moments, dim=2))[:, : self.channels])

    def _decode_piece(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        z = self.post_quant_conv(self.normalise.inverse(latents))
        cache = _feature_cache(self.decoder, memory)
        frames = [
            self.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=first and i == 0)
            for i, latent in enumerate(z.split(1, dim=2))
        ]
        memory.update(enumerate(cache))
        x = rearrange(torch.cat(frames, dim=2), "b (c q p) f h w -> b c f (h p) (w q)", p=self.patch, q=self.patch)
        return x.clamp(-1, 1)


def _feature_cache(coder: nn.Module, memory: Memory) -> list[Any]:
    """The caches of the encoder's or decoder's convolutions over time, in the order of their calls."""
    return [memory.get(i) for i in range(sum(isinstance(module, WanCausalConv3d) for module in coder.modules()))]
