"""State estimation from videos: the estimated and the true states of a clip, which all metrics are computed from.

A reader estimates an `EstimatedClip` from a video; there is one for each world (`avatar.puppet.worlds`), for the
tensors of its `video`. A frame that does not show the clip's puppet is *invalid*: no metric uses its estimate, and each
metric documents how it counts.
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
from avatar.puppet.setting import Setting
from avatar.puppet.state_estimator import FACE_CHANNELS, StateEstimator, palette_error, visible_channels
from avatar.puppet.visemes import CLOSED, LEAD_S
from avatar.types import FRAME_RATE

SILENCE_MARGIN_S = 0.1  # between a silent frame and the next phoneme: the mouth needs it to come to rest
BLOCK = 64  # frames that are estimated together
TOLERANCE = 0.5  # of a valid state outside its channel's range, as a share of the range
Progress = Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]]

_COLUMNS = [channel(name) for name in FACE_CHANNELS]


@dataclass(frozen=True)
class EstimatedClip:
    """f consecutive frames of a clip: estimated states, true states and labels."""

    mouth_open: Float[np.ndarray, " f"]  # estimated aperture, 0: closed, 1: fully open
    valid: Bool[np.ndarray, " f"]  # False: the frame does not show the puppet, and its estimate has no meaning
    delta_e: Float[np.ndarray, " f"]  # colour error, CIE76; NaN in a world without colours
    motion: Float[np.ndarray, " f"]  # see `motion`
    truth_mouth: Float[np.ndarray, " f"]  # true aperture
    truth_motion: Float[np.ndarray, " f"]  # `motion` of the true states
    silent: Bool[np.ndarray, " f"]  # frames in which the puppet's own voice is silent
    closures_s: Float[np.ndarray, " n"]  # times of the lip closures of p, b and m, from the first frame on
    states: Float[np.ndarray, "f s"]  # estimated, rows of motion.CHANNELS; NaN in channels that cannot be estimated
    truth_states: Float[np.ndarray, "f s"]
    state: Int[np.ndarray, " f"]  # label, index into types.STATES
    emotion: Int[np.ndarray, " f"]  # label, index into types.EMOTIONS
    gesture: Int[np.ndarray, " f"]  # label, index into types.GESTURES
    doing: Int[np.ndarray, " f"]  # true gesture, whether by label or caused by words, index into types.GESTURES

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def trajectory(self) -> Float[np.ndarray, "f s"]:
        """The estimated states, with NaN in invalid frames."""
        return np.where(self.valid[:, None], self.states, np.float32(np.nan))

    def between(self, start: int, stop: int) -> "EstimatedClip":
        """The part with the frames [start, stop)."""
        parts = {f.name: getattr(self, f.name)[start:stop] for f in fields(self) if f.name != "closures_s"}
        times = self.closures_s - start / FRAME_RATE
        return EstimatedClip(**parts, closures_s=times[(times >= 0) & (times < (stop - start) / FRAME_RATE)])


@runtime_checkable
class VideoReader(Protocol):
    """Interface of the state estimation from the videos of a world."""

    def read(
        self, clip: PuppetClip, video: Float[Tensor, "c f h w"], start: int = 0, progress: Progress = iter
    ) -> EstimatedClip:
        """Estimate the states of a video.

        Args:
            clip: the ground truth.
            video: of the world that the reader is for.
            start: frame of the clip that is frame 0 of `video`.
            progress: wraps the iteration over blocks of frames, such as `rich.progress.track`.

        Raises:
            UserError: a video of another shape, or more frames than the clip has.
        """
        ...


@dataclass(frozen=True)
class PixelReader:
    """State estimation from rendered frames, by analysis through synthesis (`avatar.puppet.state_estimator`).

    The estimator of a puppet in a setting takes seconds to build, and is cached.

    Args:
        size: height and width of the frames in pixels, 64 to 256.
    """

    size: int = 64

    def read(
        self, clip: PuppetClip, video: Float[Tensor, "c f h w"], start: int = 0, progress: Progress = iter
    ) -> EstimatedClip:
        """Estimate the states of frames in [-1, 1] of `size` × `size` pixels; frames with NaN are invalid."""
        if (video.shape[0], *video.shape[2:]) != (3, self.size, self.size):
            raise UserError(
                f"got a video of shape {tuple(video.shape)}; expected [3, f, {self.size}, {self.size}]: resize it, or "
                "create a PixelReader of its size"
            )
        frames = to_uint8(video.nan_to_num())
        blocks = np.split(frames, range(BLOCK, len(frames), BLOCK))
        estimates = [_estimator(clip.identity, self.size, clip.setting).estimate(block) for block in progress(blocks)]
        states = np.concatenate([estimate.states for estimate in estimates])
        valid = np.concatenate([estimate.valid for estimate in estimates]) & _finite(video)
        delta_e = palette_error(clip.identity, frames, states, clip.setting)
        states[:, ~np.isin(CHANNELS, visible_channels(clip.setting))] = np.nan
        return _with_truth(clip, start, states, valid, delta_e)


@dataclass(frozen=True)
class StateReader:
    """States from videos of the state world, which are states already: exact, and without colours."""

    def read(
        self, clip: PuppetClip, video: Float[Tensor, "c f h w"], start: int = 0, progress: Progress = iter
    ) -> EstimatedClip:
        """Read the states of a video; frames with NaN or a state far outside its range are invalid."""
        if (video.shape[0], *video.shape[2:]) != (len(CHANNELS), 1, 1):
            raise UserError(
                f"got a video of shape {tuple(video.shape)}; expected [{len(CHANNELS)}, f, 1, 1], of the state world: "
                "read frames with PixelReader"
            )
        states = video[:, :, 0, 0].T.nan_to_num().cpu().numpy().astype(np.float32)
        margin = TOLERANCE * (HIGH - LOW)
        valid = _finite(video) & ((states >= LOW - margin) & (states <= HIGH + margin)).all(1)
        return _with_truth(clip, start, states, valid, np.full(len(states), np.nan, np.float32))


def motion(states: Float[np.ndarray, "f s"], valid: Bool[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
    """Motion per frame: mean absolute change of FACE_CHANNELS, in shares of their ranges.

    NaN for the first frame, and if this frame or the one before is invalid.
    """
    steps = np.abs(np.diff(states[:, _COLUMNS], axis=0)) / (HIGH - LOW)[_COLUMNS]
    moved = np.where(valid[1:] & valid[:-1], steps.mean(1), np.nan)
    return np.concatenate([[np.nan], moved])[: len(states)].astype(np.float32)


def silent_frames(clip: PuppetClip) -> Bool[np.ndarray, " f"]:
    """Frames without a phoneme of the puppet's own voice within SILENCE_MARGIN_S."""
    starts = np.arange(len(clip.states)) / FRAME_RATE
    silent = np.ones(len(starts), bool)
    for phoneme in clip.phonemes:
        silent &= (starts >= phoneme.end_s + SILENCE_MARGIN_S) | (
            starts + 1 / FRAME_RATE <= phoneme.start_s - SILENCE_MARGIN_S
        )
    return silent


def closure_times(clip: PuppetClip) -> Float[np.ndarray, " n"]:
    """Times of the lip closures of p, b and m inside the clip, in seconds from its start."""
    middles = [(p.start_s + p.end_s) / 2 - LEAD_S for p in clip.phonemes if p.symbol[0] in CLOSED]
    return np.array([t for t in middles if 0 <= t < len(clip.states) / FRAME_RATE], dtype=np.float64)


def _with_truth(
    clip: PuppetClip,
    start: int,
    states: Float[np.ndarray, "f s"],
    valid: Bool[np.ndarray, " f"],
    delta_e: Float[np.ndarray, " f"],
) -> EstimatedClip:
    """The estimates of the frames from `start` on, with the true states and the labels."""
    frames, mouth = len(clip.states), channel("mouth_open")
    if not 0 <= start <= start + len(states) <= frames:
        raise UserError(
            f"got {len(states)} frames from frame {start} on; expected at most the {frames} of clip {clip.key}: crop "
            "the video"
        )
    truth = EstimatedClip(
        mouth_open=np.zeros(frames, np.float32),
        valid=np.zeros(frames, bool),
        delta_e=np.zeros(frames, np.float32),
        motion=np.zeros(frames, np.float32),
        truth_mouth=clip.states[:, mouth],
        truth_motion=motion(clip.states, np.ones(frames, bool)),
        silent=silent_frames(clip),
        closures_s=closure_times(clip),
        states=np.zeros_like(clip.states),
        truth_states=clip.states,
        state=clip.state,
        emotion=clip.emotion,
        gesture=clip.gesture,
        doing=clip.doing,
    ).between(start, start + len(states))
    estimated = {"mouth_open": states[:, mouth], "valid": valid, "delta_e": delta_e, "motion": motion(states, valid)}
    return replace(truth, **estimated, states=states)


def _finite(video: Float[Tensor, "c f h w"]) -> Bool[np.ndarray, " f"]:
    return torch.isfinite(video).all(dim=3).all(dim=2).all(dim=0).cpu().numpy()


@functools.lru_cache(maxsize=256)
def _estimator(identity: Identity, size: int, setting: Setting) -> StateEstimator:
    return StateEstimator(identity, size, setting)
