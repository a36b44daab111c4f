"""The index of a preprocessed set is untrusted data: types are checked, and fingerprints are only compared."""

import json
import shutil
from pathlib import Path

import pytest

from avatar.data.shard_index import Filters, Index
from avatar.errors import UserError
from avatar.models.text_encoders.bytes import ByteTokenizer

COPY = "${oc.create:{_target_: shutil.copyfile, src: /etc/hostname, dst: sentinel}}"


def index(**changes) -> dict:
    entry = {"key": "a", "frames": 5, "height": 8, "width": 8, "scores": {"motion": 0.1}}
    part = {"file": "shards/a.tar", "split": "train", "bytes": 10, "samples": [entry]}
    return {"schema": 1, "shards": [part]} | changes


def entries(folder: Path, content: object):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "index.json").write_text(text)
    return Index(str(folder)).entries("train", Filters(None, "keep"))


@pytest.mark.parametrize(
    "features", [None, COPY, "os.system('touch sentinel')", ByteTokenizer(96).fingerprint], ids=str
)
def test_a_text_encoders_fingerprint_is_only_compared(features, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda *_, **__: pytest.fail("the index ran code"))
    monkeypatch.chdir(tmp_path)
    (entry,) = entries(tmp_path, index(config={"encoders": {"text_features": features}}))
    assert entry.shard.text_features == features
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def changed(part: dict | None = None, sample: dict | None = None) -> dict:
    content = index()
    content["shards"][0] |= part or {}
    for entry in content["shards"][0]["samples"]:
        if sample is not None:
            entry |= sample
    return content


@pytest.mark.parametrize(
    "content",
    [
        [],
        5,
        "[" * 100_000,
        index(schema=[1]),
        index(shards={}),
        index(shards=[5]),
        index(config=[]),
        index(config={"encoders": "umt5"}),
        index(config={"detectors": ["face"]}),
        index(config={"encoders": {"text_features": {"_target_": "os.system"}}}),
        changed({"file": "/etc/passwd"}),
        changed({"file": "../../etc/passwd"}),
        changed({"file": ["a.tar"]}),
        changed({"file": "a\nb.tar"}),
        changed({"bytes": "10"}),
        changed({"split": ["train"]}),
        changed({"samples": {}}),
        changed({"samples": ["a"]}),
        changed(sample={"key": ["a"]}),
        changed(sample={"key": "../a"}),
        changed({"split": "a\x1b[2J"}),
        changed(sample={"frames": "5"}),
        changed(sample={"frames": 10**400}),
        changed(sample={"scores": {"motion": float("nan")}}),
        changed(sample={"scores": {"a\nb": 0.1}}),
        changed(sample={"height": -8}),
        changed(sample={"width": True}),
        changed(sample={"scores": {"motion": "much"}}),
        changed(sample={"scores": [0.1]}),
        changed(sample={"regions": [["face"]]}),
        changed(sample={"regions": ["hand"]}),
        changed(sample={"caption": {"_target_": "os.system"}}),
    ],
    ids=lambda content: json.dumps(content)[:90],
)
def test_an_index_of_other_types_is_rejected(content, tmp_path):
    with pytest.raises(UserError, match=r"preprocess the set again|has a sample of key") as error:
        entries(tmp_path, content)
    assert "\n" not in str(error.value)
