"""Clips of 1 + s·k frames, written to disk while a shot goes by: pictures as MP4, sound as FLAC.

The same frames make the same bytes: the encoder runs on one thread, and nothing in the file says when it was made.
"""

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
from avatar.data.preprocess.detectors import Detections, DetectionTracker, Detectors
from avatar.data.preprocess.picture import FORMAT, numbered
from avatar.data.preprocess.scores import FrameStats
from avatar.data.preprocess.sound import to_int16
from avatar.types import FRAME_RATE, SAMPLE_RATE

BITEXACT = {"fflags": "+bitexact"}


def whole_length(frames: int, stride: int) -> int:
    """The longest 1 + s·k that is at most `frames`."""
    return 1 + (frames - 1) // stride * stride


@dataclass(frozen=True)
class VideoClip:
    """A clip whose pictures have gone by, and what was found of them on the way."""

    stem: Path  # what its files' names start with
    start: int  # on the source's grid
    frames: int
    shot: int  # of the source
    pictures: str  # "encoded", or "copied": then they are still to be copied from the source
    motion: float | None
    still: int  # frames in the longest run without change
    sharpness: float
    seen: Detections

    def file(self, name: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{name}")

    @property
    def video(self) -> Path:
        return self.file("video.mp4")

    @property
    def first(self) -> Path:
        """Its first picture, kept while references are chosen."""
        return self.file("first.png")


@runtime_checkable
class Pictures(Protocol):
    """What becomes of a clip's pictures."""

    how: str  # "encoded" or "copied"
    frames: int  # of the clip so far: 1 + s·k of those that were taken

    def take(self, picture: av.VideoFrame) -> None: ...

    def close(self) -> None: ...


class Encoded:
    """Pictures encoded as they come: the first, then groups of `stride` frames, each when it is whole.

    Args:
        preset, crf: Of libx264.
    """

    def __init__(self, path: Path, stride: int, preset: str, crf: int):
        self.how, self.path, self.stride, self.frames = "encoded", path, stride, 0
        self._options = {"preset": preset, "crf": str(crf), "threads": "1", "bf": "0", "g": str(FRAME_RATE)}
        self._container: av.container.OutputContainer | None = None
        self._pending: list[av.VideoFrame] = []

    def take(self, picture: av.VideoFrame) -> None:
        if self._container is None:
            self._open(picture)
        self._pending.append(picture)
        if self.frames == 0 or len(self._pending) == self.stride:
            for pending in self._pending:
                assert self._container is not None
                self._container.mux(self._stream.encode(numbered(pending, self.frames)))
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
        # Colours keep their meaning: how players turn Y, Cb and Cr into RGB is said, not guessed.
        context.colorspace, context.color_primaries = first.colorspace, first.color_primaries
        context.color_trc, context.color_range = first.color_trc, 1


class ClipWriter:
    """One clip in the making: what is to be known of each picture is taken down before `pictures` takes it."""

    def __init__(self, stem: Path, start: int, shot: int, detectors: Detectors, pictures: Pictures):
        self.stem, self.start, self.shot, self.pictures = stem, start, shot, pictures
        self.taken = 0
        self._looks: list[FrameStats] = []
        self._sharpness: list[float] = []
        self._watcher = DetectionTracker(detectors)

    def take(self, picture: av.VideoFrame, look: FrameStats) -> None:
        """The next frame of the shot, formed."""
        if self.taken == 0:
            first = Image.fromarray(picture.to_ndarray(format="rgb24"))
            first.save(self.stem.with_name(f"{self.stem.name}.first.png"), compress_level=1)
        if self.taken % scores.BLUR_EVERY == 0:
            self._sharpness.append(scores.sharpness(scores.plane_of(picture, 0)))
        self._watcher.take(picture)
        self._looks.append(look)
        self.pictures.take(picture)
        self.taken += 1

    def close(self) -> VideoClip:
        """Finishes the file; what was taken after the last frame of the clip is forgotten."""
        self.pictures.close()
        n = self.pictures.frames
        return VideoClip(
            self.stem,
            self.start,
            n,
            self.shot,
            self.pictures.how,
            scores.motion(self._looks[:n]),
            scores.longest_still(self._looks[:n]),
            float(np.mean(self._sharpness[: -(-n // scores.BLUR_EVERY)])),
            self._watcher.seen(n),
        )


def write_sound(path: Path, samples: Float32[np.ndarray, " s"]) -> None:
    """16-bit FLAC at 16 kHz."""
    with av.open(str(path), "w", format="flac", options=BITEXACT) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        frame = av.AudioFrame.from_ndarray(to_int16(samples)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
