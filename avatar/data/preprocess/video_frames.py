"""Video frames on the 25 Hz grid: upright, square pixels, 8 bits 4:2:0, in a size that fits the autoencoder.

Frame i of the grid is the source frame shown at the middle of [i/25, (i+1)/25) s after the first one. So a file of
25 Hz keeps every frame, however much its time stamps jitter, and any other file is resampled by its time stamps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import av.filter
from av.video.frame import PictureType

from avatar.data.preprocess.probe import Probe, open_source, video_stream
from avatar.data.preprocess.reasons import Rejected, repair
from avatar.types import FRAME_RATE

FORMAT = "yuv420p"
ROTATION_FILTERS = {  # by counter-clockwise quarter turns
    0: [],
    1: [("transpose", "cclock")],
    2: [("hflip", ""), ("vflip", "")],
    3: [("transpose", "clock")],
}
MAX_CROP_OVERHANG = 0.01  # of the frame height, that an annotated window may exceed the frame
TIME_TOLERANCE_S = 1e-6  # of time stamps at the middle of an interval


@dataclass(frozen=True)
class FrameConversion:
    """FFmpeg filters that convert the frames of a segment to their final size and format, and the resulting repairs."""

    width: int  # of the output
    height: int
    filters: tuple[tuple[str, str], ...]  # name, arguments
    repairs: tuple[dict[str, str], ...]


def conversion_for(
    info: Probe, crop: tuple[float, float, float, float] | None, side: int | None, multiple: int
) -> FrameConversion:
    """The conversion of a source's frames. It never enlarges them.

    Args:
        crop: left, top, width and height, in heights of the upright frame; None: the complete frame.
        side: upper limit of the shorter side in pixels; None: no limit.
        multiple: divisor of both sides in pixels.

    Raises:
        Rejected: "crop" if the window exceeds the frame, "too_small" if a side is shorter than `multiple`.
    """
    filters: list[tuple[str, str]] = []
    repairs: list[dict[str, str]] = []
    width, height = info.width, info.height
    if abs(info.pixel_aspect - 1) > 1e-3:
        repairs.append(repair("aspect", f"pixels of {info.pixel_aspect:.3f}"))
        width = 2 * round(width * info.pixel_aspect / 2)
        filters += [("scale", f"{width}:{height}"), ("setsar", "1")]
    if info.rotation:
        repairs.append(repair("rotated", f"{90 * info.rotation} degrees counter-clockwise"))
        filters += ROTATION_FILTERS[info.rotation]
        if info.rotation % 2:
            width, height = height, width
    if crop is not None:
        left, top, wide, tall = (round(share * height) for share in crop)
        window = f"{wide} x {tall} at {left}, {top} of {width} x {height}"
        overhang = max(-left, -top, left + wide - width, top + tall - height)
        if overhang > MAX_CROP_OVERHANG * height:
            raise Rejected("crop", window)
        left, top = max(left, 0), max(top, 0)
        wide, tall = min(wide, width - left), min(tall, height - top)
        repairs.append(repair("cropped", window))
        filters.append(("crop", f"{wide}:{tall}:{left}:{top}:exact=0"))
        width, height = wide, tall
    if side is not None and min(width, height) > side:
        scale = side / min(width, height)
        repairs.append(repair("resized", f"from {width} x {height}"))
        width, height = round(width * scale), round(height * scale)
        filters.append(("scale", f"{width}:{height}:flags=area+accurate_rnd"))
    if width < multiple or height < multiple:
        raise Rejected(
            "too_small", f"{width} x {height}; expected at least {multiple}, the autoencoder's spatial stride"
        )
    if not info.limited_range or info.pixel_format != FORMAT:
        repairs.append(repair("pixel_format", f"{info.pixel_format}{'' if info.limited_range else ', full range'}"))
        filters += [("scale", "out_range=tv"), ("format", FORMAT)]
    wide, tall = width - width % multiple, height - height % multiple
    if (wide, tall) != (width, height):
        repairs.append(repair("odd_size", f"from {width} x {height}"))
        filters.append(("crop", f"{wide}:{tall}"))
    return FrameConversion(wide, tall, tuple(filters), tuple(repairs))


def timing_repairs(info: Probe) -> list[dict[str, str]]:
    """Repairs that follow from sampling on the grid: deinterlacing and resampling of the frame rate."""
    repairs = [repair("interlaced", info.codec)] if info.interlaced else []
    if info.has_variable_rate:
        repairs.append(repair("vfr", f"steps differ by {1000 * info.step_spread_s:.1f} ms"))
    elif abs(info.frame_rate / FRAME_RATE - 1) > 1e-3:
        repairs.append(repair("frame_rate", f"{info.frame_rate:.3f} Hz"))
    return repairs


def read_frames(path: Path, info: Probe, count: int) -> Iterator[av.VideoFrame]:
    """Decode the first `count` frames of the grid; a source frame that covers several of them is yielded repeatedly.

    Raises:
        Rejected: corrupt, frame_count, resolution; possibly after some frames, since decoding is lazy.
    """
    shown, number = None, 0
    for frame in _decode_deinterlaced(path, info) if info.interlaced else _decode(path, info):
        assert frame.time is not None
        while shown is not None and number < count and _interval_middle(info, number) < frame.time - TIME_TOLERANCE_S:
            yield shown
            number += 1
        shown = frame
    for _ in range(number, count):
        assert shown is not None
        yield shown


class FrameConverter:
    """Applies a conversion to frames one by one, without changing its input frames."""

    def __init__(self, conversion: FrameConversion):
        self._filters, self._graph = conversion.filters, None
        self._previous: tuple[av.VideoFrame, av.VideoFrame] | None = None  # input and output

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        if not self._filters:
            return frame
        if self._previous is None or self._previous[0] is not frame:  # a repeated frame is converted once
            if self._graph is None:
                self._graph = _build_graph(frame, self._filters)
            self._graph.vpush(frame)
            self._previous = frame, self._graph.vpull()
        return self._previous[1]


def set_frame_number(frame: av.VideoFrame, number: int) -> av.VideoFrame:
    """Set the time stamp of a frame by its number in place, and let the encoder choose the picture type."""
    frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, FRAME_RATE), PictureType.NONE
    return frame


def _interval_middle(info: Probe, number: int) -> float:
    return info.start_s + (number + 0.5) / FRAME_RATE


def _decode(path: Path, info: Probe) -> Iterator[av.VideoFrame]:
    with open_source(path) as container:
        stream = video_stream(container)
        count = 0
        for frame in container.decode(stream):
            if frame.is_corrupt or frame.time is None:  # the decoder conceals damage if it can
                raise Rejected("corrupt", f"frame {count} is damaged or has no time")
            if (frame.width, frame.height) != (info.width, info.height):
                before = f"{info.width} x {info.height}"
                raise Rejected("resolution", f"{frame.width} x {frame.height} at frame {count}, before it {before}")
            count += 1
            yield frame
        if info.claimed and count + info.discarded != info.claimed:
            raise Rejected("frame_count", f"claims {info.claimed} frames, {count + info.discarded} can be decoded")


def _decode_deinterlaced(path: Path, info: Probe) -> Iterator[av.VideoFrame]:
    graph = None
    for frame in _decode(path, info):
        graph = graph or _build_graph(frame, (("bwdif", "mode=send_frame:deint=all"),))
        graph.vpush(frame)
        yield from _pull_all(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pull_all(graph)


def _pull_all(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _build_graph(like: av.VideoFrame, filters: tuple[tuple[str, str], ...]) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=like.width, height=like.height, format=like.format, time_base=like.time_base)
    graph.link_nodes(source, *(graph.add(name, given) for name, given in filters), graph.add("buffersink"))
    graph.configure()
    return graph
