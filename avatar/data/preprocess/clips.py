"""Clips of 1 + s·k frames, written while the frames of a shot are decoded: video as MP4, audio as FLAC.

The output is deterministic: the encoder runs on one thread, and the files contain no time of creation.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import av
import av.codec.context
import av.container
import numpy as np
from jaxtyping import Float32
from PIL import Image

from avatar.data.preprocess import scores
from avatar.data.preprocess.audio import to_int16
from avatar.data.preprocess.detectors import Detections, DetectionTracker, Detectors
from avatar.data.preprocess.scores import FrameStats
from avatar.data.preprocess.video_frames import FORMAT, set_frame_number
from avatar.types import FRAME_RATE, SAMPLE_RATE

BITEXACT = {"fflags": "+bitexact"}


def max_clip_length(frames: int, stride: int) -> int:
    """The largest 1 + s·k that is at most `frames`."""
    return 1 + (frames - 1) // stride * stride


@dataclass(frozen=True)
class VideoClip:
    """A clip whose frames were all decoded, with the measurements of its frames."""

    stem: Path  # prefix of the names of its files
    start: int  # on the frame grid of the source
    frames: int
    shot: int  # of the source, counted from 0
    video_method: str  # "encoded", or "copied": then `copying.copy_clips` has yet to write the video
    motion: float | None
    longest_freeze: int  # frames in the longest run without change
    sharpness: float
    detections: Detections

    def file(self, name: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{name}")

    @property
    def video(self) -> Path:
        return self.file("video.mp4")

    @property
    def first_frame(self) -> Path:
        """The image of its first frame, kept until the references are chosen."""
        return self.file("first.png")


@runtime_checkable
class VideoOutput(Protocol):
    """Receives the frames of a clip and decides its length."""

    method: str  # "encoded" or "copied"
    frames: int  # length of the clip so far: the largest possible 1 + s·k of the frames that were pushed

    def push(self, frame: av.VideoFrame) -> None: ...

    def close(self) -> None: ...


class EncodedVideo:
    """Encodes frames with libx264: the first one, then groups of `stride` frames, each when it is complete.

    Args:
        stride: frames per latent.
        preset, crf: settings of libx264.
    """

    def __init__(self, path: Path, stride: int, preset: str, crf: int):
        self.method, self.path, self.stride, self.frames = "encoded", path, stride, 0
        self._options = {"preset": preset, "crf": str(crf), "threads": "1", "bf": "0", "g": str(FRAME_RATE)}
        self._container: av.container.OutputContainer | None = None
        self._pending: list[av.VideoFrame] = []

    def push(self, frame: av.VideoFrame) -> None:
        if self._container is None:
            self._open(frame)
        self._pending.append(frame)
        if self.frames == 0 or len(self._pending) == self.stride:
            for pending in self._pending:
                assert self._container is not None
                self._container.mux(self._stream.encode(set_frame_number(pending, self.frames)))
                self.frames += 1
            self._pending.clear()

    def close(self) -> None:
        assert self._container is not None
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def _open(self, first: av.VideoFrame) -> None:
        options = BITEXACT | {"movflags": "faststart"}
        self._container = av.open(str(self.path), "w", format="mp4", options=options)
        self._stream = self._container.add_stream("libx264", rate=FRAME_RATE, options=self._options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = first.width, first.height, FORMAT
        context = self._stream.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        # Colours are preserved: the file specifies the conversion of Y, Cb and Cr to RGB, so that players don't guess.
        context.colorspace, context.color_primaries = first.colorspace, first.color_primaries
        context.color_trc, context.color_range = first.color_trc, 1


class ClipWriter:
    """Measures each frame of a clip and passes it on to a video output, which decides the length of the clip."""

    def __init__(self, stem: Path, start: int, shot: int, detectors: Detectors, output: VideoOutput):
        self.stem, self.start, self.shot, self.output = stem, start, shot, output
        self.pushed = 0
        self._stats: list[FrameStats] = []
        self._sharpness: list[float] = []
        self._tracker = DetectionTracker(detectors)

    def push(self, frame: av.VideoFrame, stats: FrameStats) -> None:
        """Append the next frame of the shot, after its conversion."""
        if self.pushed == 0:
            first = Image.fromarray(frame.to_ndarray(format="rgb24"))
            first.save(self.stem.with_name(f"{self.stem.name}.first.png"), compress_level=1)
        if self.pushed % scores.SHARPNESS_INTERVAL == 0:
            self._sharpness.append(scores.sharpness(scores.plane(frame, 0)))
        self._tracker.push(frame)
        self._stats.append(stats)
        self.output.push(frame)
        self.pushed += 1

    def close(self) -> VideoClip:
        """Finish the file; frames after the end of the clip are dropped."""
        self.output.close()
        n = self.output.frames
        return VideoClip(
            self.stem,
            self.start,
            n,
            self.shot,
            self.output.method,
            scores.motion(self._stats[:n]),
            scores.longest_freeze(self._stats[:n]),
            float(np.mean(self._sharpness[: math.ceil(n / scores.SHARPNESS_INTERVAL)])),
            self._tracker.detections(n),
        )


def write_flac(path: Path, samples: Float32[np.ndarray, " s"]) -> None:
    """Write 16-bit FLAC at 16 kHz."""
    with av.open(str(path), "w", format="flac", options=BITEXACT) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        frame = av.AudioFrame.from_ndarray(to_int16(samples)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
