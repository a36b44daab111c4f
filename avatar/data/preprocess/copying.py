"""Cutting of H.264 streams at packets: it copies videos that need no change, without re-encoding.

Count packets in decoding order and frames in presentation order. A stream can be cut at c if its first c packets are
its first c frames: then neither side needs the other. A clip can start at c if, in addition, packet c is a key frame.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Bool, Int

from avatar.data.preprocess.clips import BITEXACT, VideoClip
from avatar.data.preprocess.probe import Probe, open_source, video_stream
from avatar.data.preprocess.video_frames import FORMAT
from avatar.errors import FileAccessError
from avatar.types import FRAME_RATE

CODEC = "h264"  # of encoded clips too, so that a data set has one codec
LENGTH_PREFIXED = b"\x01"  # first byte of the H.264 header in MP4 and Matroska, unlike in a transport stream
IDR = 5  # NAL unit type of frames at which decoding can start; other types may be marked as key frames too
MAX_LOST_GROUPS = 2  # groups of frames lost at the end of a clip
MAX_TIME_ERROR_S = 0.019  # of a time stamp against the grid, so that its frame is shown at the middle of its interval


@dataclass(frozen=True)
class CutPoints:
    """Frames at which a stream can be cut. Frame i of the stream is frame i of the grid."""

    frame_of: Int[np.ndarray, " packets"]  # the frame in each packet
    allowed: Bool[np.ndarray, " packets+1"]  # whether the stream can be cut before packet, and frame, c
    starts: Int[np.ndarray, " keys"]  # frames at which a clip can start, sorted

    def last_start_between(self, first: int, last: int) -> int | None:
        """The last frame in [first, last] at which a clip can start."""
        found = self.starts[(self.starts >= first) & (self.starts <= last)]
        return int(found[-1]) if len(found) else None

    def clip_lengths(self, start: int, most: int, stride: int) -> Int[np.ndarray, " n"] | None:
        """All lengths 1 + s·k up to `most` with which a clip can be copied from `start` on.

        None if it can't start there, or if a cut could lose more than `MAX_LOST_GROUPS` groups of frames for some end
        of the shot.
        """
        if start not in self.starts:
            return None
        candidates = np.arange(1, min(most, len(self.frame_of) - start) + 1, stride)
        found = candidates[self.allowed[start + candidates]]
        return found if np.diff([*found, candidates[-1]]).max() <= MAX_LOST_GROUPS * stride else None


class CopiedVideo:
    """Counts the frames of a clip that `copy_clips` will copy; its length is the last one at which a cut is possible.

    Args:
        lengths: lengths at which the stream can be cut (`CutPoints.clip_lengths`).
    """

    def __init__(self, lengths: Int[np.ndarray, " n"]):
        self.method, self.frames = "copied", 0
        self._lengths, self._pushed, self._previous = set(lengths.tolist()), 0, None

    def push(self, frame: av.VideoFrame) -> None:
        if frame is self._previous:  # repeated, since the next packet has no frame: later cuts would be shifted
            self._lengths.clear()
        self._pushed, self._previous = self._pushed + 1, frame
        if self._pushed in self._lengths:
            self.frames = self._pushed

    def close(self) -> None:
        """Nothing to close."""


def find_cut_points(path: Path, info: Probe) -> CutPoints | None:
    """Read all packets of a stream for its cut points.

    None for a stream that isn't 8-bit 4:2:0 H.264 on the grid, or that has key frames that aren't IDR frames.
    """
    if info.codec != CODEC or info.pixel_format != FORMAT or info.interlaced or info.discarded:
        return None
    times, keys = [], []
    with open_source(path) as container:
        stream = video_stream(container)
        header = stream.codec_context.extradata or b""
        if not header.startswith(LENGTH_PREFIXED) or stream.time_base is None:
            return None
        tick, size = float(stream.time_base), 1 + (header[4] & 3)
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            if packet.is_keyframe and IDR not in _nal_unit_types(bytes(packet), size):
                return None
            times.append(packet.pts * tick)
            keys.append(packet.is_keyframe)
    times, keys = np.array(times), np.array(keys)
    frame_of = np.argsort(np.argsort(times, kind="stable"), kind="stable")
    error = times - info.start_s - frame_of / FRAME_RATE
    if np.abs(error).max() > MAX_TIME_ERROR_S:
        return None
    numbers = np.arange(len(times))
    allowed = np.concatenate([[True], np.maximum.accumulate(frame_of) == numbers])
    return CutPoints(frame_of, allowed, np.flatnonzero(keys & allowed[:-1] & (frame_of == numbers)))


def copy_clips(path: Path, clips: Sequence[VideoClip], cut_points: CutPoints) -> None:
    """Write the videos of clips from the packets of their source.

    Args:
        clips: sorted by start.

    Raises:
        FileAccessError: the file has become shorter since it was probed.
    """
    for clip, packets in zip(clips, _clip_packets(path, clips), strict=True):
        frames = cut_points.frame_of[clip.start : clip.start + clip.frames] - clip.start
        delay = int((np.arange(clip.frames) - frames).max())  # of presentation after decoding, in frames
        with av.open(str(clip.video), "w", format="mp4", options=BITEXACT | {"movflags": "faststart"}) as file:
            stream = file.add_stream_from_template(packets[0].stream)
            for number, (packet, frame) in enumerate(zip(packets, frames, strict=True)):
                packet.stream = stream
                packet.time_base, packet.duration = Fraction(1, FRAME_RATE), 1
                packet.pts, packet.dts = int(frame), number - delay
                file.mux(packet)


def _nal_unit_types(packet: bytes, size: int) -> set[int]:
    """The types of the NAL units in a packet, each preceded by its length in `size` bytes."""
    types, at = set(), 0
    while at + size < len(packet):
        types.add(packet[at + size] & 31)
        at += size + int.from_bytes(packet[at : at + size], "big")
    return types


def _clip_packets(path: Path, clips: Sequence[VideoClip]) -> Iterator[list[av.Packet]]:
    """Read the packets of each clip in one pass. Errors of writing occur in the caller, outside of `open_source`."""
    remaining = list(clips)
    with open_source(path) as container:
        packets: list[av.Packet] = []
        demuxed = (packet for packet in container.demux(video_stream(container)) if packet.pts is not None)
        for number, packet in enumerate(demuxed):
            if not remaining:
                return
            if number >= remaining[0].start:
                packets.append(packet)
            if number + 1 == remaining[0].start + remaining[0].frames:
                yield packets
                remaining, packets = remaining[1:], []
    if remaining:
        raise FileAccessError(
            f"{path} has fewer frames than when it was probed: make sure that nothing writes to it, and run again"
        )
