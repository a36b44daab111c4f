"""Checks of the inputs of a session: audio and portraits."""

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.errors import UserError
from avatar.protocols import VideoAutoencoder
from avatar.types import Pixels

Audio = Float[Tensor, "_"]  # samples; lengths that differ are a user error, not one of types
SinkLatent = Float[Tensor, "1 c 1 h w"]  # the latent of a reference


def check_audio(own: Audio, other: Audio | None) -> None:
    """Raise UserError unless both voices are rows of finite floats of the same length."""
    for role, samples in (("own", own), ("other", other)):
        if samples is None:
            continue
        if samples.ndim != 1 or not samples.is_floating_point():
            raise UserError(
                f"audio `{role}` of shape {format_shape(samples)} in {samples.dtype}; expected one row of floats in "
                "[-1, 1] at 16 kHz: mix to mono and convert it"
            )
        if not samples.isfinite().all():
            bad = int((~samples.isfinite()).nonzero()[0])
            raise UserError(f"audio `{role}` is not finite, first at sample {bad}; repair it or cut that part out")
    if other is not None and len(other) != len(own):
        raise UserError(
            f"{len(own)} samples of the avatar's voice with {len(other)} of the other one; expected the same number: "
            "pad the shorter with silence"
        )


@torch.no_grad()
def encode_portrait(
    pixels: Pixels | None, latent: SinkLatent | None, autoencoder: VideoAutoencoder, device: torch.device
) -> SinkLatent:
    """The latent of a reference that is given as pixels or as a latent, on the device.

    Raises:
        UserError: both or neither are given, it is not one finite frame, or not of this autoencoder.
    """
    given = pixels if latent is None else latent
    if given is None or (pixels is not None and latent is not None):
        raise UserError("a reference needs either its pixels or its latent; give one of them")
    if given.ndim != 5 or given.shape[0] != 1 or given.shape[2] != 1:
        raise UserError(f"a reference of shape {format_shape(given)}; expected one frame, 1 c 1 h w: reshape it")
    if not given.isfinite().all():
        raise UserError("a reference with values that are not finite; repair the image")
    if latent is None:
        try:
            latent = autoencoder.encode(given.to(device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"a reference of shape {format_shape(given)} that the autoencoder can't encode ({error}); "
                "give it the channels and size that the autoencoder was made for"
            ) from error
    if latent.shape[1] != autoencoder.channels:
        raise UserError(
            f"a reference's latent of {latent.shape[1]} channels; expected {autoencoder.channels}: "
            "encode the image with this autoencoder"
        )
    return latent.to(device)


def format_shape(x: Tensor) -> str:
    """The shape of a tensor, for messages."""
    return "×".join(map(str, x.shape))
