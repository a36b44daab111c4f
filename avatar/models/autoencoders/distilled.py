"""Small causal decoder, distilled for the latents of a large autoencoder whose frozen encoder it keeps.

The idea is from TAEHV (github.com/madebyollin/taehv): encoding happens once, decoding in every chunk of a stream. A
latent's frames and squares of 4×4 pixels are folded into channels, as in `causal_conv`, so that all layers run at a
quarter of the frame's size or less. The decoder is a linear map of each latent pixel to its block of pixels × frames,
plus convolutions, which learn the residual.

Latents and fingerprint are those of the large autoencoder; `components` in the bundle records the fingerprint.
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
    """The frozen encoder of a large autoencoder and a small decoder.

    Args:
        encoder: the large autoencoder; its decoder is deleted.
        width: feature channels of the decoder at 1/4 of the frame's size; each halving of the size adds as many.

    Raises:
        UserError: the spatial stride is not 4 times a power of 2.
    """

    decoder_parts = ("decoder", "linear")

    def __init__(self, encoder: StreamedAutoencoder, width: int):
        super().__init__()
        self.temporal_stride, self.spatial_stride = encoder.temporal_stride, encoder.spatial_stride
        self.channels = encoder.channels
        doublings = (self.spatial_stride // FOLD).bit_length() - 1
        if doublings < 0 or FOLD * 2**doublings != self.spatial_stride:
            raise UserError(
                f"got an autoencoder with a spatial stride of {self.spatial_stride}; expected {FOLD}, {2 * FOLD}, "
                f"{4 * FOLD}, …: choose an autoencoder of images"
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
        """Initialise the linear map by least squares from latents to frames.

        Args:
            latents: of clips of at least two latents.
            video: their frames.
        """
        s, p = self.temporal_stride, self.spatial_stride
        # The first latent decodes to a single frame of its block.
        blocks = rearrange(video[:, :, 1:], "b c (l s) (h p) (w q) -> (b l h w) (c s p q)", s=s, p=p, q=p)
        x = rearrange(latents[:, :, 1:], "b c l h w -> (b l h w) c")
        mean, target = x.mean(dim=0), blocks.mean(dim=0)
        x = x - mean
        # Regularised by a small multiple of the identity: few clips may not vary in every direction of the latents.
        gram = x.T @ x / len(x) + 1e-4 * torch.eye(self.channels, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ (blocks - target) / len(x)).T
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(target - weight @ mean)

    def encoder_stream(self) -> Stream:
        """A new encoding stream of the large autoencoder."""
        return self.encoder.encoder_stream()

    def _decode_piece(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        s, p = self.temporal_stride, self.spatial_stride
        blocks = self.linear(rearrange(latents, "b c l h w -> b l h w c"))
        video = rearrange(blocks, "b l h w (c s p q) -> b c (l s) (h p) (w q)", s=s, p=p, q=p)
        x = through(self.decoder, latents, memory)
        video = video + rearrange(x, "b (c s p q) l h w -> b c (l s) (h p) (w q)", s=s, p=FOLD, q=FOLD)
        return video[:, :, s - 1 if first else 0 :]


def new_distilled(teacher: StreamedAutoencoder, width: int) -> DistilledAutoencoder:
    """Build a new small decoder with the encoder and the fingerprint of a trained autoencoder.

    Args:
        teacher: the trained autoencoder.
        width: see `DistilledAutoencoder`.

    Raises:
        UserError: the autoencoder is not trained.
    """
    origin = bundle.origin_of(teacher)
    if origin.kind != "autoencoder":
        raise UserError(f"got an autoencoder of kind {origin.kind!r}; expected a trained one: load it from a bundle")
    net = bundle.new({"name": "distilled_autoencoder", "encoder": origin.network, "width": width})
    weights = teacher.state_dict()
    net.encoder.load_state_dict({name: weights[name] for name in net.encoder.state_dict()})
    # A distilled teacher has the fingerprint of the first autoencoder already.
    net.origin = replace(net.origin, fingerprint=origin.fingerprint, components={"autoencoder": origin.fingerprint})
    return net
