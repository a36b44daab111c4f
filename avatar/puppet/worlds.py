"""Worlds: video tensors of puppet clips.

PixelWorld   rendered frames in [-1, 1], with masks of face and lips
StateWorld   state vectors as frames of one pixel, with a channel per entry: exact and fast to learn
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from avatar.errors import UserError
from avatar.media.frames import from_uint8, to_uint8
from avatar.puppet.clip import PuppetClip
from avatar.puppet.identity import Identity
from avatar.puppet.motion import HIGH, LOW
from avatar.puppet.render import render
from avatar.puppet.setting import Setting
from avatar.types import REGIONS

BOUNDS = (torch.tensor(LOW), torch.tensor(HIGH))  # of drawable states


@runtime_checkable
class World(Protocol):
    """Interface of the worlds."""

    @property
    def fingerprint(self) -> str:
        """String of the settings that videos and regions depend on."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the frames."""
        ...

    def video(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "c f h w"]:
        """The frames [start, stop) of a clip."""
        ...

    def regions(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "m f h w"]:
        """Masks of types.REGIONS in the frames [start, stop), in [0, 1]."""
        ...

    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        """RGB images of a video of this world."""
        ...


@dataclass(frozen=True)
class PixelWorld:
    """Rendered frames in [-1, 1].

    Args:
        size: height and width in pixels, 64 to 256.

    Raises:
        UserError: a size that is not an integer of at least 1.
    """

    size: int = 64

    def __post_init__(self):
        if not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"got frames of {self.size} pixels; expected an integer >= 1: change puppet.size")

    @property
    def fingerprint(self) -> str:
        return f"pixels(size={self.size})"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def video(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "c f h w"]:
        return from_uint8(clip.frames(self.size, start, stop))

    def regions(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "m f h w"]:
        return torch.from_numpy(clip.regions(self.size, start, stop))

    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        return to_uint8(video)


@dataclass(frozen=True)
class StateWorld:
    """State vectors as frames of one pixel, with one channel per entry of `motion.CHANNELS`.

    The pixel belongs to every region, so region weights, whose mean is 1, have no effect.
    """

    shape: ClassVar[tuple[int, int]] = (1, 1)
    fingerprint: ClassVar[str] = "states"

    def video(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "c f h w"]:
        return torch.from_numpy(clip.states[start:stop].T.copy())[:, :, None, None].float()

    def regions(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "m f h w"]:
        return torch.ones(len(REGIONS), stop - start, 1, 1)

    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        """Rendered states, all of the same identity."""
        return render(Identity.from_seed(0), video[:, :, 0, 0].T.clamp(*BOUNDS).cpu().numpy(), 64, Setting("half"))
