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
            text_features = content.get("config", {}).get("encoders", {}).get("text_features")
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
    detectors = content.get("config", {}).get("detectors", {})
    return REGIONS if detectors.get("face") is not None else ()


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
        assert content["schema"] == SCHEMA, f"schema {content['schema']}"
        keys = [entry["key"] for part in content["shards"] for entry in part["samples"] if entry.keys() >= NEEDED]
        assert len(keys) == sum(len(part["samples"]) for part in content["shards"]), "a sample without its size"
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path} is no index of schema {SCHEMA} ({error}); prepare the set again") from error
    if wrong := [key for key in keys if not KEY.fullmatch(key)]:
        raise UserError(
            f"{path} has a sample of key {wrong[0]!r}; wanted letters a-z, digits, - and _: at a dot its parts would "
            "be told apart wrongly"
        )
    if len(set(keys)) < len(keys):
        raise UserError(f"{path} has the same key twice; prepare the set again")
    return content
