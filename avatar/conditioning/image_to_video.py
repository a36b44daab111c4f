"""Image-to-video conditioning (Wan 2.1 I2V): CLIP features, and channels [mask | latents of reference + grey frames].

Shared by training and streaming. The channels are concatenated to the noisy latents: a mask of known frames, and the
latents of a video of the image followed by grey frames (arXiv:2503.20314). The latent of the image itself is the sink:

    sink        [1 … 1 | the reference]                      by `Conditioning.blank`
    timeline    [0 … 0 | latents of grey frames after it]

A causal encoder has a finite receptive field, so from some position on the latents of grey frames repeat, and a stream
needs only those before it. Wan's has a memory of 112 frames: the 29th grey latent is the first one without the image.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avatar.protocols import ImageEncoder, VideoAutoencoder
from avatar.types import Conditioning

MAX_GREY_LATENTS = 29  # grey latents that are encoded; the last one is repeated


@dataclass(frozen=True)
class I2VConditioning:
    """The references of a batch, with the conditioning of image-to-video networks at any position of the timeline."""

    reference: Float[Tensor, "b c 1 h w"]
    image: Float[Tensor, "b i g"] | None = None
    # Of the first latents of the timeline; the last one is repeated.
    channels: Float[Tensor, "b j n h w"] | None = None

    def apply(self, cond: Conditioning, start: int = 0) -> Conditioning:
        """A conditioning of latents from `start` on with the fields of image-to-video networks, if there are any."""
        if self.image is None or self.channels is None:
            return cond
        places = torch.arange(start, start + cond.latents).clamp(max=self.channels.shape[2] - 1)
        channels = self.channels[:, :, places]
        return replace(cond, image=self.image.to(cond.reference), concat_latents=channels.to(cond.reference))


@torch.no_grad()
def encode_reference(
    reference: Float[Tensor, "b c 1 h w"], autoencoder: VideoAutoencoder, image: ImageEncoder | None, latents: int
) -> I2VConditioning:
    """Encode references for a timeline of `latents`, from their own latents alone.

    Without an image encoder there is nothing to encode. At most MAX_GREY_LATENTS are encoded.
    """
    if image is None:
        return I2VConditioning(reference)
    images, stride = autoencoder.decode(reference), autoencoder.temporal_stride
    grey, stream = torch.zeros_like(images).repeat_interleave(stride, dim=2), autoencoder.encoder_stream()
    stream.push(images)
    known = torch.cat([stream.push(grey) for _ in range(min(latents, MAX_GREY_LATENTS))], dim=2)
    mask = known.new_zeros(len(known), stride, *known.shape[2:])
    return I2VConditioning(reference, image.encode(images), torch.cat([mask, known], dim=1))


def with_image_conditioning(
    cond: Conditioning, autoencoder: VideoAutoencoder, image: ImageEncoder | None
) -> Conditioning:
    """The conditioning of a clip from its start on, with the fields of image-to-video networks.

    Unchanged without an image encoder; else the encoders are moved to the device of the reference.
    """
    if image is None:
        return cond
    for encoder in (autoencoder, image):
        if isinstance(encoder, nn.Module):
            encoder.to(cond.reference.device)
    return encode_reference(cond.reference, autoencoder, image, cond.latents).apply(cond)
