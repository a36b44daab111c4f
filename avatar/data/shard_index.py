"""What is in prepared sets, by their `index.json`: the samples of a split that pass the filters, and their places.

Nothing is decided here by whether a shard can be read: the order of a run depends on its samples, so it shall be the
same whatever has happened to the files.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar.data.preprocess.samples import SCHEMA
from avatar.errors import MissingFileError, UserError
from avatar.types import REGIONS

KEY = re.compile("[a-z0-9_-]+")  # what WebDataset splits from the rest of a name at the first dot
UNMEASURED = ("keep", "drop")
NEEDED = {"key", "frames", "height", "width", "scores"}


@dataclass(frozen=True)
class Shard:
    """A tar and its size as it was written."""

    url: str  # of its set
    path: Path
    bytes: int
    text_features: str | None = None  # the text encoder that its samples have features of, if any


@dataclass(frozen=True)
class Entry:
    """A sample and its place."""

    key: str
    shard: Shard
    frames: int
    height: int
    width: int
    regions: tuple[str, ...] = ()  # those of REGIONS that are known of some of its frames
    caption: str | None = None  # "" for none; None in sets prepared before the index told it


class Filters:
    """Which samples are taken by their scores.

    Args:
        bounds: the least and the most of each score named, None for no bound; None: all samples.
        unmeasured: "keep" or "drop" samples whose score is null.

    Raises:
        UserError: bounds that aren't two numbers in their order.
    """

    def __init__(self, bounds: Mapping[str, Sequence[float | None]] | None, unmeasured: str):
        if unmeasured not in UNMEASURED:
            raise UserError(f"unmeasured={unmeasured!r}; wanted {' or '.join(UNMEASURED)}")
        self.bounds, self.unmeasured = {}, unmeasured
        for name, pair in (bounds or {}).items():
            self.bounds[name] = tuple(pair) if isinstance(pair, Sequence) else ()
            numbers = [bound for bound in self.bounds[name] if bound is not None]
            whole = len(self.bounds[name]) == 2 and all(isinstance(n, int | float) for n in numbers)
            if not whole or numbers != sorted(numbers):
                raise UserError(f"filter {name}: {pair}; wanted [least, most], each a number or null")

    def passed(self, scores: Mapping[str, float | None]) -> bool:
        for name, (least, most) in self.bounds.items():
            score = scores.get(name)
            if score is None:
                if self.unmeasured == "drop":
                    return False
            elif (least is not None and score < least) or (most is not None and score > most):
                return False
        return True


class Index:
    """The sets of a run.

    Args:
        urls: folders that `python -m avatar preprocess` has finished; a single one may stand alone.

    Raises:
        OSError, ValueError: a folder that isn't there, or holds no finished set of this kind.
    """

    def __init__(self, urls: str | Sequence[str]):
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise UserError(f"urls={self.urls}; wanted folders of prepared sets, at least one, and each once")
        self.sets = {url: _read(url) for url in self.urls}

    def entries(self, split: str, filters: Filters) -> list[Entry]:
        """The samples of a split that pass, in the order of sets, shards and samples.

        Raises:
            UserError: no such split, no score of a filter's name, or nothing that passes.
        """
        found: list[Entry] = []
        seen, scores = 0, set()
        for url, content in self.sets.items():
            regions = _regions(content)
            text_features = _section(content, "encoders").get("text_features")
            for part in content["shards"]:
                if part["split"] == split:
                    shard = Shard(url, Path(url, part["file"]), part["bytes"], text_features)
                    passed = [entry for entry in part["samples"] if filters.passed(entry["scores"])]
                    found += [
                        Entry(
                            e["key"],
                            shard,
                            e["frames"],
                            e["height"],
                            e["width"],
                            tuple(e.get("regions", regions)),
                            e.get("caption"),
                        )
                        for e in passed
                    ]
                    seen += len(part["samples"])
                    scores |= {name for entry in part["samples"] for name in entry["scores"]}
        names = ", ".join(self.urls)
        if not seen:
            splits = sorted({part["split"] for content in self.sets.values() for part in content["shards"]})
            raise UserError(
                f"no split {split!r} in {names}, only {', '.join(splits) or 'nothing at all'}; ask for another one, or "
                "prepare more people, so that each split gets some"
            )
        if strange := filters.bounds.keys() - scores:
            raise UserError(
                f"no score {', '.join(sorted(strange))} in {names}; filter by any of {', '.join(sorted(scores))}"
            )
        if not found:
            raise UserError(
                f"none of the {seen} samples of split {split!r} in {names} passes the filters {filters.bounds} "
                f"with unmeasured={filters.unmeasured}; widen them"
            )
        return found


def _regions(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Of samples that say nothing of it, in sets prepared before they did: all, if the set had a face detector."""
    return REGIONS if _section(content, "detectors").get("face") is not None else ()


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the config that a set was prepared with."""
    return content.get("config", {}).get(name, {})


def _read(url: str) -> dict[str, Any]:
    """`index.json` of a set, looked through."""
    folder = Path(url)
    if not folder.is_dir():
        raise MissingFileError(
            f"no folder {url}; wanted a set that python -m avatar preprocess has made: check urls, which are "
            f"taken from {Path.cwd()}"
        )
    path = folder / "index.json"
    if not path.is_file():
        raise MissingFileError(
            f"{url} has no index.json, which a finished set has; run python -m avatar preprocess out={url} to its end"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_types(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no index of schema {SCHEMA} ({error}); prepare the set again") from error
    keys = [entry["key"] for part in content["shards"] for entry in part["samples"]]
    if wrong := [key for key in keys if not KEY.fullmatch(key)]:
        raise UserError(
            f"{path} has a sample of key {wrong[0]!r}; wanted letters a-z, digits, - and _: at a dot its parts would "
            "be told apart wrongly"
        )
    if len(set(keys)) < len(keys):
        raise UserError(f"{path} has the same key twice; prepare the set again")
    return content


def _check_types(content: Any) -> None:
    """Raise for an index of other types than a prepared set's: it is untrusted data, and only ever compared."""
    _expect(isinstance(content, dict) and content["schema"] == SCHEMA, f"schema {content['schema']!r:.20}")
    config = content.get("config", {})
    _expect(isinstance(config, dict), "a config that is no mapping")
    encoders, detectors = config.get("encoders", {}), config.get("detectors", {})
    _expect(isinstance(encoders, dict) and isinstance(detectors, dict), "encoders or detectors that are no mapping")
    features = encoders.get("text_features")
    _expect(features is None or isinstance(features, str), "a text encoder's fingerprint that is no string")
    _expect(isinstance(content["shards"], list), "shards that are no list")
    for part in content["shards"]:
        file = part["file"]
        inside = isinstance(file, str) and file.isprintable() and not Path(file).is_absolute()
        _expect(inside and ".." not in Path(file).parts, "a shard's file outside of the set")
        _expect(isinstance(part["split"], str) and _is_count(part["bytes"]), "a shard without split or bytes")
        _expect(isinstance(part["samples"], list), "samples that are no list")
        for entry in part["samples"]:
            _expect(isinstance(entry, dict) and entry.keys() >= NEEDED, "a sample without its size")
            sizes = all(_is_count(entry[name]) for name in ("frames", "height", "width"))
            _expect(sizes and isinstance(entry["key"], str), "a sample whose key or size is of another type")
            scores, regions, caption = entry["scores"], entry.get("regions", []), entry.get("caption")
            numbers = isinstance(scores, dict) and all(score is None or _is_number(score) for score in scores.values())
            _expect(numbers, "scores that are no numbers")
            _expect(isinstance(regions, list) and all(name in REGIONS for name in regions), "unknown regions")
            _expect(caption is None or isinstance(caption, str), "a caption that is no string")


def _expect(right: bool, otherwise: str) -> None:
    if not right:
        raise ValueError(otherwise)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
