"""A small causal decoder, distilled for the latents of a large autoencoder, with that one's frozen encoder.

The idea is that of TAEHV (github.com/madebyollin/taehv): encoding happens once, decoding in every chunk of a stream.
A latent's frames and squares of 4×4 pixels are folded into channels, as in `causal_conv`, so that everything is
computed at a quarter of the picture's size or less; a linear map of each latent pixel to its block of pixels × frames
is the start, and convolutions learn the rest.

Its latents are the large autoencoder's, and so is its fingerprint, which `components` of its bundle records.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from einops import rearrange
from torch import nn

from avatar.errors import UserError
from avatar.models import bundle
from avatar.models.autoencoders.causal_conv import FOLD, CausalConv, Double, ResBlock, through
from avatar.models.autoencoders.stream import Memory, Stream
from avatar.models.autoencoders.streamed import StreamedAutoencoder
from avatar.types import Latents, Pixels


class DistilledAutoencoder(StreamedAutoencoder):
    """A large autoencoder's frozen encoder and a small decoder.

    Args:
        encoder: an autoencoder; its own decoder is dropped.
        width: feature channels of the decoder at 1/4 of the frame's size; each halving below adds as many.
    """

    decoder_parts = ("decoder", "linear")

    def __init__(self, encoder: StreamedAutoencoder, width: int):
        super().__init__()
        self.temporal_stride, self.spatial_stride = encoder.temporal_stride, encoder.spatial_stride
        self.channels = encoder.channels
        doublings = (self.spatial_stride // FOLD).bit_length() - 1
        if doublings < 0 or FOLD * 2**doublings != self.spatial_stride:
            raise UserError(
                f"latents of {self.spatial_stride}×{self.spatial_stride} pixels; wanted {FOLD} or doublings of "
                "it: take an autoencoder of pictures"
            )
        widths = [width * (1 + i) for i in reversed(range(doublings + 1))]
        encoder.drop_decoder()
        self.encoder = encoder.requires_grad_(False)
        self.linear = nn.Linear(self.channels, 3 * self.temporal_stride * self.spatial_stride**2)
        layers: list[nn.Module] = [CausalConv(self.channels, widths[0], (1, 3, 3)), ResBlock(widths[0], past=True)]
        for wide, narrow in pairwise(widths):
            layers += [Double(wide, narrow), ResBlock(narrow, past=False)]
        last = CausalConv(widths[-1], 3 * self.temporal_stride * FOLD**2, (1, 3, 3))
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.decoder = nn.ModuleList([*layers, last])
        self.train()

    def train(self, mode: bool = True) -> "DistilledAutoencoder":
        """Set the mode of the decoder; the frozen encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def start_from(self, latents: Latents, video: Pixels) -> None:
        """Initialise the linear map by least squares from clips of at least two latents to their frames."""
        s, p = self.temporal_stride, self.spatial_stride
        # A first latent shows one frame of its block alone.
        blocks = rearrange(video[:, :, 1:], "b c (l s) (h p) (w q) -> (b l h w) (c s p q)", s=s, p=p, q=p)
        x = rearrange(latents[:, :, 1:], "b c l h w -> (b l h w) c")
        mean, target = x.mean(dim=0), blocks.mean(dim=0)
        x = x - mean
        # A little of the identity, since few clips may not show every direction of the latents.
        gram = x.T @ x / len(x) + 1e-4 * torch.eye(self.channels, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ (blocks - target) / len(x)).T
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(target - weight @ mean)

    def encoder_stream(self) -> Stream:
        return self.encoder.encoder_stream()

    def _decode_piece(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        s, p = self.temporal_stride, self.spatial_stride
        blocks = self.linear(rearrange(latents, "b c l h w -> b l h w c"))
        video = rearrange(blocks, "b l h w (c s p q) -> b c (l s) (h p) (w q)", s=s, p=p, q=p)
        x = through(self.decoder, latents, memory)
        video = video + rearrange(x, "b (c s p q) l h w -> b c (l s) (h p) (w q)", s=s, p=FOLD, q=FOLD)
        return video[:, :, s - 1 if first else 0 :]


def distilled(teacher: StreamedAutoencoder, width: int) -> DistilledAutoencoder:
    """A new small decoder with the encoder of a trained autoencoder, under that one's fingerprint."""
    origin = bundle.origin_of(teacher)
    if origin.kind != "autoencoder":
        raise UserError(f"an autoencoder of kind {origin.kind!r} has no weights to distil; load one that was trained")
    net = bundle.new({"name": "distilled_autoencoder", "encoder": origin.network, "width": width})
    weights = teacher.state_dict()
    net.encoder.load_state_dict({name: weights[name] for name in net.encoder.state_dict()})
    # Of a distilled teacher the hash is the first one's already.
    net.origin = replace(net.origin, fingerprint=origin.fingerprint, components={"autoencoder": origin.fingerprint})
    return net
