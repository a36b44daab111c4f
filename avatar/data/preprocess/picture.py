"""Pictures on the clock's grid: upright, square pixels, 8 bits 4:2:0, of a size that an autoencoder takes.

Frame i of the grid is the picture that is shown at the middle of [i/25, (i+1)/25) s after the first one. So a file of
25 Hz goes through frame by frame, however its time stamps tremble, and any other is resampled by its time stamps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import av.filter
from av.video.frame import PictureType

from avatar.data.preprocess.probe import Probe, opened, picture_stream, varies
from avatar.data.preprocess.reasons import Rejected, repair
from avatar.types import FRAME_RATE

FORMAT = "yuv420p"
TURNS = {  # quarter turns counter-clockwise
    0: [],
    1: [("transpose", "cclock")],
    2: [("hflip", ""), ("vflip", "")],
    3: [("transpose", "clock")],
}
MOST_BEYOND = 0.01  # of the height, that an annotated window may reach beyond the picture
TREMBLE_S = 1e-6  # of time stamps that fall on the middle of an interval


@dataclass(frozen=True)
class Form:
    """How a span's pictures are brought to their final size: the filters, in order, and what they mend."""

    width: int
    height: int
    filters: tuple[tuple[str, str], ...]  # name, arguments
    repairs: tuple[dict[str, str], ...]


def form_of(found: Probe, crop: tuple[float, float, float, float] | None, side: int | None, multiple: int) -> Form:
    """The form of pictures whose shorter side is at most `side` pixels (None: any) and whose sides are multiples.

    `crop` is left, top, width and height in heights of the upright picture. Nothing is enlarged.

    Raises:
        Rejected: "crop" where the window isn't in the picture, "too_small" where no multiple fits in.
    """
    filters: list[tuple[str, str]] = []
    repairs: list[dict[str, str]] = []
    width, height = found.width, found.height
    if abs(found.pixel_aspect - 1) > 1e-3:
        repairs.append(repair("aspect", f"pixels of {found.pixel_aspect:.3f}"))
        width = 2 * round(width * found.pixel_aspect / 2)
        filters += [("scale", f"{width}:{height}"), ("setsar", "1")]
    if found.rotation:
        repairs.append(repair("rotated", f"{90 * found.rotation} degrees counter-clockwise"))
        filters += TURNS[found.rotation]
        if found.rotation % 2:
            width, height = height, width
    if crop is not None:
        left, top, wide, tall = (round(share * height) for share in crop)
        window = f"{wide} x {tall} at {left}, {top} of {width} x {height}"
        beyond = max(-left, -top, left + wide - width, top + tall - height)
        if beyond > MOST_BEYOND * height:
            raise Rejected("crop", window)
        left, top = max(left, 0), max(top, 0)
        wide, tall = min(wide, width - left), min(tall, height - top)
        repairs.append(repair("cropped", window))
        filters.append(("crop", f"{wide}:{tall}:{left}:{top}:exact=0"))
        width, height = wide, tall
    if side is not None and min(width, height) > side:
        shrink = side / min(width, height)
        repairs.append(repair("resized", f"from {width} x {height}"))
        width, height = round(width * shrink), round(height * shrink)
        filters.append(("scale", f"{width}:{height}:flags=area+accurate_rnd"))
    if width < multiple or height < multiple:
        raise Rejected("too_small", f"{width} x {height}, and the autoencoder wants multiples of {multiple}")
    if not found.limited_range or found.pixel_format != FORMAT:
        repairs.append(repair("pixel_format", f"{found.pixel_format}{'' if found.limited_range else ', full range'}"))
        filters += [("scale", "out_range=tv"), ("format", FORMAT)]
    wide, tall = width - width % multiple, height - height % multiple
    if (wide, tall) != (width, height):
        repairs.append(repair("odd_size", f"from {width} x {height}"))
        filters.append(("crop", f"{wide}:{tall}"))
    return Form(wide, tall, tuple(filters), tuple(repairs))


def timing_repairs(found: Probe) -> list[dict[str, str]]:
    """What the grid mends."""
    made = [repair("interlaced", found.codec)] if found.interlaced else []
    if varies(found):
        made.append(repair("vfr", f"steps differ by {1000 * found.step_spread_s:.1f} ms"))
    elif abs(found.frame_rate / FRAME_RATE - 1) > 1e-3:
        made.append(repair("frame_rate", f"{found.frame_rate:.3f} Hz"))
    return made


def pictures(path: Path, found: Probe, count: int) -> Iterator[av.VideoFrame]:
    """The first `count` frames of the grid, as decoded; a picture that is shown for longer comes again.

    Raises:
        Rejected: corrupt, frame_count, resolution; also in mid-way, for the file is decoded as frames are asked for.
    """
    shown, number = None, 0
    for frame in _deinterlaced(path, found) if found.interlaced else _decoded(path, found):
        assert frame.time is not None
        while shown is not None and number < count and _middle(found, number) < frame.time - TREMBLE_S:
            yield shown
            number += 1
        shown = frame
    for _ in range(number, count):
        assert shown is not None
        yield shown


class FrameTransform:
    """Brings pictures to a form, one by one, without changing the ones it is given."""

    def __init__(self, form: Form):
        self._form, self._graph = form, None
        self._before: tuple[av.VideoFrame, av.VideoFrame] | None = None

    def __call__(self, picture: av.VideoFrame) -> av.VideoFrame:
        if not self._form.filters:
            return picture
        if self._before is None or self._before[0] is not picture:  # shown again: formed already
            if self._graph is None:
                self._graph = _graph(picture, self._form.filters)
            self._graph.vpush(picture)
            self._before = picture, self._graph.vpull()
        return self._before[1]


def numbered(picture: av.VideoFrame, number: int) -> av.VideoFrame:
    """The picture as an encoder is to see it: by its number, free to choose how it is coded."""
    picture.pts, picture.time_base, picture.pict_type = number, Fraction(1, FRAME_RATE), PictureType.NONE
    return picture


def _middle(found: Probe, number: int) -> float:
    return found.start_s + (number + 0.5) / FRAME_RATE


def _decoded(path: Path, found: Probe) -> Iterator[av.VideoFrame]:
    with opened(path) as container:
        stream = picture_stream(container)
        count = 0
        for frame in container.decode(stream):
            if frame.is_corrupt or frame.time is None:  # the decoder has painted over damage, as it can
                raise Rejected("corrupt", f"frame {count} is damaged or has no time")
            if (frame.width, frame.height) != (found.width, found.height):
                before = f"{found.width} x {found.height}"
                raise Rejected("resolution", f"{frame.width} x {frame.height} at frame {count}, before it {before}")
            count += 1
            yield frame
        if found.claimed and count + found.discarded != found.claimed:
            raise Rejected("frame_count", f"claims {found.claimed} frames, {count + found.discarded} can be decoded")


def _deinterlaced(path: Path, found: Probe) -> Iterator[av.VideoFrame]:
    graph = None
    for frame in _decoded(path, found):
        graph = graph or _graph(frame, (("bwdif", "mode=send_frame:deint=all"),))
        graph.vpush(frame)
        yield from _ready(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _ready(graph)


def _ready(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _graph(like: av.VideoFrame, filters: tuple[tuple[str, str], ...]) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=like.width, height=like.height, format=like.format, time_base=like.time_base)
    graph.link_nodes(source, *(graph.add(name, given) for name, given in filters), graph.add("buffersink"))
    graph.configure()
    return graph
