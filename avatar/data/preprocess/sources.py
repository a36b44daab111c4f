"""What is to be prepared: video files, the spans of interest in each, and what their sidecars say.

A source is one file. Without annotations its one span is the whole file. Nothing here opens a video.
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
    """A part of a source, in seconds from its first frame, and what is known of it; None: not known, or to the end."""

    start_s: float = 0.0
    end_s: float | None = None
    person: str | None = None
    caption: str | None = None
    crop: tuple[float, float, float, float] | None = None  # left, top, width, height in heights of the upright picture
    scores: Mapping[str, float] = field(default_factory=dict)  # that come with the annotation


@dataclass(frozen=True)
class Source:
    """A video file by its name among the sources, which is what a data set tells of it, never its place on the disk."""

    name: str
    path: Path
    spans: tuple[Span, ...] = (Span(),)

    @property
    def key(self) -> str:
        """A name of `[a-z0-9-]`, unlike every other's, that sample keys start with."""
        plain = unicodedata.normalize("NFKD", Path(self.name).stem).encode("ascii", "ignore").decode().lower()
        slug = re.sub("[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-")
        return f"{slug or 'source'}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    def stamp(self) -> dict[str, Any]:
        """What tells this file, its sidecars and its spans from changed ones, without reading them."""
        files = [self.path, *(self.path.with_suffix(suffix) for suffix in (".txt", ".json"))]
        states = [(file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None for file in files]
        spans = json.dumps([asdict(span) for span in self.spans], sort_keys=True)
        return {"files": [list(s) if s else None for s in states], "spans": hashlib.sha256(spans.encode()).hexdigest()}


def find(source: str | Sequence[str]) -> list[Source]:
    """The videos of a folder (with all below it), a glob pattern, a file, a text file of paths, or a list of these.

    Raises:
        MissingFileError: nothing is there. ValueError: no video in it.
    """
    if isinstance(source, str):
        found = _found(source)
    else:
        found = [pair for part in source for pair in _found(part)]
    if not found:
        raise UserError(f"no video in source={source}; wanted files that end in {', '.join(sorted(SUFFIXES))}")
    return named(found)


def named(files: Iterable[tuple[Path, Path]]) -> list[Source]:
    """Sources of pairs of a folder and a file in it, sorted; a name is the path within the folder."""
    sources: dict[str, Source] = {}
    for folder, file in files:
        name = unicodedata.normalize("NFC", file.relative_to(folder).as_posix())
        if name in sources and sources[name].path != file:
            raise UserError(f"{file} and {sources[name].path} have the same name in the data set; give a common folder")
        sources[name] = Source(name, file)
    return [sources[name] for name in sorted(sources)]


def read_sidecar(path: Path) -> dict[str, Any]:
    """Caption and person of a video from NAME.json (`{"caption": …, "person_id": …, "scores": {…}}`) or NAME.txt.

    Raises:
        Rejected: "bad_caption" where a sidecar can't be understood.
    """
    known: dict[str, Any] = {"caption": None, "person_id": None, "scores": {}}
    sidecar = path.with_suffix(".json")
    try:
        if sidecar.is_file():
            content = json.loads(sidecar.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise Rejected("bad_caption", f"{sidecar.name} holds no JSON object")
            known |= {name: content[name] for name in known if content.get(name) is not None}
        elif path.with_suffix(".txt").is_file():
            sidecar = path.with_suffix(".txt")
            known["caption"] = sidecar.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Rejected("bad_caption", f"{sidecar.name} is no UTF-8 or no JSON ({error})") from None
    except OSError as error:
        raise Rejected("unreadable", f"{sidecar.name}: {error.strerror}") from None
    scores = known["scores"]
    if not (known["caption"] is None or isinstance(known["caption"], str)) or not isinstance(scores, dict):
        raise Rejected("bad_caption", f"{sidecar.name} has a caption that is no text, or scores that are no object")
    if wrong := [name for name, value in scores.items() if isinstance(value, bool) or not _number_or_none(value)]:
        raise Rejected("bad_caption", f"{sidecar.name} has scores that are no numbers: {', '.join(wrong)}")
    if known["person_id"] is not None:
        known["person_id"] = str(known["person_id"])
    return known


def _number_or_none(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _found(source: str) -> list[tuple[Path, Path]]:
    """Pairs of the folder that names are relative to and a file; absolute, since FFmpeg takes others for URLs."""
    path = Path(source).absolute()
    if path.is_dir():
        return [(path, file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    if path.is_file():
        return _listed(path) if path.suffix.lower() in LISTS else [(path.parent, path)]
    if glob.has_magic(source):
        magic = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
        plain = Path(*path.parts[:magic])
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        return [(plain, file) for file in matches if file.suffix.lower() in SUFFIXES and file.is_file()]
    raise MissingFileError(
        f"no source {source}; wanted a folder, a pattern in quotes or a list of files: check the path (it is taken "
        f"from {Path.cwd()})"
    )


def _listed(path: Path) -> list[tuple[Path, Path]]:
    """The files that a text file names, one a line, relative to its folder; lines that start with # say nothing."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    files = [(path.parent / line).absolute() for line in lines if line and not line.startswith("#")]
    if missing := [file for file in files if not file.exists()]:
        raise MissingFileError(
            f"{path} names {len(missing)} files that are not there, first {missing[0]}; mend the list"
        )
    inside = all(file.is_relative_to(path.parent) for file in files)
    return [(path.parent if inside else Path(file.anchor), file) for file in files]
