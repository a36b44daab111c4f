"""Frames and speech into an MP4 while they are generated: H.264 and AAC, as browsers play them.

The file grows under a name of its own, `NAME.partial.mp4`, in fragments of a fifth of a second: whatever kills the
process, that one plays up to its last fragments. A clean end, or Ctrl-C, rewrites it with its index first and gives it
the final name in one step, so that a file under the final name is always whole. Nothing that exists is overwritten
unless asked.
"""

import contextlib
import errno
import logging
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
from av.video.reformatter import Colorspace
from jaxtyping import Float32, UInt8
from PIL import Image

from avatar.errors import ExistingFileError, FileAccessError, UserError
from avatar.types import FRAME_RATE, SAMPLE_RATE

log = logging.getLogger(__name__)

# The index waits for the first fragment (delay_moov), because it must know the AAC encoder's priming: without, sound
# comes 64 ms late.
FRAGMENTED = {"movflags": "delay_moov+default_base_moof", "frag_duration": "200000", "flush_packets": "1"}


class Mp4Writer:
    """A context manager around one MP4: `write` as frames come, and the file stands when the block ends.

    Left by an exception other than KeyboardInterrupt, it keeps what was written as `self.partial`, and logs that.

    Args:
        path: Where the film goes in the end; its folder is made if there is none.
        size: Height and width in pixels, both even, or the side of a square.
        frame_rate: Frames per second; divides `sample_rate`.
        sample_rate: Samples per second.
        overwrite: Whether a file that stands at `path` may be replaced.

    Raises:
        UserError: a size, name or rate that can't be had.
        ExistingFileError: `path` exists and `overwrite` is not set.
        OSError: the file can't be made there or written on (no permission, disk full).
    """

    def __init__(
        self,
        path: str | Path,
        size: int | tuple[int, int],
        frame_rate: int = FRAME_RATE,
        sample_rate: int = SAMPLE_RATE,
        overwrite: bool = False,
    ):
        self.path, self.overwrite = Path(path), overwrite
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.frame_rate, self.sample_rate, self.frames = frame_rate, sample_rate, 0
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"got {path} to write to, wanted a name that ends in .mp4")
        if self.height % 2 or self.width % 2 or min(self.height, self.width) < 2:
            raise UserError(
                f"got frames of {self.height} x {self.width}, but H.264 with halved colour wants even sides; "
                "crop or pad by one pixel"
            )
        if sample_rate % frame_rate:
            raise UserError(f"got {sample_rate} samples and {frame_rate} frames a second, wanted whole samples a frame")
        self._refuse_existing()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial = _claim(self.path)
        except OSError as error:
            raise FileAccessError(
                f"can't write {path} ({error.strerror}), wanted a folder to write in; choose another one"
            ) from None
        try:
            self._open()
        except BaseException as error:
            self.partial.unlink(missing_ok=True)
            if isinstance(error, av.error.FFmpegError):
                raise self._cannot_write(error) from error
            raise

    def _open(self) -> None:
        self._container = av.open(str(self.partial), "w", format="mp4", options=FRAGMENTED)
        # zerolatency: no frame waits in the encoder, where a kill would lose it.
        self._video = self._container.add_stream(
            "libx264", rate=self.frame_rate, options={"preset": "veryfast", "tune": "zerolatency", "crf": "18"}
        )
        self._video.height, self._video.width, self._video.pix_fmt = self.height, self.width, "yuv420p"
        self._video.codec_context.colorspace = Colorspace.ITU601  # how PyAV converts RGB; else players guess
        self._audio = self._container.add_stream("aac", rate=self.sample_rate, layout="mono", bit_rate=64_000)

    def write(self, frames: UInt8[np.ndarray, "f h w 3"], samples: Float32[np.ndarray, " s"]) -> None:
        """Appends frames and the speech that sounds during them, in [-1, 1]."""
        per_frame = self.sample_rate // self.frame_rate
        if frames.shape[1:3] != (self.height, self.width) or len(samples) != len(frames) * per_frame:
            raise UserError(
                f"got {len(frames)} frames of {frames.shape[1]} x {frames.shape[2]} and {len(samples)} samples, wanted "
                f"{self.height} x {self.width} pixels and {per_frame} samples a frame; render and cut them so"
            )
        try:
            for picture, sound in zip(frames, samples.reshape(len(frames), per_frame), strict=True):
                self._mux(self._video, self._picture(picture))
                self._mux(self._audio, self._sound(sound))
                self.frames += 1
        except av.error.FFmpegError as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Finishes the film and gives it its final name."""
        if not self.frames:
            self.abandon()
            raise UserError(f"got no frame for {self.path}; wanted at least one: give longer audio")
        whole = self.partial.with_stem(self.partial.stem + "-faststart")
        try:
            self._mux(self._video, None)
            self._mux(self._audio, None)
            self._container.close()
            if not _ends_whole(self.partial):
                raise FileAccessError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _index_first(self.partial, whole)
            self._refuse_existing()
            os.replace(whole, self.path)
        except (av.error.FFmpegError, OSError) as error:
            self.abandon()
            if isinstance(error, FileExistsError):
                raise
            raise self._cannot_write(error) from error
        finally:
            whole.unlink(missing_ok=True)
        self.partial.unlink()

    def abandon(self) -> None:
        """Stops here; what was written stays as `self.partial`, if it is anything."""
        with contextlib.suppress(av.error.FFmpegError):  # a disk that is full refuses the trailer too
            self._container.close()
        if self.frames:
            log.warning(
                "%s is unfinished; what was written of its %d frames is in %s", self.path, self.frames, self.partial
            )
        else:
            self.partial.unlink(missing_ok=True)

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (issubclass(kind, KeyboardInterrupt) and self.frames):
            self.close()
        else:
            self.abandon()

    def _picture(self, pixels: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = self.frames, Fraction(1, self.frame_rate)
        return frame

    def _sound(self, samples: np.ndarray) -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="fltp", layout="mono")
        frame.sample_rate = self.sample_rate
        frame.pts, frame.time_base = self.frames * len(samples), Fraction(1, self.sample_rate)
        return frame

    def _mux(self, stream, frame: av.VideoFrame | av.AudioFrame | None) -> None:
        for packet in stream.encode(frame):
            self._container.mux(packet)

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise ExistingFileError(f"{self.path} exists, and is not overwritten; choose another name or move it away")

    def _cannot_write(self, error: av.error.FFmpegError | OSError) -> FileAccessError:
        return FileAccessError(
            f"can't write {self.path} ({error.strerror}) after {self.frames} frames; "
            "free some space on that disk or choose another folder"
        )


def write_png(path: str | Path, image: UInt8[np.ndarray, "h w 3"], overwrite: bool = False) -> None:
    """Writes a picture in one step, so that a file under that name is always whole."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise ExistingFileError(f"{path} exists, and is not overwritten; choose another name or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _claim(path)
    try:
        Image.fromarray(image).save(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _claim(path: Path) -> Path:
    """Makes an empty file beside `path` under the first of NAME.partial.EXT, NAME.partial-2.EXT, ... that is free."""
    count = 1
    while True:
        partial = path.with_name(f"{path.stem}.partial{f'-{count}' if count > 1 else ''}{path.suffix}")
        try:
            partial.open("xb").close()
        except FileExistsError:
            count += 1  # of a run that was killed, or one that still writes
        else:
            return partial


def _index_first(fragmented: Path, whole: Path) -> None:
    """Copies a film, without encoding it again, so that its index stands before its data and browsers can start."""
    with av.open(str(fragmented)) as source, av.open(str(whole), "w", options={"movflags": "faststart"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:  # the demuxer's last packets are empty
                packet.stream = streams[packet.stream_index]
                target.mux(packet)


def _ends_whole(fragmented: Path) -> bool:
    """Whether the box that ends a fragmented film came to the disk; PyAV reports no error of the very last write."""
    with fragmented.open("rb") as file:
        file.seek(-16, os.SEEK_END)
        return file.read(16)[4:8] == b"mfro"
