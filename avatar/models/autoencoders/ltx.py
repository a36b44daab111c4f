"""LTX-Video's autoencoder, 32×32×8 with 128 channels (arXiv:2501.00103).

The network and weights are diffusers', whose causal convolutions pad a clip on the left with copies of its first frame.
In a stream only the first piece is padded so: layers with a temporal receptive field are replaced by ones with a cache,
with the same weights under the same names.

The encoder is causal. The public decoders are not: they decode whole clips, and no stream.
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

Features = Float[Tensor, "b _ _ _ _"]  # b c l h w, of which a layer may change c l h w

# diffusers' blocks hand nothing down to their convolutions but the features: what the running stream remembers, and
# whether this is its first piece, lie here while they run.
_RUNNING: ContextVar[tuple[Memory, bool]] = ContextVar("running")


class CausalConv(nn.Module):
    """A convolution over time that goes on where the last piece ended."""

    def __init__(self, given: ltx.LTXVideoCausalConv3d):
        super().__init__()
        self.conv = given.conv
        self.before = given.kernel_size[0] - 1
        self.kept = given.kernel_size[0] - self.conv.stride[0]

    def forward(self, x: Features) -> Features:
        if self.before:
            memory, first = _RUNNING.get()
            before = x[:, :, :1].expand(-1, -1, self.before, -1, -1) if first else memory[self]
            x = torch.cat([before, x], dim=2)
            memory[self] = x[:, :, x.shape[2] - self.kept :].clone()  # a view would hold all of x
        return self.conv(x)


class Upsampler(nn.Module):
    """Channels unfolded into time and space; what the first latent has beyond one frame is dropped."""

    def __init__(self, given: ltx.LTXVideoUpsampler3d):
        super().__init__()
        self.conv, self.stride, self.residual = given.conv, given.stride, given.residual
        self.repeats = given.stride[0] * given.stride[1] * given.stride[2] // given.upscale_factor

    def forward(self, x: Features) -> Features:
        y = self._unfolded(self.conv(x))
        return y + self._unfolded(x).repeat(1, self.repeats, 1, 1, 1) if self.residual else y

    def _unfolded(self, x: Features) -> Features:
        s, p, q = self.stride
        y = rearrange(x, "b (c s p q) l h w -> b c (l s) (h p) (w q)", s=s, p=p, q=q)
        return y[:, :, s - 1 :] if _RUNNING.get()[1] else y


class Downsampler(nn.Module):
    """Time and space folded into channels; the first frame makes a group of its own, repeated."""

    def __init__(self, given: ltx.LTXVideoDownsampler3d):
        super().__init__()
        self.conv, self.stride, self.group = given.conv, given.stride, given.group_size

    def forward(self, x: Features) -> Features:
        if _RUNNING.get()[1]:
            x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
        return self._folded(self.conv(x)) + reduce(self._folded(x), "b (c g) l h w -> b c l h w", "mean", g=self.group)

    def _folded(self, x: Features) -> Features:
        s, p, q = self.stride
        return rearrange(x, "b c (l s) (h p) (w q) -> b (c s p q) l h w", s=s, p=p, q=q)


REMEMBERING = {
    ltx.LTXVideoCausalConv3d: CausalConv,
    ltx.LTXVideoUpsampler3d: Upsampler,
    ltx.LTXVideoDownsampler3d: Downsampler,
}


class LTXAutoencoder(FromDiffusers, StreamedAutoencoder):
    """`AutoencoderKLLTXVideo` behind the protocol of all autoencoders: latents are the posterior's mean, normalised.

    Decoders that are conditioned on a timestep (0.9.1 and later) get t = 0: latents are clean.

    Args:
        config: constructor arguments of `AutoencoderKLLTXVideo`.

    Raises:
        UserError: an encoder that looks ahead, from whose latents nothing could be streamed.
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
            raise UserError("encoder_causal is false, so latents look ahead of their frames; take a causal encoder")
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
        """Raises UserError for a decoder that looks ahead, or whose noise of its own no two decodes share."""
        if not self.causal or self.noisy:
            why = "draws noise of its own (decoder_inject_noise)" if self.causal else "looks ahead (no decoder_causal)"
            raise UserError(
                f"a decoder that {why} decodes whole clips only; for a stream, distil a causal one for its latents: "
                "python train.py objective=decoder_distillation autoencoder=ltx"
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
    """Replace the layers that look back or change time's length, the inner ones first."""
    for name, child in module.named_children():
        _cache_context(child)
        if replacement := REMEMBERING.get(type(child)):
            setattr(module, name, replacement(child))
