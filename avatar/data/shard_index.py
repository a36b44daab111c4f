"""Index of preprocessed sets, from their `index.json`: the samples of a split that pass the filters.

Whether shards are readable has no influence here: the order of a run depends on the list of samples, so it stays the
same when files are damaged.
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

KEY = re.compile("[a-z0-9_-]+")  # WebDataset splits names at the first dot
UNMEASURED = ("keep", "drop")
REQUIRED = {"key", "frames", "height", "width", "scores"}


@dataclass(frozen=True)
class Shard:
    """A tar file with the size that it was written with."""

    url: str  # folder of its set
    path: Path
    bytes: int
    text_features: str | None = None  # fingerprint of the text encoder of its features, if any


@dataclass(frozen=True)
class Entry:
    """A sample and its shard."""

    key: str
    shard: Shard
    frames: int
    height: int
    width: int
    regions: tuple[str, ...] = ()  # those of REGIONS with boxes in some of its frames
    caption: str | None = None  # "": no caption; None: the index of older sets has no captions


class Filters:
    """Filters of samples by their scores.

    Args:
        bounds: score → (minimum, maximum), None for no bound; None: all samples pass.
        unmeasured: "keep" or "drop" samples whose score is null.

    Raises:
        UserError: bounds that are not two ordered numbers.
    """

    def __init__(self, bounds: Mapping[str, Sequence[float | None]] | None, unmeasured: str):
        if unmeasured not in UNMEASURED:
            raise UserError(f"got unmeasured={unmeasured!r}; expected {' or '.join(UNMEASURED)}")
        self.bounds, self.unmeasured = {}, unmeasured
        for name, pair in (bounds or {}).items():
            self.bounds[name] = tuple(pair) if isinstance(pair, Sequence) else ()
            numbers = [bound for bound in self.bounds[name] if bound is not None]
            valid = len(self.bounds[name]) == 2 and all(isinstance(n, int | float) for n in numbers)
            if not valid or numbers != sorted(numbers):
                raise UserError(f"got filters.bounds.{name}={pair}; expected [minimum, maximum], each a number or null")

    def passes(self, scores: Mapping[str, float | None]) -> bool:
        """Whether a sample with these scores is used."""
        for name, (low, high) in self.bounds.items():
            score = scores.get(name)
            if score is None:
                if self.unmeasured == "drop":
                    return False
            elif (low is not None and score < low) or (high is not None and score > high):
                return False
        return True


class Index:
    """Index of the sets of a run.

    Args:
        urls: one folder or several, written by `python -m avatar preprocess`.

    Raises:
        MissingFileError: a missing folder, or one without a finished set.
        UserError: an index of another schema, or damaged.
    """

    def __init__(self, urls: str | Sequence[str]):
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise UserError(f"got urls={self.urls}; expected one or more different folders of preprocessed sets")
        self.sets = {url: _read_index(url) for url in self.urls}

    def entries(self, split: str, filters: Filters) -> list[Entry]:
        """The samples of a split that pass the filters, in the order of sets, shards and samples.

        Raises:
            UserError: an unknown split, a filter of an unknown score, or no sample that passes.
        """
        found: list[Entry] = []
        count, scores = 0, set()
        for url, content in self.sets.items():
            regions = _regions(content)
            text_features = _section(content, "encoders").get("text_features")
            for part in content["shards"]:
                if part["split"] == split:
                    shard = Shard(url, Path(url, part["file"]), part["bytes"], text_features)
                    passed = [entry for entry in part["samples"] if filters.passes(entry["scores"])]
                    found += [
                        Entry(
                            e["key"],
                            shard,
                            e["frames"],
                            e["height"],
                            e["width"],
                            _with_eyes(e.get("regions", regions)),
                            e.get("caption"),
                        )
                        for e in passed
                    ]
                    count += len(part["samples"])
                    scores |= {name for entry in part["samples"] for name in entry["scores"]}
        names = ", ".join(self.urls)
        if not count:
            splits = sorted({part["split"] for content in self.sets.values() for part in content["shards"]})
            raise UserError(
                f"got split {split!r} of {names}; expected one of {', '.join(splits) or 'none: the index is empty'}; "
                "preprocess videos of more people, so that each split gets some"
            )
        if unknown := filters.bounds.keys() - scores:
            raise UserError(
                f"got filters of {', '.join(sorted(unknown))} for {names}; expected scores {', '.join(sorted(scores))}"
            )
        if not found:
            raise UserError(
                f"none of the {count} samples of split {split!r} in {names} passes the filters {filters.bounds} "
                f"with unmeasured={filters.unmeasured}; widen them"
            )
        return found


def _with_eyes(regions: Sequence[str]) -> tuple[str, ...]:
    """Regions of a sample; those of its eyes, which older sets do not list, are estimated from faces."""
    return tuple(name for name in REGIONS if name in regions or (name == "eyes" and "face" in regions))


def _regions(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The regions of samples in older sets, whose index has no regions: all, if the set had a face detector."""
    return REGIONS if _section(content, "detectors").get("face") is not None else ()


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the config that a set was preprocessed with."""
    return content.get("config", {}).get(name, {})


def _read_index(url: str) -> dict[str, Any]:
    """Read and check the `index.json` of a set."""
    folder = Path(url)
    if not folder.is_dir():
        raise MissingFileError(
            f"no folder {url}; expected a set that python -m avatar preprocess wrote: check data.urls, which are "
            f"relative to {Path.cwd()}"
        )
    path = folder / "index.json"
    if not path.is_file():
        raise MissingFileError(
            f"{url} has no index.json, so the set is not finished; run python -m avatar preprocess out={url} to its end"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_types(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not an index of schema {SCHEMA} ({error}); preprocess the set again") from error
    keys = [entry["key"] for part in content["shards"] for entry in part["samples"]]
    if wrong := [key for key in keys if not KEY.fullmatch(key)]:
        raise UserError(
            f"{path} has a sample of key {wrong[0]!r}; expected letters a-z, digits, - and _, since WebDataset splits "
            "names at dots: preprocess the set again"
        )
    if len(set(keys)) < len(keys):
        raise UserError(f"{path} has the same key twice; preprocess the set again")
    return content


def _check_types(content: Any) -> None:
    """Raise for an index with values of other types than a preprocessed set's: it is untrusted data."""
    _expect(isinstance(content, dict) and content["schema"] == SCHEMA, f"schema {content['schema']!r:.20}")
    config = content.get("config", {})
    _expect(isinstance(config, dict), "a config that is not a mapping")
    encoders, detectors = config.get("encoders", {}), config.get("detectors", {})
    _expect(isinstance(encoders, dict) and isinstance(detectors, dict), "encoders or detectors that are not mappings")
    features = encoders.get("text_features")
    _expect(features is None or isinstance(features, str), "a text encoder's fingerprint that is not a string")
    _expect(isinstance(content["shards"], list), "shards that are not a list")
    for part in content["shards"]:
        file = part["file"]
        inside = isinstance(file, str) and file.isprintable() and not Path(file).is_absolute()
        _expect(inside and ".." not in Path(file).parts, "a shard's file outside of the set")
        split = part["split"]
        _expect(isinstance(split, str) and split.isprintable(), "a split that is not a name")
        _expect(_is_count(part["bytes"]), "a shard without its size")
        _expect(isinstance(part["samples"], list), "samples that are not a list")
        for entry in part["samples"]:
            _expect(isinstance(entry, dict) and entry.keys() >= REQUIRED, "a sample without its size")
            sizes = all(_is_count(entry[name]) for name in ("frames", "height", "width"))
            _expect(sizes and isinstance(entry["key"], str), "a sample whose key or size is of another type")
            scores, regions, caption = entry["scores"], entry.get("regions", []), entry.get("caption")
            _expect(isinstance(scores, dict) and all(map(str.isprintable, scores)), "scores without names")
            numbers = all(score is None or _is_number(score) for score in scores.values())
            _expect(numbers, "scores that are not finite numbers")
            _expect(isinstance(regions, list) and all(name in REGIONS for name in regions), "unknown regions")
            _expect(caption is None or isinstance(caption, str), "a caption that is not a string")


def _expect(valid: bool, fault: str) -> None:
    if not valid:
        raise ValueError(fault)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # no NaN
