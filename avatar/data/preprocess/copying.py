"""Pictures that are as they shall be, taken over packet by packet: nothing is lost, and encoding is saved.

With packets counted in the order of decoding and frames in that of showing, a stream can be cut at c where its first c
packets are its first c frames: neither side needs the other. A clip can start there if packet c is a key frame as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Bool, Int

from avatar.data.preprocess.clips import BITEXACT, VideoClip
from avatar.data.preprocess.picture import FORMAT
from avatar.data.preprocess.probe import Probe, opened, picture_stream
from avatar.errors import FileAccessError
from avatar.types import FRAME_RATE

CODEC = "h264"  # what encoded clips are, so that readers meet nothing else
LENGTH_PREFIXED = b"\x01"  # how the header of H.264 begins in MP4 and Matroska, unlike in a transport stream
IDR = 5  # the kind of NAL unit of pictures at which decoding can begin whatever came before; key frames may be others
MOST_LOST = 2  # groups of frames at a clip's end
MOST_TREMBLE_S = 0.019  # of a time stamp off the grid, for its picture to be the one shown at the interval's middle


@dataclass(frozen=True)
class Cuts:
    """Where a stream whose frame i is the grid's frame i can be cut."""

    frame_of: Int[np.ndarray, " packets"]  # the frame in each packet
    possible: Bool[np.ndarray, " packets+1"]  # a cut before packet, and frame, c
    starts: Int[np.ndarray, " keys"]  # sorted

    def start_between(self, first: int, last: int) -> int | None:
        """The last frame from `first` to `last` that a clip can start with."""
        found = self.starts[(self.starts >= first) & (self.starts <= last)]
        return int(found[-1]) if len(found) else None

    def lengths(self, start: int, most: int, stride: int) -> Int[np.ndarray, " n"] | None:
        """All 1 + s·k of at most `most` that a clip from `start` on can be copied with; None if it can't start there,
        or if cutting it would lose more than a few frames, wherever its shot ends."""
        if start not in self.starts:
            return None
        wanted = np.arange(1, min(most, len(self.frame_of) - start) + 1, stride)
        found = wanted[self.possible[start + wanted]]
        return found if np.diff([*found, wanted[-1]]).max() <= MOST_LOST * stride else None


class Copied:
    """Pictures that are left where they are until `copy`; a clip of them has one of the lengths at which the stream can
    be cut."""

    def __init__(self, lengths: Int[np.ndarray, " n"]):
        self.how, self.frames = "copied", 0
        self._lengths, self._taken, self._before = set(lengths.tolist()), 0, None

    def take(self, picture: av.VideoFrame) -> None:
        if picture is self._before:  # shown for longer, since the next packet makes no frame
            self._lengths.clear()
        self._taken, self._before = self._taken + 1, picture
        if self._taken in self._lengths:
            self.frames = self._taken

    def close(self) -> None:
        """Nothing is open."""


def cuts(path: Path, found: Probe) -> Cuts | None:
    """None for a stream that isn't H.264 of 8 bits 4:2:0 on the grid, or whose key frames aren't all IDR pictures."""
    if found.codec != CODEC or found.pixel_format != FORMAT or found.interlaced or found.discarded:
        return None
    times, keys = [], []
    with opened(path) as container:
        stream = picture_stream(container)
        header = stream.codec_context.extradata or b""
        if not header.startswith(LENGTH_PREFIXED) or stream.time_base is None:
            return None
        tick, size = float(stream.time_base), 1 + (header[4] & 3)
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            if packet.is_keyframe and IDR not in _units(bytes(packet), size):
                return None
            times.append(packet.pts * tick)
            keys.append(packet.is_keyframe)
    times, keys = np.array(times), np.array(keys)
    frame_of = np.argsort(np.argsort(times, kind="stable"), kind="stable")
    off = times - found.start_s - frame_of / FRAME_RATE
    if np.abs(off).max() > MOST_TREMBLE_S:
        return None
    numbers = np.arange(len(times))
    possible = np.concatenate([[True], np.maximum.accumulate(frame_of) == numbers])
    return Cuts(frame_of, possible, np.flatnonzero(keys & possible[:-1] & (frame_of == numbers)))


def copy(path: Path, clips: Sequence[VideoClip], cut: Cuts) -> None:
    """Writes the pictures of clips, in the order of their starts, from the source's packets."""
    for clip, packets in zip(clips, _packets(path, clips), strict=True):
        frames = cut.frame_of[clip.start : clip.start + clip.frames] - clip.start
        delay = int((np.arange(clip.frames) - frames).max())  # what decoding is ahead of showing
        with av.open(str(clip.video), "w", format="mp4", options=BITEXACT | {"movflags": "faststart"}) as file:
            stream = file.add_stream_from_template(packets[0].stream)
            for number, (packet, frame) in enumerate(zip(packets, frames, strict=True)):
                packet.stream = stream
                packet.time_base, packet.duration = Fraction(1, FRAME_RATE), 1
                packet.pts, packet.dts = int(frame), number - delay
                file.mux(packet)


def _units(packet: bytes, size: int) -> set[int]:
    """The kinds of NAL units in a packet, whose lengths are told by so many bytes."""
    kinds, at = set(), 0
    while at + size < len(packet):
        kinds.add(packet[at + size] & 31)
        at += size + int.from_bytes(packet[at : at + size], "big")
    return kinds


def _packets(path: Path, clips: Sequence[VideoClip]) -> Iterator[list[av.Packet]]:
    """The packets of each clip, in one pass through the file; errors of who writes them don't come in here."""
    left = list(clips)
    with opened(path) as container:
        taken: list[av.Packet] = []
        demuxed = (packet for packet in container.demux(picture_stream(container)) if packet.pts is not None)
        for number, packet in enumerate(demuxed):
            if not left:
                return
            if number >= left[0].start:
                taken.append(packet)
            if number + 1 == left[0].start + left[0].frames:
                yield taken
                left, taken = left[1:], []
    if left:
        raise FileAccessError(
            f"{path} has fewer frames than when it was probed; let nothing write to it, and start again"
        )
