"""Writing of MP4 files while frames and audio are generated: H.264 and AAC, which browsers play.

The data is written to `NAME.partial.mp4`, in fragments of a fifth of a second. If the process is killed, that file
plays up to its last fragments. At a clean end, or after Ctrl-C, it is rewritten with its index first and renamed
atomically, so a file with the final name is always complete. An existing file is not overwritten by default.
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

from avatar.errors import ExistingFileError, FileAccessError, UserError
from avatar.types import FRAME_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME

log = logging.getLogger(__name__)

# The index is written after the first fragment (delay_moov), because it contains the AAC encoder's priming: without it
# audio is 64 ms late.
FRAGMENTED = {"movflags": "delay_moov+default_base_moof", "frag_duration": "200000", "flush_packets": "1"}


class Mp4Writer:
    """Writer of one MP4 at 25 frames and 16,000 samples per second: a context manager, complete when the block ends.

    After an exception other than KeyboardInterrupt, the frames written so far stay in `self.partial`, and a warning is
    logged.

    Args:
        path: of the MP4; its folder is created if necessary.
        size: height and width in pixels, both even, or the side of a square.
        overwrite: whether an existing file at `path` is replaced.

    Raises:
        UserError: a size or name that cannot be encoded.
        ExistingFileError: `path` exists and `overwrite` is false.
        FileAccessError: the file cannot be created or written (no permission, disk full).
    """

    def __init__(self, path: str | Path, size: int | tuple[int, int], overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.frames = 0
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"got {path} as output; expected a name that ends in .mp4: change it")
        if self.height % 2 or self.width % 2 or min(self.height, self.width) < 2:
            raise UserError(
                f"got frames of {self.height} x {self.width}; expected even sides, for H.264 with subsampled colours: "
                "crop or pad by one pixel"
            )
        self._reject_existing()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial = _create_partial(self.path)
        except OSError as error:
            raise FileAccessError(
                f"can't write {path} ({error.strerror}); expected a writable folder: choose another one"
            ) from None
        try:
            self._open()
        except BaseException as error:
            self.partial.unlink(missing_ok=True)
            if isinstance(error, av.error.FFmpegError):
                raise self._write_error(error) from error
            raise

    def _open(self) -> None:
        self._container = av.open(str(self.partial), "w", format="mp4", options=FRAGMENTED)
        # zerolatency: frames that wait in the encoder would be lost if the process is killed.
        self._video = self._container.add_stream(
            "libx264", rate=FRAME_RATE, options={"preset": "veryfast", "tune": "zerolatency", "crf": "18"}
        )
        self._video.height, self._video.width, self._video.pix_fmt = self.height, self.width, "yuv420p"
        self._video.codec_context.colorspace = Colorspace.ITU601  # as PyAV converts RGB; without it players guess
        self._audio = self._container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", bit_rate=64_000)

    def write(self, frames: UInt8[np.ndarray, "f h w 3"], samples: Float32[np.ndarray, " s"]) -> None:
        """Append frames and their audio.

        Args:
            frames: of the writer's size.
            samples: 640 per frame, in [-1, 1].

        Raises:
            UserError: another size or number of samples.
            FileAccessError: the disk is full.
        """
        if frames.shape[1:3] != (self.height, self.width) or len(samples) != len(frames) * SAMPLES_PER_FRAME:
            raise UserError(
                f"got {len(frames)} frames of {frames.shape[1]} x {frames.shape[2]} pixels and {len(samples)} samples; "
                f"expected {self.height} x {self.width} pixels and {SAMPLES_PER_FRAME} samples per frame: change them"
            )
        try:
            for image, audio in zip(frames, samples.reshape(len(frames), SAMPLES_PER_FRAME), strict=True):
                self._mux(self._video, self._video_frame(image))
                self._mux(self._audio, self._audio_frame(audio))
                self.frames += 1
        except av.error.FFmpegError as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Finish the file and rename it to its final name. Raises UserError if no frame was written."""
        if not self.frames:
            self.abandon()
            raise UserError(f"got no frame for {self.path}; expected at least one: use longer audio")
        complete = self.partial.with_stem(self.partial.stem + "-faststart")
        try:
            self._mux(self._video, None)
            self._mux(self._audio, None)
            self._container.close()
            if not _is_complete(self.partial):
                raise FileAccessError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _copy_index_first(self.partial, complete)
            self._reject_existing()
            os.replace(complete, self.path)
        except (av.error.FFmpegError, OSError) as error:
            self.abandon()
            if isinstance(error, FileExistsError):
                raise
            raise self._write_error(error) from error
        finally:
            complete.unlink(missing_ok=True)
        self.partial.unlink()

    def abandon(self) -> None:
        """Stop without finishing the file; the frames written so far stay in `self.partial`."""
        with contextlib.suppress(av.error.FFmpegError):  # on a full disk the trailer cannot be written either
            self._container.close()
        if self.frames:
            log.warning("%s is not complete; its first %d frames are in %s", self.path, self.frames, self.partial)
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

    def _video_frame(self, pixels: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = self.frames, Fraction(1, FRAME_RATE)
        return frame

    def _audio_frame(self, samples: np.ndarray) -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts, frame.time_base = self.frames * len(samples), Fraction(1, SAMPLE_RATE)
        return frame

    def _mux(self, stream, frame: av.VideoFrame | av.AudioFrame | None) -> None:
        for packet in stream.encode(frame):
            self._container.mux(packet)

    def _reject_existing(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise _existing_file_error(self.path)

    def _write_error(self, error: av.error.FFmpegError | OSError) -> FileAccessError:
        return FileAccessError(
            f"can't write {self.path} ({error.strerror}) after {self.frames} frames; free some space there or choose "
            "another folder"
        )


def _existing_file_error(path: Path) -> ExistingFileError:
    return ExistingFileError(f"{path} exists and is not overwritten; choose another name or move it")


def _create_partial(path: Path) -> Path:
    """Create an empty file next to `path`, with the first unused name of NAME.partial.EXT, NAME.partial-2.EXT, …"""
    count = 1
    while True:
        partial = path.with_name(f"{path.stem}.partial{f'-{count}' if count > 1 else ''}{path.suffix}")
        try:
            partial.open("xb").close()
        except FileExistsError:
            count += 1  # it belongs to a run that was killed, or that is still writing
        else:
            return partial


def _copy_index_first(fragmented: Path, target_path: Path) -> None:
    """Copy a video without re-encoding, with its index before its data, so that browsers can start to play it."""
    with (
        av.open(str(fragmented)) as source,
        av.open(str(target_path), "w", options={"movflags": "faststart"}) as target,
    ):
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:  # the last packets of the demuxer are empty
                packet.stream = streams[packet.stream_index]
                target.mux(packet)


def _is_complete(fragmented: Path) -> bool:
    """Whether the last box of a fragmented MP4 is on disk: PyAV reports no error if the last write fails."""
    with fragmented.open("rb") as file:
        file.seek(-16, os.SEEK_END)
        return file.read(16)[4:8] == b"mfro"
