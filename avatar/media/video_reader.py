"""Frames out of prepared clips, which have a constant rate: frame i is the i-th one shown.

decord where it can be imported and gets the width right, else PyAV; both give the same pictures. Readers belong to the
process that opened them.
"""

import io
from typing import Any, Protocol, runtime_checkable

import av
import av.error
import numpy as np
from jaxtyping import UInt8

from avatar.errors import UserError

Pictures = UInt8[np.ndarray, "f h w 3"]


@runtime_checkable
class VideoReader(Protocol):
    """An open clip."""

    def read(self, start: int, stop: int) -> Pictures:
        """Frames from `start` up to and without `stop`.

        Raises:
            UserError: a clip that can't be decoded so far.
        """
        ...


class Decord:
    """By decord, in one thread: a worker of a loader has one core."""

    def __init__(self, content: bytes, decord: Any):
        try:
            self._reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
            # At some widths (16, 24, 48, 72) it takes the padding of lines for more colours.
            self.padded = len(self._reader) > 0 and self._reader[0].shape[2] != 3
        except (RuntimeError, decord.DECORDError) as error:
            raise UserError(f"video that can't be opened ({_line(error)})") from error
        self._error = decord.DECORDError

    def read(self, start: int, stop: int) -> Pictures:
        # Asked for more than there is, decord may try for ever.
        _check(len(self._reader), stop)
        try:
            return self._reader.get_batch(range(start, stop)).asnumpy()
        except (RuntimeError, IndexError, self._error) as error:
            raise UserError(f"video that can't be decoded ({_line(error)})") from error


class PyAV:
    """By PyAV, from the first frame on."""

    def __init__(self, content: bytes):
        self._content = content

    def read(self, start: int, stop: int) -> Pictures:
        frames = []
        try:
            with av.open(io.BytesIO(self._content), "r") as container:
                container.streams.video[0].codec_context.thread_count = 1
                for number, frame in enumerate(container.decode(video=0)):
                    if number >= start:
                        frames.append(frame.to_ndarray(format="rgb24"))
                    if number == stop - 1:
                        break
        except (av.error.FFmpegError, IndexError) as error:
            raise UserError(f"video that can't be decoded ({_line(error)})") from error
        _check(start + len(frames), stop)
        return np.stack(frames)


def open_video(content: bytes) -> VideoReader:
    """A reader of a video file's bytes.

    Raises:
        UserError: bytes that are no video.
    """
    try:
        import decord  # here, in the worker: it starts threads
    except ImportError:
        return PyAV(content)
    reader = Decord(content, decord)
    return PyAV(content) if reader.padded else reader


def _check(frames: int, stop: int) -> None:
    if frames < stop:
        raise UserError(f"video of {frames} frames, wanted {stop}")


def _line(error: BaseException) -> str:
    """What an error says, without the addresses that decord lists below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
