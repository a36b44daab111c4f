"""What networks made for image-to-video are told of the reference; one answer for training and for streaming.

Wan 2.1's take the picture as an image encoder sees it, and beside the noise channels of what is known of the video: a
mask, and the latents of a video that begins with the picture and goes on in grey (arXiv:2503.20314). The picture's own
latent is the sink here:

    sink        [1 … 1 | the reference]                      by `Conditioning.blank`
    timeline    [0 … 0 | latents of grey frames after it]

A causal encoder's memory ends somewhere, so latents of one and the same frame repeat from some place on, and a stream
needs no more than those before. Wan's remembers 112 frames: the 29th latent of grey is the first without the picture.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avatar.protocols import ImageEncoder, VideoAutoencoder
from avatar.types import Conditioning

MAX_GREY_LATENTS = 29  # latents of grey frames that are ever made; the last one stands for all that follow


@dataclass(frozen=True)
class I2VConditioning:
    """The references of a batch, and what is told of them wherever on the timeline."""

    reference: Float[Tensor, "b c 1 h w"]
    image: Float[Tensor, "b i g"] | None = None
    # Of the timeline's first latents; all later ones have the last's.
    channels: Float[Tensor, "b j n h w"] | None = None

    def apply(self, cond: Conditioning, start: int = 0) -> Conditioning:
        """A conditioning of latents from `start` on, with the fields of image-to-video networks filled, if there are
        any."""
        if self.image is None or self.channels is None:
            return cond
        places = torch.arange(start, start + cond.latents).clamp(max=self.channels.shape[2] - 1)
        channels = self.channels[:, :, places]
        return replace(cond, image=self.image.to(cond.reference), concat_latents=channels.to(cond.reference))


@torch.no_grad()
def encode_reference(
    reference: Float[Tensor, "b c 1 h w"], autoencoder: VideoAutoencoder, image: ImageEncoder | None, latents: int
) -> I2VConditioning:
    """What is told of references on a timeline of so many latents, from the references' own latents alone.

    Without an image encoder nothing is. What is made beyond `MAX_GREY_LATENTS` latents would be the same again.
    """
    if image is None:
        return I2VConditioning(reference)
    picture, stride = autoencoder.decode(reference), autoencoder.temporal_stride
    grey, stream = torch.zeros_like(picture).repeat_interleave(stride, dim=2), autoencoder.encoder_stream()
    stream.push(picture)
    known = torch.cat([stream.push(grey) for _ in range(min(latents, MAX_GREY_LATENTS))], dim=2)
    mask = known.new_zeros(len(known), stride, *known.shape[2:])
    return I2VConditioning(reference, image.encode(picture), torch.cat([mask, known], dim=1))


def with_image_conditioning(
    cond: Conditioning, autoencoder: VideoAutoencoder, image: ImageEncoder | None
) -> Conditioning:
    """A clip's conditioning, from its timeline's start on, with what its networks are told of the reference.

    Without an image encoder it is complete as it is; else the encoders are moved to where the reference is.
    """
    if image is None:
        return cond
    for encoder in (autoencoder, image):
        if isinstance(encoder, nn.Module):
            encoder.to(cond.reference.device)
    return encode_reference(cond.reference, autoencoder, image, cond.latents).apply(cond)
