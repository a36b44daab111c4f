"""Small causal convolutional video autoencoder with strides of 4 frames and 8×8 pixels or more.

1 + 4k frames have 1 + k latents: each group of four frames is one latent, and the first frame, repeated four times, is
the first group. The frames of a group and squares of 4×4 pixels are folded into channels, so that all convolutions run
at a quarter of the frame's size or less: they are cheap and learn quickly.

Convolutions over time are causal. They are padded on the left only: with the repeated first latent in a stream's first
piece, and with cached latents in later ones. So decoding in pieces equals the full decode.

Latents are normalised to zero mean and unit variance per channel. Running statistics count as constants, because batch
statistics would remove what the clips of a batch have in common, such as a palette.

The latents are not whitened: large components have more of their variance than small ones, so that losses of a
diffusion model weigh what is visible. Initially the power of a principal component with variance λ is √λ, the optimum
of linear coding for a noisy channel (Lee and Petersen, 1976).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.models.autoencoders.normalise import RunningNormalise
from avatar.models.autoencoders.stream import Memory, check_video, padded
from avatar.models.autoencoders.streamed import StreamedAutoencoder
from avatar.nn.attention import zero_init_
from avatar.types import Latents, Pixels

FOLD, GROUP = 4, 4  # pixels and frames that are folded into channels
Features = Float[Tensor, "b _ _ _ _"]  # b c l h w; a layer may change c, h and w


class CausalConv(nn.Module):
    """Causal 3-D convolution over a latent and the `kernel[0] - 1` latents before it, which `memory` caches.

    It is computed as a 2-D convolution whose batch are the latents: torch's 3-D convolution of a single clip on the CPU
    takes a slow path.
    """

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.past = kernel[0] - 1
        self.conv = nn.Conv3d(c_in, c_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Features, memory: Memory) -> Features:
        if self.past:
            before = memory[self] if self in memory else x[:, :, :1].expand(-1, -1, self.past, -1, -1)
            x = torch.cat([before, x], dim=2)
            memory[self] = x[:, :, -self.past :]
        weight = rearrange(self.conv.weight, "o c k p q -> o (c k) p q")
        windows = rearrange(x.unfold(2, self.past + 1, 1), "b c l h w k -> (b l) (c k) h w")
        y = nn.functional.conv2d(windows, weight, self.conv.bias, padding=self.conv.padding[1:])
        return rearrange(y, "(b l) c h w -> b c l h w", b=len(x))


class ResBlock(nn.Module):
    """Residual block of two convolutions, the second zero-initialised; with `past` the first is causal over time."""

    def __init__(self, channels: int, past: bool):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = CausalConv(channels, channels, (3 if past else 1, 3, 3))
        self.conv2 = CausalConv(channels, channels, (1, 3, 3))
        nn.init.zeros_(self.conv2.conv.weight)

    def forward(self, x: Features, memory: Memory) -> Features:
        y = self.conv1(nn.functional.silu(self.norm1(x)), memory)
        return x + self.conv2(nn.functional.silu(self.norm2(y)), memory)


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position, without statistics over time."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Features) -> Features:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6) * self.scale


class Halve(nn.Module):
    """Downsampling by 2×2: squares are folded into channels, then a 1×1 convolution."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = CausalConv(4 * c_in, c_out, (1, 1, 1))

    def forward(self, x: Features, memory: Memory) -> Features:
        return self.conv(rearrange(x, "b c l (h p) (w q) -> b (c p q) l h w", p=2, q=2), memory)


class Double(nn.Module):
    """Upsampling by 2×2: a 1×1 convolution, then channels are unfolded into squares."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = CausalConv(c_in, 4 * c_out, (1, 1, 1))

    def forward(self, x: Features, memory: Memory) -> Features:
        return rearrange(self.conv(x, memory), "b (c p q) l h w -> b c l (h p) (w q)", p=2, q=2)


class CausalConvAutoencoder(StreamedAutoencoder):
    """The autoencoder of the nano models: a linear map of blocks of pixels × 4 frames plus convolutions.

    The last convolutions of encoder and decoder are zero-initialised.

    Args:
        channels: channels of the latents.
        widths: feature channels at 1/4, 1/8, 1/16, … of the frame's size; the last is the size of the latents.
        reference: whether the decoder's convolutions take the stream's first latent, the reference, beside each latent:
            what stays the same in a clip need not be read from latents with errors.

    Raises:
        UserError: a size below 1, or fewer than two widths.
    """

    temporal_stride = GROUP
    decoder_parts = ("decoder", "linear_out")

    def __init__(self, channels: int = 48, widths: Sequence[int] = (80, 112), reference: bool = False):
        super().__init__()
        if len(widths) < 2 or min(channels, *widths) < 1:
            raise UserError(
                f"got channels={channels}, widths={list(widths)}; expected at least two widths, and numbers of at "
                "least 1: change them"
            )
        self.channels, self.reference = channels, reference
        self.factor = 2 ** (len(widths) - 1)  # between 1/4 of the frame's size and the latents
        self.spatial_stride = FOLD * self.factor
        folded = 3 * GROUP * FOLD * FOLD
        block = folded * self.factor**2
        self.linear_in, self.linear_out = nn.Linear(block, channels), nn.Linear(channels, block)
        encoder = [CausalConv(folded, widths[0], (1, 3, 3)), ResBlock(widths[0], past=False)]
        for c_in, c_out in pairwise(widths):
            encoder += [Halve(c_in, c_out), ResBlock(c_out, past=False)]
        self.encoder = nn.ModuleList([*encoder, CausalConv(widths[-1], channels, (1, 1, 1))])
        self.normalise = RunningNormalise(channels)
        decoder = [CausalConv((1 + reference) * channels, widths[-1], (1, 3, 3)), ResBlock(widths[-1], past=True)]
        for c_in, c_out in pairwise(reversed(widths)):
            decoder += [Double(c_in, c_out), ResBlock(c_out, past=False), ResBlock(c_out, past=False)]
        self.decoder = nn.ModuleList([*decoder, CausalConv(widths[0], folded, (1, 3, 3))])
        for last in (self.encoder[-1], self.decoder[-1]):
            zero_init_(last)

    @torch.no_grad()
    def start_from(self, video: Pixels) -> None:
        """Initialise the linear maps with the principal components of the blocks of 1 + 4k frames.

        A random rotation spreads the components over the channels, which have unit variance each.
        """
        check_video(video, True, self.temporal_stride, self.spatial_stride)
        blocks = self._blocks(_folded(video, first=True)).flatten(0, 3)
        mean = blocks.mean(dim=0)
        _, values, axes = torch.linalg.svd(blocks - mean, full_matrices=False)
        axes = axes[: self.channels]
        size = (values[: self.channels] / len(blocks) ** 0.5)[:, None]
        size = size.clamp(min=1e-3 * float(size.max()))
        gain = size.sqrt() / size.mean().sqrt()  # of components of unit variance; the mean power is 1
        mixed = torch.linalg.qr(torch.randn(len(axes), len(axes), device=video.device))[0]
        self.linear_in.weight[: len(axes)] = mixed @ (axes * gain / size)
        self.linear_in.bias.copy_(-self.linear_in.weight @ mean)
        self.linear_out.weight[:, : len(axes)] = (mixed @ (axes * size / gain)).T
        self.linear_out.bias.copy_(mean)

    def _encode_piece(self, video: Pixels, memory: Memory, first: bool) -> Latents:
        x = _folded(video, first)
        linear = rearrange(self.linear_in(self._blocks(x)), "b l h w c -> b c l h w")
        return self.normalise(linear + through(self.encoder, x, memory))

    def _decode_piece(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        blocks = self.linear_out(rearrange(latents, "b c l h w -> b l h w c"))
        linear = rearrange(blocks, "b l h w (c p q) -> b c l (h p) (w q)", p=self.factor, q=self.factor)
        if self.reference:
            first_latent = memory.setdefault(self, latents[:, :, :1])
            latents = torch.cat([latents, first_latent.expand_as(latents)], dim=1)
        x = linear + through(self.decoder, latents, memory)
        video = rearrange(x, "b (c s p q) l h w -> b c (l s) (h p) (w q)", s=GROUP, p=FOLD, q=FOLD)
        return video[:, :, GROUP - 1 if first else 0 :]

    def _blocks(self, folded: Features) -> Float[Tensor, "b l y x d"]:
        """The values of each latent pixel's block, flattened."""
        return rearrange(folded, "b c l (h p) (w q) -> b l h w (c p q)", p=self.factor, q=self.factor)


def through(layers: nn.ModuleList, x: Features, memory: Memory) -> Features:
    """Apply the layers in order."""
    for layer in layers:
        x = layer(x, memory)
    return x


def _folded(video: Pixels, first: bool) -> Features:
    """Groups of frames and squares of pixels, folded into channels."""
    video = padded(video, GROUP) if first else video
    return rearrange(video, "b c (l s) (h p) (w q) -> b (c s p q) l h w", s=GROUP, p=FOLD, q=FOLD)
