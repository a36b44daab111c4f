"""LTX-Video's autoencoder, 32×32×8 with 128 channels (arXiv:2501.00103).

The network and weights are diffusers', whose causal convolutions pad a clip on the left with copies of its first frame.
In a stream only the first piece is padded like this: layers with a temporal receptive field are replaced by layers with
a cache, with the same weights under the same names.

The encoder is causal. The public decoders are not: they decode full clips only, not streams.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_ltx as ltx
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.models.autoencoders.diffusers_folder import FromDiffusers
from avatar.models.autoencoders.normalise import Normalise
from avatar.models.autoencoders.stream import Memory, Stream
from avatar.models.autoencoders.streamed import StreamedAutoencoder
from avatar.types import Latents, Pixels

Features = Float[Tensor, "b _ _ _ _"]  # b c l h w; a layer may change c, l, h and w

# The cache of the running stream, and whether this is its first piece. diffusers' blocks pass nothing but features to
# their convolutions, so these are read from here.
_RUNNING: ContextVar[tuple[Memory, bool]] = ContextVar("running")


class CausalConv(nn.Module):
    """Causal convolution over time that continues where the last piece ended."""

    def __init__(self, layer: ltx.LTXVideoCausalConv3d):
        super().__init__()
        self.conv = layer.conv
        self.padding = layer.kernel_size[0] - 1
        self.cached = layer.kernel_size[0] - self.conv.stride[0]

    def forward(self, x: Features) -> Features:
        if self.padding:
            memory, first = _RUNNING.get()
            before = x[:, :, :1].expand(-1, -1, self.padding, -1, -1) if first else memory[self]
            x = torch.cat([before, x], dim=2)
            memory[self] = x[:, :, x.shape[2] - self.cached :].clone()  # a view would keep all of x in memory
        return self.conv(x)


class Upsampler(nn.Module):
    """Upsampling: channels are unfolded into time and space; of the first latent only the last frame is kept."""

    def __init__(self, layer: ltx.LTXVideoUpsampler3d):
        super().__init__()
        self.conv, self.stride, self.residual = layer.conv, layer.stride, layer.residual
        self.repeats = layer.stride[0] * layer.stride[1] * layer.stride[2] // layer.upscale_factor

    def forward(self, x: Features) -> Features:
        y = self._unfolded(self.conv(x))
        return y + self._unfolded(x).repeat(1, self.repeats, 1, 1, 1) if self.residual else y

    def _unfolded(self, x: Features) -> Features:
        s, p, q = self.stride
        y = rearrange(x, "b (c s p q) l h w -> b c (l s) (h p) (w q)", s=s, p=p, q=q)
        return y[:, :, s - 1 :] if _RUNNING.get()[1] else y


class Downsampler(nn.Module):
    """Downsampling: time and space are folded into channels; the first frame, repeated, is a group of its own."""

    def __init__(self, layer: ltx.LTXVideoDownsampler3d):
        super().__init__()
        self.conv, self.stride, self.group = layer.conv, layer.stride, layer.group_size

    def forward(self, x: Features) -> Features:
        if _RUNNING.get()[1]:
            x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
        return self._folded(self.conv(x)) + reduce(self._folded(x), "b (c g) l h w -> b c l h w", "mean", g=self.group)

    def _folded(self, x: Features) -> Features:
        s, p, q = self.stride
        return rearrange(x, "b c (l s) (h p) (w q) -> b (c s p q) l h w", s=s, p=p, q=q)


CACHING_LAYERS = {  # diffusers' layer → its replacement
    ltx.LTXVideoCausalConv3d: CausalConv,
    ltx.LTXVideoUpsampler3d: Upsampler,
    ltx.LTXVideoDownsampler3d: Downsampler,
}


class LTXAutoencoder(FromDiffusers, StreamedAutoencoder):
    """LTX-Video's autoencoder: a wrapper of diffusers' `AutoencoderKLLTXVideo`.

    Latents are the mean of the posterior, normalised. Decoders that are conditioned on a timestep (0.9.1 and later) get
    t = 0, since the latents are clean.

    Args:
        config: constructor arguments of `AutoencoderKLLTXVideo`.

    Raises:
        UserError: a non-causal encoder, whose latents can't be streamed.
    """

    diffusers_class = AutoencoderKLLTXVideo
    example = "Lightricks/LTX-Video"
    decoder_parts = ("decoder",)

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self._take(AutoencoderKLLTXVideo(**config))

    def _take(self, net: AutoencoderKLLTXVideo) -> None:
        config: Any = net.config
        if not config.encoder_causal:
            raise UserError(
                "got encoder_causal=false, so latents depend on later frames; expected true: choose a causal encoder"
            )
        self.channels = config.latent_channels
        self.temporal_stride, self.spatial_stride = net.temporal_compression_ratio, net.spatial_compression_ratio
        self.causal, self.timed = config.decoder_causal, config.timestep_conditioning
        self.noisy = any(config.decoder_inject_noise)
        std = net.latents_std / config.scaling_factor
        self.normalise = Normalise(net.latents_mean, std)
        self.encoder, self.decoder = net.encoder, net.decoder
        _cache_context(self.encoder)
        if self.causal:
            _cache_context(self.decoder)

    def decode(self, latents: Latents) -> Pixels:
        """The 1 + 8k frames of 1 + k latents, about within [-1, 1]."""
        return self._decode_piece(latents, {}, True)

    def decoder_stream(self) -> Stream:
        """A new decoding stream. Raises UserError for a decoder that is not causal or that draws noise."""
        if not self.causal or self.noisy:
            why = "draws noise (decoder_inject_noise)" if self.causal else "is not causal (decoder_causal)"
            raise UserError(
                f"got a decoder that {why}; expected a causal one without noise for a stream: distil one for its "
                "latents by python train.py objective=decoder_distillation autoencoder=ltx"
            )
        return Stream(self._decode_piece)

    def _encode_piece(self, video: Pixels, memory: Memory, first: bool) -> Latents:
        with _running(memory, first):
            return self.normalise(self.encoder(video)[:, : self.channels])

    def _decode_piece(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        clean = latents.new_zeros(len(latents)) if self.timed else None
        with _running(memory, first):
            return self.decoder(self.normalise.inverse(latents), clean)


@contextmanager
def _running(memory: Memory, first: bool) -> Iterator[None]:
    token = _RUNNING.set((memory, first))
    try:
        yield
    finally:
        _RUNNING.reset(token)


def _cache_context(module: nn.Module) -> None:
    """Replace the layers that need earlier frames or change the number of frames, the inner ones first."""
    for name, child in module.named_children():
        _cache_context(child)
        if replacement := CACHING_LAYERS.get(type(child)):
            setattr(module, name, replacement(child))
