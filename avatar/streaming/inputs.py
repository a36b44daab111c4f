"""What a session is given, checked: names, sound, pictures."""

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.errors import UserError
from avatar.protocols import VideoAutoencoder
from avatar.types import Pixels

Sound = Float[Tensor, "_"]  # samples; the session itself tells its user about lengths that differ
Sink = Float[Tensor, "1 c 1 h w"]  # a reference's latent


def index(kind: str, name: str | None, names: tuple[str, ...]) -> int:
    """The place of a name in its vocabulary; None is the first. Raises UserError for a name that isn't there."""
    if name is not None and name not in names:
        raise UserError(f"{kind} {name!r}; choose one of {', '.join(names)}")
    return 0 if name is None else names.index(name)


def check_sound(role: str, samples: Sound) -> None:
    """Raise UserError for what is no row of finite floats."""
    if samples.ndim != 1 or not samples.is_floating_point():
        raise UserError(
            f"{role} of shape {shape(samples)} in {samples.dtype}; wanted one row of floats in [-1, 1] at 16 kHz: "
            "mix to mono and convert it"
        )
    if not samples.isfinite().all():
        bad = int((~samples.isfinite()).nonzero()[0])
        raise UserError(f"{role} that is not finite, first at sample {bad}; mend the recording or cut that part out")


@torch.no_grad()
def latent_of(pixels: Pixels | None, latent: Sink | None, autoencoder: VideoAutoencoder, device: torch.device) -> Sink:
    """The latent of a reference that was given as either, on the device.

    Raises:
        UserError: it was given as both or neither, isn't one finite frame, or isn't of this autoencoder.
    """
    given = pixels if latent is None else latent
    if given is None or (pixels is not None and latent is not None):
        raise UserError("a reference wants either its pixels or its latent; give one of them")
    if given.ndim != 5 or given.shape[0] != 1 or given.shape[2] != 1:
        raise UserError(f"a reference of shape {shape(given)}; wanted one frame, 1 c 1 h w: reshape it")
    if not given.isfinite().all():
        raise UserError("a reference with values that are not finite; mend the picture")
    if latent is None:
        try:
            latent = autoencoder.encode(given.to(device))
        except RuntimeError as error:
            raise UserError(
                f"a reference of shape {shape(given)} that the autoencoder can't encode ({error}); "
                "give it the channels and size that the autoencoder was made for"
            ) from error
    if latent.shape[1] != autoencoder.channels:
        raise UserError(
            f"a reference's latent of {latent.shape[1]} channels, but the autoencoder's have "
            f"{autoencoder.channels}; encode the picture with this autoencoder"
        )
    return latent.to(device)


def shape(x: Tensor) -> str:
    """A tensor's shape, for messages."""
    return "×".join(map(str, x.shape))
