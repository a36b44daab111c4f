"""Clips of 1 + s·k frames, written to disk while a shot goes by: pictures as MP4, sound as FLAC.

The same frames make the same bytes: the encoder runs on one thread, and nothing in the file says when it was made.
"""

from dataclasses import dataclass
from pathlib import Path

import av
import av.codec.context
import av.container
import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from avatar.data.prepare import scores
from avatar.data.prepare.picture import FORMAT, numbered
from avatar.data.prepare.scores import FaceDetector, Look
from avatar.data.prepare.sound import to_int16
from avatar.types import FRAME_RATE, SAMPLE_RATE

BITEXACT = {"fflags": "+bitexact"}


def whole_length(frames: int, stride: int) -> int:
    """The longest 1 + s·k that is at most `frames`."""
    return 1 + (frames - 1) // stride * stride


@dataclass(frozen=True)
class Clip:
    """A clip whose pictures are on the disk, and what was seen of them on the way."""

    stem: Path  # what its files' names start with
    start: int  # on the source's grid
    frames: int
    shot: int  # of the source
    motion: float | None
    still: int  # frames in the longest run without change
    sharpness: float
    faces: Float32[np.ndarray, "f 4"] | None  # None: nobody looked
    most_faces: int
    mouth: Float[np.ndarray, " f"] | None  # motion there

    def file(self, name: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{name}")

    @property
    def video(self) -> Path:
        return self.file("video.mp4")

    @property
    def first(self) -> Path:
        """Its first picture, kept while references are chosen."""
        return self.file("first.png")


class ClipWriter:
    """One clip in the making: the frame it starts with, then groups of `stride` frames, each written when it is whole.

    Args:
        preset, crf: Of libx264.
    """

    def __init__(
        self, stem: Path, start: int, shot: int, stride: int, detector: FaceDetector | None, preset: str, crf: int
    ):
        self.stem, self.start, self.shot, self.stride, self.detector = stem, start, shot, stride, detector
        self.frames = 0
        self._options = {"preset": preset, "crf": str(crf), "threads": "1", "bf": "0", "g": str(FRAME_RATE)}
        self._container: av.container.OutputContainer | None = None
        self._pending: list[av.VideoFrame] = []
        self._looks: list[Look] = []
        self._sharpness: list[float] = []
        self._faces: list[np.ndarray] = []
        self._counts: list[int] = []
        self._mouth: list[float] = []
        self._luma: np.ndarray | None = None

    def take(self, picture: av.VideoFrame, look: Look) -> None:
        """The next frame of the shot, formed."""
        if self._container is None:
            self._open(picture)
        if len(self._looks) % scores.BLUR_EVERY == 0:
            self._sharpness.append(scores.sharpness(scores.luma_of(picture)))
        if self.detector is not None:
            self._find_face(picture, self.detector)
        self._looks.append(look)
        self._pending.append(picture)
        if self.frames == 0 or len(self._pending) == self.stride:
            for pending in self._pending:
                assert self._container is not None
                self._container.mux(self._stream.encode(numbered(pending, self.frames)))
                self.frames += 1
            self._pending.clear()

    def close(self) -> Clip:
        """Finishes the file; the frames of a group that never became whole are forgotten."""
        assert self._container is not None
        self._container.mux(self._stream.encode(None))
        self._container.close()
        n = self.frames
        looked = self.detector is not None
        return Clip(
            self.stem,
            self.start,
            n,
            self.shot,
            scores.motion(self._looks[:n]),
            scores.longest_still(self._looks[:n]),
            float(np.mean(self._sharpness[: -(-n // scores.BLUR_EVERY)])),
            np.stack(self._faces[:n]).astype(np.float32) if looked else None,
            max(self._counts[:n]) if looked else 0,
            np.array(self._mouth[:n]) if looked else None,
        )

    def _find_face(self, picture: av.VideoFrame, detector: FaceDetector) -> None:
        boxes = detector(picture.to_ndarray(format="rgb24"))
        face, luma = scores.largest(boxes), scores.luma_of(picture).copy()
        self._faces.append(face)
        self._counts.append(len(boxes))
        self._mouth.append(scores.mouth_motion(luma, self._luma, face))
        self._luma = luma

    def _open(self, first: av.VideoFrame) -> None:
        Image.fromarray(first.to_ndarray(format="rgb24")).save(self.stem.with_name(f"{self.stem.name}.first.png"))
        video = str(self.stem.with_name(f"{self.stem.name}.video.mp4"))
        self._container = av.open(video, "w", format="mp4", options=BITEXACT | {"movflags": "faststart"})
        self._stream = self._container.add_stream("libx264", rate=FRAME_RATE, options=self._options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = first.width, first.height, FORMAT
        context = self._stream.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        # Colours keep their meaning: how players turn Y, Cb and Cr into RGB is said, not guessed.
        context.colorspace, context.color_primaries = first.colorspace, first.color_primaries
        context.color_trc, context.color_range = first.color_trc, 1


def write_sound(path: Path, samples: Float32[np.ndarray, " s"]) -> None:
    """16-bit FLAC at 16 kHz."""
    with av.open(str(path), "w", format="flac", options=BITEXACT) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        frame = av.AudioFrame.from_ndarray(to_int16(samples)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
