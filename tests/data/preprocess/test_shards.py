"""Splits, duplicates and content of shards, without videos."""

import json
import tarfile

import pytest

from avatar.data.preprocess import shards

SPLITS = {"train": 0.6, "dev": 0.2, "test": 0.2}


def line(name: str, persons: tuple = (None,), sha: str | None = None) -> dict:
    clips = [
        {
            "status": "accepted",
            "stem": f"{25 * n:07d}",
            "start_s": float(n),
            "frames": 25,
            "height": 64,
            "width": 64,
            "person_id": person,
            "regions": ["face"],
            "scores": {"dover": None},
        }
        for n, person in enumerate(persons)
    ]
    audio = {"sha256": sha or name}
    return {"key": name, "source": f"{name}.mp4", "status": "accepted", "reason": None, "clips": clips, "audio": audio}


@pytest.fixture
def staging(tmp_path):
    def fill(lines):
        for source in lines:
            folder = tmp_path / "staging" / source["key"]
            folder.mkdir(parents=True)
            for clip in source["clips"]:
                (folder / f"{clip['stem']}.meta.json").write_text('{"fps": 25}')
                (folder / f"{clip['stem']}.video.mp4").write_bytes(source["key"].encode() * 300)
        return tmp_path / "staging"

    return fill


def splits_of(lines, staging) -> dict[str, set]:
    found: dict[str, set] = {}
    for sample in shards.samples(lines, staging, SPLITS):
        for node in (sample.key.rsplit("-", 1)[0], sample.clip["person_id"]):
            found.setdefault(node, set()).add(sample.split)
    return found


def test_persons_and_sources_are_in_one_split_each(tmp_path):
    """60 sources, each with a person of its own and one that it shares with two other sources."""
    lines = [line(f"s{n}", (f"own {n}", f"shared {n // 3}")) for n in range(60)]
    lines.append(line("bridge", ("shared 4", "shared 9")))
    found = splits_of(lines, tmp_path)
    assert all(len(splits) == 1 for splits in found.values())
    assert found["shared 4"] == found["shared 9"]
    assert set.union(*found.values()) == {"train", "dev", "test"}


def test_sources_without_persons_are_split_by_share(tmp_path):
    lines = [line(f"s{n}", (None, None)) for n in range(2000)]
    found = splits_of(lines, tmp_path)
    found.pop(None)
    assert all(len(splits) == 1 for splits in found.values())
    share = sum(splits == {"dev"} for splits in found.values()) / 2000
    assert share == pytest.approx(0.2, abs=0.03)


def test_split_is_unchanged_by_additional_sources(tmp_path):
    few = [line(f"s{n}", (f"p{n}",)) for n in range(20)]
    more = [*few, *(line(f"t{n}", (f"q{n}",)) for n in range(20))]
    after = splits_of(more, tmp_path)
    assert all(after[name] == splits for name, splits in splits_of(few, tmp_path).items())


def test_duplicates_are_rejected_independently_of_order():
    lines = [line("b", sha="x"), line("a", sha="x"), line("c", sha="y"), line("d"), line("e")]
    lines[3]["audio"] = lines[4]["audio"] = {"sha256": None}  # no audio: not duplicates
    for order in (lines, lines[::-1]):
        lines_by_key = {source["key"]: source for source in shards.reject_duplicates(order)}
        assert [key for key, source in lines_by_key.items() if source["reason"] == "duplicate"] == ["b"]
        assert "a.mp4" in lines_by_key["b"]["detail"]
        assert lines_by_key["b"]["clips"][0]["reason"] == "duplicate"


def test_shards_hold_complete_samples_up_to_max_bytes_in_hash_order(tmp_path, staging):
    lines = [line(f"s{n}") for n in range(12)]
    found = shards.samples(lines, staging(lines), {"train": 1.0})
    assert [sample.key for sample in found] != sorted(sample.key for sample in found)  # neighbours are unrelated
    written = shards.write(tmp_path / "shards", found, max_bytes=2_000)
    names = []
    for shard in written:
        with tarfile.open(tmp_path / shard["file"]) as tar:
            members = tar.getmembers()
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
        assert [member.name.split(".", 1)[0] for member in members[::2]] == [entry["key"] for entry in shard["samples"]]
        assert sum(member.size for member in members) < 3_000
        names += [member.name for member in members]
    assert len(written) > 3 and len(names) == len(set(names)) == 24
    assert {name.split(".", 1)[1] for name in names} == {"meta.json", "video.mp4"}
    assert {entry["caption"] for shard in written for entry in shard["samples"]} == {""}
    index = shards.index(lines, written, {})
    assert index["splits"]["train"] == {"samples": 12, "seconds": 12.0, "groups": 12}
    again = shards.write(tmp_path / "again" / "shards", found, max_bytes=2_000)
    assert [shard["sha256"] for shard in again] == [shard["sha256"] for shard in written]


def test_metadata_has_key_split_and_group(tmp_path, staging):
    lines = [line("a", ("ann",))]
    (sample,) = shards.samples(lines, staging(lines), {"train": 0.0, "dev": 1.0})
    meta = json.loads(dict(sample.files())["meta.json"])
    assert meta == {"fps": 25, "key": "a-0000", "split": "dev", "group": "person ann"}
