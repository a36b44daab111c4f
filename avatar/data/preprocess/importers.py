"""Importers of annotated data sets: TalkVid's JSON list and HDTF's text files, with local videos.

Both annotate clips of longer videos. A video may be complete, and its clips become spans of it; or it was cut before,
and each clip is a file. An importer returns the sources, and notes: sentences for the user, such as about videos that
do not exist.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from avatar.data.preprocess.sources import SUFFIXES, Source, Span
from avatar.errors import UserError

TALKVID_SCORES = {"dover_scores": "dover", "cotracker_ratio": "cotracker"}
RADIO = "RD"  # HDTF's subset whose videos are named "Radio" and a number, independently of the speaker


def talkvid(annotations: Path, videos: Path) -> tuple[list[Source], list[str]]:
    """Sources and notes of TalkVid's list (`id`, `start-time`, `end-time`, `info`, scores).

    The video of a clip is `ID.mp4`, already cut, or `VIDEO.mp4`, complete, by the id of the YouTube video.

    Raises:
        UserError: the file is not such a list, or `videos` does not exist.
    """
    try:
        entries = json.loads(annotations.read_text(encoding="utf-8"))
        clips = [(entry["id"], _talkvid_span(entry), entry["info"]["Video Link"]) for entry in entries]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{annotations} is not a list in TalkVid's layout ({type(error).__name__}: {error}); expected objects with "
            "id, start-time, end-time and info: give a file such as filtered_video_clips.json"
        ) from error
    files, complete, cut, missing = _files_by_stem(videos), defaultdict(list), [], []
    for clip, span, link in clips:
        if clip in files:
            cut.append(_source(videos, files[clip], [_without_times(span)]))
        elif (video := _youtube_id(link)) in files:
            complete[video].append(span)
        else:
            missing.append(clip)
    return _sorted(cut + [_source(videos, files[video], spans) for video, spans in complete.items()]), _notes(
        {f"are not in {videos}": missing}
    )


def hdtf(annotations: Path, videos: Path) -> tuple[list[Source], list[str]]:
    """Sources and notes of HDTF's `XX_annotion_time.txt`, `XX_crop_wh.txt` and `XX_resolution.txt` (XX: RD, WDA, WRA).

    A video is `NAME.mp4`, complete, or `NAME_0.mp4`, `NAME_1.mp4` …, already cut. A line of `XX_crop_wh.txt` is left,
    width, top and height, in pixels of a frame with the height given in `XX_resolution.txt`; without both, a clip isn't
    cropped. A number at the end of a name counts the videos of a person, except for "Radio", which is the place.

    Raises:
        UserError: there are no such files, they have an invalid line, or `videos` does not exist.
    """
    times = sorted(annotations.glob("*_annotion_time.txt"))
    if not times:
        raise UserError(
            f"no XX_annotion_time.txt in {annotations}; expected the folder HDTF_dataset of HDTF's repository: check "
            "the path"
        )
    files, sources, missing, uncropped = _files_by_stem(videos), [], [], []
    for file in times:
        subset = file.name.removesuffix("_annotion_time.txt")
        crops, heights = _table(annotations / f"{subset}_crop_wh.txt"), _table(annotations / f"{subset}_resolution.txt")
        for name, clips in _table(file).items():
            person = f"{subset}-{name if subset == RADIO else re.sub('[0-9]+$', '', name)}"
            height = _number(heights[name][0], file) if name in heights else None
            spans = []
            for number, clip in enumerate(clips):
                start, _, end = clip.partition("-")
                window = [_number(text, file) for text in crops.get(f"{name}_{number}", ())]
                spans.append(Span(_seconds(start, file), _seconds(end, file), person, None, _crop(window, height)))
            cut = {number: f"{name}_{number}" for number in range(len(clips)) if f"{name}_{number}" in files}
            if name in files:
                sources.append(_source(videos, files[name], spans))
            elif cut:
                sources += [
                    _source(videos, files[stem], [_without_times(spans[number])]) for number, stem in cut.items()
                ]
            else:
                missing.append(name)
                continue
            uncropped += [f"{name}_{number}" for number, span in enumerate(spans) if span.crop is None]
    no_window = f"are not cropped, since XX_crop_wh.txt or XX_resolution.txt in {annotations} has no entry for them"
    return _sorted(sources), _notes({f"are not in {videos}": missing, no_window: uncropped})


def _notes(names: dict[str, list[str]]) -> list[str]:
    """One sentence per non-empty list, from the statement that is its key."""
    return [
        f"{len(some)} annotated clips or videos {statement}, such as {', '.join(some[:3])}"
        for statement, some in names.items()
        if some
    ]


def _talkvid_span(entry: dict) -> Span:
    given = {name: entry[key] for key, name in TALKVID_SCORES.items() if entry.get(key) is not None}
    head = (entry.get("head_detail") or {}).get("scores") or {}
    scores = {name: float(value) for name, value in {**given, **{f"head_{k}": v for k, v in head.items()}}.items()}
    return Span(
        float(entry["start-time"]),
        float(entry["end-time"]),
        f"talkvid-{entry['info']['Person ID']}" if entry["info"].get("Person ID") else None,
        entry.get("description") or None,
        None,
        scores,
    )


def _youtube_id(link: str) -> str:
    address = urlparse(link)
    return (parse_qs(address.query).get("v") or [address.path.rsplit("/", 1)[-1]])[0]


def _crop(window: list[float], height: float | None) -> tuple[float, float, float, float] | None:
    if len(window) != 4 or not height:
        return None
    left, width, top, tall = (value / height for value in window)
    return left, top, width, tall


def _table(path: Path) -> dict[str, list[str]]:
    """Read lines of a name, with or without .mp4, and words; empty if there is no file."""
    if not path.is_file():
        return {}
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row[0].removesuffix(".mp4"): row[1:] for row in rows}


def _seconds(text: str, file: Path) -> float:
    """Seconds of "01:35" or "1:02:03"."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + _number(part, file)
    return seconds


def _number(text: str, file: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"got {text!r} in {file} or in the files of the same subset; expected a number or mm:ss-mm:ss: correct the "
            "line"
        ) from None


def _files_by_stem(videos: Path) -> dict[str, Path]:
    if not videos.is_dir():
        raise UserError(f"no folder videos={videos}; give the folder of the annotated videos")
    return {file.stem: file.absolute() for file in sorted(videos.rglob("*")) if file.suffix.lower() in SUFFIXES}


def _without_times(span: Span) -> Span:
    """The span of a file that was cut to it."""
    return Span(0.0, None, span.person, span.caption, span.crop, span.scores)


def _source(videos: Path, file: Path, spans: list[Span]) -> Source:
    return Source(file.relative_to(videos.absolute()).as_posix(), file, tuple(sorted(spans, key=lambda s: s.start_s)))


def _sorted(sources: list[Source]) -> list[Source]:
    return sorted(sources, key=lambda source: source.name)
