"""Assembly of a data set from staged sources: duplicates, splits, tar shards, and the index.

The result is a function of the sources' status lines and files, independent of the order and the process in which they
were staged. Samples are ordered by a hash of their keys, so that neighbours in a shard are unrelated.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar.data.preprocess.samples import SCHEMA, dumps
from avatar.files import atomic_path
from avatar.provenance import versions
from avatar.types import FRAME_RATE, SAMPLE_RATE

Line = dict[str, Any]  # the status line of a source


@dataclass(frozen=True)
class Sample:
    """An accepted clip with its key, its split and the folder of its staged files."""

    key: str
    split: str
    group: str  # of persons and sources that share a split
    clip: Mapping[str, Any]  # its status line
    folder: Path

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Read the files as sorted pairs of name and content; `meta.json` gets the key, split and group."""
        stem = self.clip["stem"]
        for file in sorted(self.folder.glob(f"{stem}.*")):
            name, content = file.name.removeprefix(f"{stem}."), file.read_bytes()
            if name == "meta.json":
                meta = json.loads(content) | {"key": self.key, "split": self.split, "group": self.group}
                content = dumps(meta).encode()
            yield name, content


def reject_duplicates(lines: Sequence[Line]) -> list[Line]:
    """Lines sorted by source name; of sources with the same audio, all but the first are rejected."""
    first: dict[str, str] = {}
    kept = []
    for line in sorted(lines, key=lambda line: line["source"]):
        digest = line["audio"]["sha256"]
        if line["status"] == "accepted" and digest is not None:
            original = first.setdefault(digest, line["source"])
            line = line if original == line["source"] else _rejected(line, f"the same audio as {original}")
        kept.append(line)
    return kept


def samples(lines: Sequence[Line], staging: Path, splits: Mapping[str, float]) -> list[Sample]:
    """Accepted clips in the order in which they are written.

    Clips that are linked by persons or sources, directly or indirectly, form a group and share a split. The split is
    drawn from a hash of the group's name, so that it stays the same when unrelated sources are added.

    Args:
        staging: folder with one subfolder per source, named by its key.
        splits: share of each split; the shares sum to 1.
    """
    group_of = _groups(lines)
    accepted_samples = []
    for line in lines:
        if line["status"] != "accepted":
            continue
        accepted = [clip for clip in line["clips"] if clip["status"] == "accepted"]
        for number, clip in enumerate(sorted(accepted, key=lambda clip: clip["start_s"])):
            group = group_of[line["source"]]
            key = f"{line['key']}-{number:04d}"
            accepted_samples.append(Sample(key, _split(group, splits), group, clip, staging / line["key"]))
    order = list(splits)
    return sorted(accepted_samples, key=lambda sample: (order.index(sample.split), _hash(sample.key), sample.key))


def write(folder: Path, members: Sequence[Sample], max_bytes: int) -> list[dict[str, Any]]:
    """Write the shards `SPLIT-000000.tar` … and return their entries in the index.

    An existing shard is written again: that is faster than a check of its content.

    Args:
        max_bytes: of the files in a shard, unless it has only one sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    for split, split_members in _by_split(members).items():
        for number, part in enumerate(_parts(split_members, max_bytes)):
            path = folder / f"{split}-{number:06d}.tar"
            with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in part:
                    for name, content in sample.files():
                        _add(tar, f"{sample.key}.{name}", content)
            shards.append(
                {
                    "file": f"{folder.name}/{path.name}",
                    "split": split,
                    "bytes": path.stat().st_size,
                    "sha256": _hash_of_file(path),
                    "samples": [_entry(sample) for sample in part],
                }
            )
    return shards


def index(lines: Sequence[Line], shards: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `index.json`."""
    splits = {}
    for split in dict.fromkeys(shard["split"] for shard in shards):
        members = [entry for shard in shards if shard["split"] == split for entry in shard["samples"]]
        splits[split] = {
            "samples": len(members),
            "seconds": sum(entry["frames"] for entry in members) / FRAME_RATE,
            "groups": len({entry["group"] for entry in members}),
        }
    return {
        "schema": SCHEMA,
        "fps": FRAME_RATE,
        "sample_rate": SAMPLE_RATE,
        "config": config,
        "sources": counts(lines),
        "clips": _clip_counts(lines),
        "splits": splits,
        "shards": list(shards),
        "versions": versions(),
    }


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """Number of sources by result: "accepted" or the code of a rejection."""
    return dict(sorted(Counter(line["reason"] or "accepted" for line in lines).items()))


def _rejected(line: Line, detail: str) -> Line:
    """The status line of a duplicate."""
    result = {"status": "rejected", "reason": "duplicate", "detail": detail}
    clips = [clip | result if clip["status"] == "accepted" else clip for clip in line["clips"]]
    return line | result | {"clips": clips}


def _clip_counts(lines: Sequence[Line]) -> dict[str, int]:
    clips = [clip for line in lines for clip in line["clips"]]
    return dict(sorted(Counter(clip.get("reason") or "accepted" for clip in clips).items()))


def _groups(lines: Sequence[Line]) -> dict[str, str]:
    """Group of each source: the first name, in sorted order, of its connected component of persons and sources."""
    linked: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        source = f"source {line['source']}"
        linked[source] = linked[source]
        for clip in line["clips"]:
            if (person := clip.get("person_id")) is not None:
                linked[source].add(f"person {person}")
                linked[f"person {person}"].add(source)
    name: dict[str, str] = {}
    for start in sorted(linked):
        reached = [start] if start not in name else []
        while reached:
            node = reached.pop()
            name[node] = start
            reached += [other for other in linked[node] if other not in name]
    return {line["source"]: name[f"source {line['source']}"] for line in lines}


def _split(group: str, splits: Mapping[str, float]) -> str:
    drawn, cumulative = int(_hash(group)[:12], 16) / 16**12, 0.0
    for name, share in splits.items():
        cumulative += share
        if drawn < cumulative:
            return name
    return [name for name, share in splits.items() if share > 0][-1]  # if rounding makes the shares sum to less than 1


def _by_split(members: Sequence[Sample]) -> dict[str, list[Sample]]:
    splits = defaultdict(list)
    for sample in members:
        splits[sample.split].append(sample)
    return splits


def _parts(members: Sequence[Sample], max_bytes: int) -> Iterator[list[Sample]]:
    part, size = [], 0
    for sample in members:
        more = sum(file.stat().st_size for file in sample.folder.glob(f"{sample.clip['stem']}.*"))
        if part and size + more > max_bytes:
            yield part
            part, size = [], 0
        part.append(sample)
        size += more
    if part:
        yield part


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner: the same content gives the same bytes
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


def _entry(sample: Sample) -> dict[str, Any]:
    kept = {name: sample.clip[name] for name in ("frames", "height", "width", "person_id", "regions", "scores")}
    caption = sample.folder / f"{sample.clip['stem']}.txt"
    text = caption.read_bytes().decode() if caption.exists() else ""
    return {"key": sample.key, "group": sample.group, **kept, "caption": text}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
