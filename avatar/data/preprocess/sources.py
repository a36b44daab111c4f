"""Sources to preprocess: video files, annotated spans in each, and their sidecars.

A source is one file. Without annotations it has one span, the complete file. This module opens no video.
"""

import glob
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from avatar.data.preprocess.reasons import Rejected
from avatar.errors import MissingFileError, UserError

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".flv", ".wmv", ".3gp"}
LISTS = {".txt", ".lst"}


@dataclass(frozen=True)
class Span:
    """An annotated part of a source. The stamp of the source contains all fields.

    Args:
        start_s, end_s: seconds from the first frame; None: to the end.
        person, caption: None: unknown.
        crop: left, top, width and height, in heights of the upright frame; None: the complete frame.
        scores: scores of the annotation.
    """

    start_s: float = 0.0
    end_s: float | None = None
    person: str | None = None
    caption: str | None = None
    crop: tuple[float, float, float, float] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A video file. The data set stores its name (the path within the source folder), but not its location on disk."""

    name: str
    path: Path
    spans: tuple[Span, ...] = (Span(),)

    @property
    def key(self) -> str:
        """A unique identifier of `[a-z0-9-]`, the prefix of its sample keys."""
        plain = unicodedata.normalize("NFKD", Path(self.name).stem).encode("ascii", "ignore").decode().lower()
        slug = re.sub("[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-")
        return f"{slug or 'source'}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    def stamp(self) -> dict[str, Any]:
        """Sizes and times of the file and its sidecars, and a hash of its spans: detects changes without reading."""
        files = [self.path, *(self.path.with_suffix(suffix) for suffix in (".txt", ".json"))]
        states = [(file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None for file in files]
        spans = json.dumps([asdict(span) for span in self.spans], sort_keys=True)
        return {"files": [list(s) if s else None for s in states], "spans": hashlib.sha256(spans.encode()).hexdigest()}


def find(source: str | Sequence[str]) -> list[Source]:
    """Find the videos of a folder (recursively), a glob pattern, a file, a text file of paths, or a list of these.

    Raises:
        MissingFileError: the path does not exist.
        UserError: it contains no video, or two videos with the same name.
    """
    if isinstance(source, str):
        files = _find_files(source)
    else:
        files = [pair for item in source for pair in _find_files(item)]
    if not files:
        raise UserError(f"no video in source={source}; expected files that end in {', '.join(sorted(SUFFIXES))}")
    return _named_sources(files)


def _named_sources(files: Iterable[tuple[Path, Path]]) -> list[Source]:
    """Sources of pairs of a folder and a file in it, sorted by name; the name is the path within the folder."""
    sources: dict[str, Source] = {}
    for folder, file in files:
        name = unicodedata.normalize("NFC", file.relative_to(folder).as_posix())
        if name in sources and sources[name].path != file:
            raise UserError(
                f"{file} and {sources[name].path} have the same name in the data set; expected unique names: give a "
                "folder that contains both"
            )
        sources[name] = Source(name, file)
    return [sources[name] for name in sorted(sources)]


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read NAME.json (`{"caption": …, "person_id": …, "scores": {…}}`) or the caption NAME.txt of a video.

    Raises:
        Rejected: "bad_caption" for an invalid sidecar, "unreadable" for one that can't be read.
    """
    fields: dict[str, Any] = {"caption": None, "person_id": None, "scores": {}}
    sidecar = path.with_suffix(".json")
    try:
        if sidecar.is_file():
            content = json.loads(sidecar.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise Rejected("bad_caption", f"{sidecar.name} contains no JSON object")
            fields |= {name: content[name] for name in fields if content.get(name) is not None}
        elif path.with_suffix(".txt").is_file():
            sidecar = path.with_suffix(".txt")
            fields["caption"] = sidecar.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Rejected("bad_caption", f"{sidecar.name} is not UTF-8 or not JSON ({error})") from None
    except OSError as error:
        raise Rejected("unreadable", f"{sidecar.name}: {error.strerror}") from None
    scores = fields["scores"]
    if not (fields["caption"] is None or isinstance(fields["caption"], str)) or not isinstance(scores, dict):
        raise Rejected(
            "bad_caption", f"{sidecar.name} has a caption that is not a string, or scores that are not an object"
        )
    if invalid := [name for name, value in scores.items() if isinstance(value, bool) or not _is_number_or_none(value)]:
        raise Rejected("bad_caption", f"{sidecar.name} has scores that are not numbers: {', '.join(invalid)}")
    if fields["person_id"] is not None:
        fields["person_id"] = str(fields["person_id"])
    return fields


def _is_number_or_none(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _find_files(source: str) -> list[tuple[Path, Path]]:
    """Pairs of the folder that names are relative to, and a file. Absolute, since FFmpeg may parse others as URLs."""
    path = Path(source).absolute()
    if path.is_dir():
        return [(path, file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    if path.is_file():
        return _read_list(path) if path.suffix.lower() in LISTS else [(path.parent, path)]
    if glob.has_magic(source):
        magic = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
        plain = Path(*path.parts[:magic])
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        return [(plain, file) for file in matches if file.suffix.lower() in SUFFIXES and file.is_file()]
    raise MissingFileError(
        f"no source {source}; expected a folder, a pattern in quotes or a list of files: check the path (relative to "
        f"{Path.cwd()})"
    )


def _read_list(path: Path) -> list[tuple[Path, Path]]:
    """Read paths from a text file, one per line, relative to its folder; lines that start with # are comments."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    files = [(path.parent / line).absolute() for line in lines if line and not line.startswith("#")]
    if missing := [file for file in files if not file.exists()]:
        raise MissingFileError(
            f"{path} names {len(missing)} files that do not exist, the first is {missing[0]}: correct the list"
        )
    inside = all(file.is_relative_to(path.parent) for file in files)
    return [(path.parent if inside else Path(file.anchor), file) for file in files]
