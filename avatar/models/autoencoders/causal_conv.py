"""A small causal convolutional video autoencoder: 8×8 in space, 4 in time.

1 + 4k frames make 1 + k latents: the first frame stands for itself, each later latent covers four frames and depends on
nothing after them. Convolutions over time pad on the left only, the first time by repeating the first frame, and after
that with the frames they remember: a stream decoded piece by piece equals the whole decode.

Latents leave normalised to zero mean and unit variance per channel, by running statistics that count as constants: those
of a batch would take away what its clips have in common, which may be a whole palette.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from avatar.types import Latents, Pixels

Memory = dict[nn.Module, Tensor]  # the last frames that each convolution has seen, in one stream


class CausalConv(nn.Module):
    """3-D convolution that looks at this frame and the `kernel[0] - 1` before it."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.past = kernel[0] - 1
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Pixels, memory: Memory) -> Pixels:
        if self.past:
            before = memory[self] if self in memory else x[:, :, :1].expand(-1, -1, self.past, -1, -1)
            x = torch.cat([before, x], dim=2)
            memory[self] = x[:, :, -self.past :]
        return self.conv(x)


class ResBlock(nn.Module):
    """Two convolutions and a way around them; the first also looks back in time where `past` says so."""

    def __init__(self, channels: int, past: bool):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = CausalConv(channels, channels, (3 if past else 1, 3, 3))
        self.conv2 = CausalConv(channels, channels, (1, 3, 3))
        nn.init.zeros_(self.conv2.conv.weight)

    def forward(self, x: Pixels, memory: Memory) -> Pixels:
        y = self.conv1(nn.functional.silu(self.norm1(x)), memory)
        return x + self.conv2(nn.functional.silu(self.norm2(y)), memory)


class ChannelNorm(nn.Module):
    """RMS norm over channels at every place: no statistic over time that a stream could not have."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Pixels) -> Pixels:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6) * self.scale


class Normalise(nn.Module):
    """Latents minus their running mean, over their running deviation; training keeps both up to date."""

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float = 0.02):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("variance", torch.ones(channels, 1, 1, 1))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Latents) -> Latents:
        if self.training:
            self._update(x.detach())
        return (x - self.mean) / self.variance.sqrt()

    def _update(self, x: Latents) -> None:
        self.batches += 1
        share = torch.clamp(1 / self.batches, min=self.momentum)  # a plain mean at first, an exponential one later
        variance, mean = torch.var_mean(x, dim=(0, 2, 3, 4), correction=0)
        self.mean.lerp_(mean.view_as(self.mean), share)
        self.variance.lerp_(variance.view_as(self.variance), share)


class TimeUp(nn.Module):
    """Twice as many frames, but for the very first of a stream, which stays one."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Pixels, memory: Memory) -> Pixels:
        first = self.conv not in memory
        y = self.conv(x, memory) + fitted(x, 2 * x.shape[1])
        y = rearrange(y, "b (c s) f h w -> b c (f s) h w", s=2)
        return y[:, :, 1:] if first else y


class Down(nn.Module):
    """Half the height and width, and half the frames where `time` says so: a convolution beside a way without weights.

    The way around folds 2×2 pixels into channels and averages groups of them (arXiv:2410.10733); of each pair of frames
    it keeps the later, whose latent they become. It lets colours through from the first step.
    """

    def __init__(self, c_in: int, c_out: int, time: bool):
        super().__init__()
        self.c_out, self.step = c_out, 2 if time else 1
        self.conv = CausalConv(c_in, c_out, (3, 3, 3), (self.step, 2, 2))

    def forward(self, x: Pixels, memory: Memory) -> Pixels:
        around = rearrange(x[:, :, :: self.step], "b c f (h p) (w q) -> b (c p q) f h w", p=2, q=2)
        return self.conv(x, memory) + fitted(around, self.c_out)


class SpaceUp(nn.Module):
    """Twice the height and width, with a way around as in `Down`."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.c_out = c_out
        self.conv = CausalConv(c_in, 4 * c_out, (1, 1, 1))

    def forward(self, x: Pixels, memory: Memory) -> Pixels:
        y = self.conv(x, memory) + fitted(x, 4 * self.c_out)
        return rearrange(y, "b (c p q) f h w -> b c f (h p) (w q)", p=2, q=2)


class Through(nn.Module):
    """A change of channels, with a way around as in `Down`."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.c_out = c_out
        self.conv = CausalConv(c_in, c_out, kernel)

    def forward(self, x: Pixels, memory: Memory) -> Pixels:
        return self.conv(x, memory) + fitted(x, self.c_out)


def fitted(x: Pixels, channels: int) -> Pixels:
    """As many channels as asked: each repeated, or groups of them averaged."""
    have = x.shape[1]
    if channels % have == 0:
        return x.repeat_interleave(channels // have, dim=1)
    if have % channels == 0:
        return x.unflatten(1, (channels, have // channels)).mean(dim=2)
    raise ValueError(f"{have} channels can't become {channels} by repeating or averaging; choose multiples")


class CausalConvAutoencoder(nn.Module):
    """The autoencoder that the nano models live on.

    Args:
        channels: of the latents.
        widths: feature channels at 1/2, 1/4 and 1/8 of the frame's size.
    """

    temporal_stride, spatial_stride = 4, 8

    def __init__(self, channels: int = 16, widths: tuple[int, int, int] = (24, 48, 96)):
        super().__init__()
        self.channels = channels
        a, b, c = widths
        self.encoder = nn.ModuleList(
            [
                Through(12, a, (1, 3, 3)),
                ResBlock(a, past=False),
                Down(a, b, time=True),
                ResBlock(b, past=True),
                Down(b, c, time=True),
                ResBlock(c, past=True),
                Through(c, channels, (1, 1, 1)),
            ]
        )
        self.normalise = Normalise(channels)
        self.decoder = nn.ModuleList(
            [
                Through(channels, c, (3, 3, 3)),
                ResBlock(c, past=True),
                ResBlock(c, past=True),
                TimeUp(c),
                SpaceUp(c, b),
                ResBlock(b, past=True),
                TimeUp(b),
                SpaceUp(b, a),
                ResBlock(a, past=False),
                ResBlock(a, past=False),
                Through(a, 12, (1, 3, 3)),
            ]
        )

    def encode(self, video: Pixels) -> Latents:
        """Normalised latents of 1 + 4k frames, height and width multiples of 8."""
        frames, height, width = video.shape[2:]
        if frames % self.temporal_stride != 1 or height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(
                f"a video of {frames} frames of {height}×{width}; this autoencoder takes 1 + 4k frames, "
                "height and width multiples of 8: crop it"
            )
        x = rearrange(video, "b c f (h p) (w q) -> b (c p q) f h w", p=2, q=2)
        return self.normalise(_through(self.encoder, x, {}))

    def decode(self, latents: Latents) -> Pixels:
        """The 1 + 4k frames of 1 + k latents, about within [-1, 1]."""
        return self._decode(latents, {})

    def decoder_stream(self) -> "Stream":
        """A decode in progress; prime it with the reference's latent and discard the frame that comes."""
        return Stream(self)

    def _decode(self, latents: Latents, memory: Memory) -> Pixels:
        x = _through(self.decoder, latents, memory)
        return rearrange(x, "b (c p q) f h w -> b c f (h p) (w q)", p=2, q=2)


class Stream:
    """What the decoder remembers between two pieces of one stream."""

    def __init__(self, autoencoder: CausalConvAutoencoder):
        self.autoencoder, self.memory = autoencoder, {}

    def push(self, latents: Latents) -> Pixels:
        """The frames that these latents complete: one for a stream's first latent, four for each later one."""
        return self.autoencoder._decode(latents, self.memory)

    def snapshot(self) -> Any:
        return dict(self.memory)

    def restore(self, snapshot: Any) -> None:
        self.memory = dict(snapshot)


def _through(layers: nn.ModuleList, x: Pixels, memory: Memory) -> Pixels:
    for layer in layers:
        x = layer(x, memory)
    return x
