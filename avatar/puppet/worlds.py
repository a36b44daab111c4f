"""The two faces of the puppet world: what a model sees of a clip, as tensors.

PixelWorld   the rendered frames, in [-1, 1], with the regions of face and mouth
StateWorld   the puppet's own state vectors, one "pixel" with a channel per number: exact truth, quick to learn
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

BOUNDS = (torch.tensor(LOW), torch.tensor(HIGH))  # of the states that can be drawn


@runtime_checkable
class World(Protocol):
    """How a clip becomes a video tensor."""

    @property
    def fingerprint(self) -> str:
        """The settings that videos and regions depend on."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of its frames."""
        ...

    def video(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "c f h w"]: ...

    def regions(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "m f h w"]:
        """The share of each pixel that is each of REGIONS."""
        ...

    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        """A video tensor of this world as frames to look at."""
        ...


@dataclass(frozen=True)
class PixelWorld:
    """Square frames of `size` pixels."""

    size: int = 64

    def __post_init__(self):
        if not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"frames of {self.size} pixels; wanted a whole number from 1 on")

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
    """States as 1×1 frames with one channel per entry of `motion.CHANNELS`.

    The one pixel is all of the puppet, each of its regions included: weights, whose mean is 1, leave it as it is.
    """

    shape: ClassVar[tuple[int, int]] = (1, 1)
    fingerprint: ClassVar[str] = "states"

    def video(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "c f h w"]:
        return torch.from_numpy(clip.states[start:stop].T.copy())[:, :, None, None].float()

    def regions(self, clip: PuppetClip, start: int, stop: int) -> Float[Tensor, "m f h w"]:
        return torch.ones(len(REGIONS), stop - start, 1, 1)

    def to_images(self, video: Float[Tensor, "c f h w"]) -> UInt8[np.ndarray, "f H W 3"]:
        """The states worn by one and the same puppet, arms and all."""
        return render(Identity.from_seed(0), video[:, :, 0, 0].T.clamp(*BOUNDS).cpu().numpy(), 64, Setting("half"))
