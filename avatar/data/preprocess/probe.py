"""Probe of a video file: reads all packets and decodes the first frames, before the file is decoded completely."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import av.container
import av.error

from avatar.data.preprocess.reasons import Rejected
from avatar.media.decode import TEXT_CODECS

FIRST_FRAMES = 5  # that are checked for interlacing
MAX_STEP_SPREAD_S = 0.001  # between the longest and the shortest step of a constant frame rate
MAX_MISSING_S = 0.5  # that the file may be shorter than the container's header claims


@dataclass(frozen=True)
class Probe:
    """Properties of the video stream of a file; times in seconds of the file's clock.

    The fields are stored in the status line of the source.
    """

    width: int  # as stored, before any rotation
    height: int
    pixel_format: str
    limited_range: bool  # luma from 16 to 235; also if the file does not specify it
    rotation: int  # counter-clockwise quarter turns that make the frame upright, 0 to 3
    pixel_aspect: float  # width / height of a stored pixel
    interlaced: bool
    claimed: int  # frames by the container's header; 0: not specified
    packets: int
    discarded: int  # packets before the first frame to be shown, for decoding only
    start_s: float
    end_s: float
    step_spread_s: float
    codec: str
    audio: bool

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def frame_rate(self) -> float:
        return (self.packets - self.discarded) / self.seconds if self.seconds > 0 else 0.0

    @property
    def has_variable_rate(self) -> bool:
        """Whether the steps between frames differ by more than the rounding of a container."""
        return self.step_spread_s > MAX_STEP_SPREAD_S + 1e-6

    def to_dict(self) -> dict[str, Any]:
        """The content of `probe` in a status line."""
        return {**asdict(self), "frame_rate": self.frame_rate}


def probe(path: Path) -> Probe:
    """Read all packets and the first frames of a file.

    Raises:
        Rejected: empty, unreadable, corrupt, no_video, frame_count, too_short.
    """
    try:
        if path.stat().st_size == 0:
            raise Rejected("empty", "0 bytes")
    except OSError as error:
        raise Rejected("unreadable", error.strerror or str(error)) from None
    with open_source(path) as container:
        stream = video_stream(container)
        first = list(islice(container.decode(stream), FIRST_FRAMES))
        if not first:
            raise Rejected("corrupt", "no frame can be decoded")
        turns = first[0].rotation // 90 % 4
        interlaced = any(frame.interlaced_frame for frame in first)
        limited = first[0].color_range != 2 and not first[0].format.name.startswith("yuvj")
    with open_source(path) as container:
        stream = video_stream(container)
        times, ends, discarded, last = [], [], 0, 0.0
        ticks = {stream.index: float(stream.time_base or 0) for stream in container.streams}
        for packet in container.demux():
            if packet.pts is None:
                continue  # the demuxer's last packets are empty
            tick = ticks[packet.stream_index]
            end = (packet.pts + (packet.duration or 0)) * tick
            last = max(last, end)
            if packet.stream_index == stream.index:
                if packet.is_discard:
                    discarded += 1
                else:
                    times.append(packet.pts * tick)
                    ends.append(end)
        packets = len(times) + discarded
        claimed_s = float((container.duration or 0) / av.time_base) + float((container.start_time or 0) / av.time_base)
        if stream.frames and stream.frames != packets:
            raise Rejected("frame_count", f"{stream.frames} frames by its header, but {packets} found")
        if claimed_s - last > MAX_MISSING_S:
            raise Rejected("frame_count", f"{claimed_s:.2f} s by its header, but {last:.2f} s found")
        if len(times) < 2:
            raise Rejected("too_short", f"{len(times)} frames")
        times.sort()
        steps = [later - earlier for earlier, later in pairwise(times)]
        aspect = float(stream.sample_aspect_ratio or 1)
        return Probe(
            stream.codec_context.width,
            stream.codec_context.height,
            first[0].format.name,
            limited,
            turns,
            aspect if aspect > 0 else 1.0,
            interlaced,
            stream.frames,
            packets,
            discarded,
            times[0],
            max(ends) if max(ends) > times[-1] else times[-1] + steps[-1],  # if packets have no duration
            max(steps) - min(steps),
            stream.codec_context.name,
            bool(container.streams.audio),
        )


@contextmanager
def open_source(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a file for reading on one thread; any FFmpeg error inside the block rejects the file as corrupt.

    Write nothing inside the block: errors of writing would be attributed to the source.
    """
    try:
        with av.open(str(path)) as container:
            for stream in container.streams.video:
                stream.codec_context.thread_count = 1  # sources are preprocessed in parallel
            yield container
    except (av.error.FileNotFoundError, av.error.PermissionError) as error:
        raise Rejected("unreadable", error.strerror or str(error)) from None
    except av.error.FFmpegError as error:
        raise Rejected("corrupt", error.strerror or str(error)) from None


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream, without text files, which FFmpeg reads as video of a terminal."""
    streams = [s for s in container.streams.video if s.codec_context.name not in TEXT_CODECS]
    if not streams:
        raise Rejected("no_video", f"streams: {', '.join(s.type for s in container.streams) or 'none'}")
    return streams[0]
