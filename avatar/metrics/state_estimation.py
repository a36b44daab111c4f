"""What is read of a clip's frames, beside what is true of it: all that the metrics look at.

A reader turns frames into an `EstimatedClip`; there is one per world (`avatar.puppet.worlds`), and both take the output
of that world's `video`. A frame that does not show the clip's puppet is *not valid*: no metric uses its estimate, and
each says how it counts.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from avatar.errors import UserError
from avatar.media.frames import to_uint8
from avatar.puppet.clip import PuppetClip
from avatar.puppet.identity import Identity
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel
from avatar.puppet.readout import READABLE, Readout, palette_error, readable
from avatar.puppet.setting import Setting
from avatar.puppet.visemes import CLOSED, LEAD_S
from avatar.types import FRAME_RATE

HUSH_S = 0.1  # a frame is silent if no phoneme is this close to it: by then the mouth has come to rest
BLOCK = 64  # frames read together
SLACK = 0.5  # a state may lie outside its channel's range by this share of it
Progress = Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]]

_READ = [channel(name) for name in READABLE]


@dataclass(frozen=True)
class EstimatedClip:
    """f consecutive frames of one clip, as read and as they should be."""

    mouth_open: Float[np.ndarray, " f"]  # aperture that was read, 0: shut, 1: fully open
    valid: Bool[np.ndarray, " f"]  # False: the frame could not be read, believe nothing else of it
    delta_e: Float[np.ndarray, " f"]  # colour error, CIE76; NaN in a world without colours
    motion: Float[np.ndarray, " f"]  # see `motion`
    truth_mouth: Float[np.ndarray, " f"]  # true aperture
    truth_motion: Float[np.ndarray, " f"]  # `motion` of the true states
    silent: Bool[np.ndarray, " f"]  # True where the puppet's own voice is silent
    closures_s: Float[np.ndarray, " n"]  # when the lips of each p, b and m are shut, seconds after the first frame
    states: Float[np.ndarray, "f s"]  # all that was read, rows of motion.CHANNELS; NaN in channels that can't be
    truth_states: Float[np.ndarray, "f s"]
    state: Int[np.ndarray, " f"]  # what was asked for, index into types.STATES
    emotion: Int[np.ndarray, " f"]  # into types.EMOTIONS
    gesture: Int[np.ndarray, " f"]  # into types.GESTURES
    doing: Int[np.ndarray, " f"]  # into types.GESTURES: the gesture that is made, whether asked for or caused by words

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def trajectory(self) -> Float[np.ndarray, "f s"]:
        """The states, NaN throughout in frames that aren't valid."""
        return np.where(self.valid[:, None], self.states, np.float32(np.nan))

    def between(self, start: int, stop: int) -> "EstimatedClip":
        """The frames [start, stop) of it."""
        parts = {f.name: getattr(self, f.name)[start:stop] for f in fields(self) if f.name != "closures_s"}
        times = self.closures_s - start / FRAME_RATE
        return EstimatedClip(**parts, closures_s=times[(times >= 0) & (times < (stop - start) / FRAME_RATE)])


@runtime_checkable
class VideoReader(Protocol):
    """How the frames of a world are read; frame 0 of `video` is frame `start` of the clip.

    `progress` wraps the loop over blocks of frames, for those who wait.
    """

    def read(
        self, clip: PuppetClip, video: Float[Tensor, "c f h w"], start: int = 0, progress: Progress = iter
    ) -> EstimatedClip: ...


@dataclass(frozen=True)
class PixelReader:
    """Reads rendered frames by analysis through synthesis; a puppet's first clip in a setting takes seconds more."""

    size: int = 64

    def read(
        self, clip: PuppetClip, video: Float[Tensor, "c f h w"], start: int = 0, progress: Progress = iter
    ) -> EstimatedClip:
        """Frames in [-1, 1], `size` pixels square; one with a NaN is not valid. Raises UserError for other shapes."""
        wanted = (3, self.size, self.size)
        if (video.shape[0], *video.shape[2:]) != wanted:
            raise UserError(
                f"video of shape {tuple(video.shape)}; this reader takes [3, f, {self.size}, {self.size}]: resize it, "
                "or build the reader for its size"
            )
        frames = to_uint8(video.nan_to_num())
        blocks = np.split(frames, range(BLOCK, len(frames), BLOCK))
        readings = [_readout(clip.identity, self.size, clip.setting).read(block) for block in progress(blocks)]
        states = np.concatenate([reading.states for reading in readings])
        valid = np.concatenate([reading.valid for reading in readings]) & _finite(video)
        delta_e = palette_error(clip.identity, frames, states, clip.setting)
        states[:, ~np.isin(CHANNELS, readable(clip.setting))] = np.nan
        return _beside_truth(clip, start, states, valid, delta_e)


@dataclass(frozen=True)
class StateReader:
    """Reads the state world, whose frames are states: nothing is lost, and there is no colour."""

    def read(
        self, clip: PuppetClip, video: Float[Tensor, "c f h w"], start: int = 0, progress: Progress = iter
    ) -> EstimatedClip:
        """A frame with a state far outside its range, or a NaN, is not valid. Raises UserError for other shapes."""
        if (video.shape[0], *video.shape[2:]) != (len(CHANNELS), 1, 1):
            raise UserError(
                f"video of shape {tuple(video.shape)}; states are [{len(CHANNELS)}, f, 1, 1]: pass the state world's "
                "frames, or read pixels with PixelReader"
            )
        states = video[:, :, 0, 0].T.nan_to_num().cpu().numpy().astype(np.float32)
        slack = SLACK * (HIGH - LOW)
        valid = _finite(video) & ((states >= LOW - slack) & (states <= HIGH + slack)).all(1)
        return _beside_truth(clip, start, states, valid, np.full(len(states), np.nan, np.float32))


def motion(states: Float[np.ndarray, "f s"], valid: Bool[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
    """How far the puppet moved since the frame before: the mean over its readable channels, in shares of their ranges.

    NaN for the first frame, and where this frame or the one before is not valid.
    """
    steps = np.abs(np.diff(states[:, _READ], axis=0)) / (HIGH - LOW)[_READ]
    moved = np.where(valid[1:] & valid[:-1], steps.mean(1), np.nan)
    return np.concatenate([[np.nan], moved])[: len(states)].astype(np.float32)


def silence(clip: PuppetClip) -> Bool[np.ndarray, " f"]:
    """Where no phoneme of the puppet's own voice is within HUSH_S of the frame."""
    starts = np.arange(len(clip.states)) / FRAME_RATE
    silent = np.ones(len(starts), bool)
    for phoneme in clip.phonemes:
        silent &= (starts >= phoneme.end_s + HUSH_S) | (starts + 1 / FRAME_RATE <= phoneme.start_s - HUSH_S)
    return silent


def closures(clip: PuppetClip) -> Float[np.ndarray, " n"]:
    """The middle of each p, b and m, as the lips have it, in seconds from the clip's start; only those inside it."""
    shut = [(p.start_s + p.end_s) / 2 - LEAD_S for p in clip.phonemes if p.symbol[0] in CLOSED]
    return np.array([t for t in shut if 0 <= t < len(clip.states) / FRAME_RATE], dtype=np.float64)


def _beside_truth(
    clip: PuppetClip,
    start: int,
    states: Float[np.ndarray, "f s"],
    valid: Bool[np.ndarray, " f"],
    delta_e: Float[np.ndarray, " f"],
) -> EstimatedClip:
    """The reading of frames from `start` on, with the truth about them."""
    frames, mouth = len(clip.states), channel("mouth_open")
    if not 0 <= start <= start + len(states) <= frames:
        raise UserError(
            f"{len(states)} frames from frame {start} on, but the clip {clip.key} has {frames}; crop them to the clip"
        )
    whole = EstimatedClip(
        mouth_open=np.zeros(frames, np.float32),
        valid=np.zeros(frames, bool),
        delta_e=np.zeros(frames, np.float32),
        motion=np.zeros(frames, np.float32),
        truth_mouth=clip.states[:, mouth],
        truth_motion=motion(clip.states, np.ones(frames, bool)),
        silent=silence(clip),
        closures_s=closures(clip),
        states=np.zeros_like(clip.states),
        truth_states=clip.states,
        state=clip.state,
        emotion=clip.emotion,
        gesture=clip.gesture,
        doing=clip.doing,
    ).between(start, start + len(states))
    read = {"mouth_open": states[:, mouth], "valid": valid, "delta_e": delta_e, "motion": motion(states, valid)}
    return replace(whole, **read, states=states)


def _finite(video: Float[Tensor, "c f h w"]) -> Bool[np.ndarray, " f"]:
    return torch.isfinite(video).all(dim=3).all(dim=2).all(dim=0).cpu().numpy()


@functools.lru_cache(maxsize=256)
def _readout(identity: Identity, size: int, setting: Setting) -> Readout:
    return Readout(identity, size, setting)
