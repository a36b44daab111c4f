"""Video readers of preprocessed clips, which have a constant frame rate: frame i is the i-th one in presentation order.

They use decord where it is installed and decodes the width correctly, else PyAV; both return the same frames. A reader
must not be shared between processes.
"""

import io
from typing import Any, Protocol, runtime_checkable

import av
import av.error
import numpy as np
from jaxtyping import UInt8

from avatar.errors import UserError

Frames = UInt8[np.ndarray, "f h w 3"]


@runtime_checkable
class VideoReader(Protocol):
    """Interface of a reader of one video."""

    def read(self, start: int, stop: int) -> Frames:
        """Read the frames [start, stop).

        Raises:
            UserError: the video cannot be decoded, or has fewer frames.
        """
        ...


class Decord:
    """Video reader by decord, on one thread, since a worker of a data loader has one core."""

    def __init__(self, content: bytes, decord: Any):
        try:
            self._reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
            # At some widths (16, 24, 48, 72) decord returns the padding of lines as more colour channels.
            self.padded = len(self._reader) > 0 and self._reader[0].shape[2] != 3
        except (RuntimeError, decord.DECORDError) as error:
            raise _decoding_error(error) from error
        self._error = decord.DECORDError

    def read(self, start: int, stop: int) -> Frames:
        # decord may not return from a request for more frames than there are.
        _check_length(len(self._reader), stop)
        try:
            return self._reader.get_batch(range(start, stop)).asnumpy()
        except (RuntimeError, IndexError, self._error) as error:
            raise _decoding_error(error) from error


class PyAV:
    """Video reader by PyAV, which decodes from the first frame on."""

    def __init__(self, content: bytes):
        self._content = content

    def read(self, start: int, stop: int) -> Frames:
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
            raise _decoding_error(error) from error
        _check_length(start + len(frames), stop)
        return np.stack(frames)


def open_video(content: bytes) -> VideoReader:
    """Open a video from the bytes of its file.

    Raises:
        UserError: the bytes are not a video.
    """
    try:
        import decord  # in the worker process, because the import starts threads
    except ImportError:
        return PyAV(content)
    reader = Decord(content, decord)
    return PyAV(content) if reader.padded else reader


def _check_length(frames: int, stop: int) -> None:
    if frames < stop:
        raise UserError(f"got a video of {frames} frames; expected at least {stop}: preprocess the data set again")


def _decoding_error(error: BaseException) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:200] if lines else type(error).__name__  # decord lists addresses below the first line
    return UserError(f"got a video that can't be decoded ({reason}); expected an H.264 MP4: preprocess the set again")
