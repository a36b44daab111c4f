"""The command: from files to a data set that WebDataset reads, whatever interrupts it."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from avatar import prepare, run
from avatar.models import checkpoint
from avatar.types import Bundle
from tests.data.prepare.films import scene, speech, talk, write

ROOT = Path(__file__).parents[3]
TINY = (
    "rules.shortest_s=1.0",
    "rules.longest_s=1.2",
    "rules.preset=ultrafast",
    "splits={train: 0.5, dev: 0.5, test: 0}",
    "shard_mb=1",
    "workers=0",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three good ones, a copy and two bad ones."""
    folder = tmp_path_factory.mktemp("Videos mit ä")
    for seed, name in enumerate(("ann 1.mov", "ann 2.mov", "Bob.mov")):
        talk(folder / name, seed=seed)
    for name in ("ann 1", "ann 2"):
        (folder / f"{name}.json").write_text('{"person_id": "ann", "caption": "eine Frau, die grüßt"}')
    (folder / "copy.mov").write_bytes((folder / "Bob.mov").read_bytes())
    (folder / "text.mp4").write_text("hello")
    write(folder / "silent.mov", scene(np.arange(30) / 25), 0 * speech(1.2))
    return folder


def prepared(videos: Path, out: Path, *overrides: str) -> Path:
    changes = OmegaConf.from_dotlist([*TINY, *overrides])
    prepare.prepare(OmegaConf.merge(composed(), changes, {"source": str(videos), "out": str(out)}))
    return out


@functools.cache
def composed():
    with initialize_config_dir(run.CONFIGS, version_base="1.3"):
        cfg = compose("prepare", overrides=["source=?", "out=?", "folder=/tmp"])
    OmegaConf.set_struct(cfg, False)
    return cfg


def contents(out: Path) -> dict[str, bytes]:
    """All but the stamps, which tell when the sources were last written."""
    files = [file for file in out.rglob("*") if file.is_file() and file.name not in ("stamps.json", ".lock")]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def data(videos, tmp_path_factory):
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in videos.iterdir()}
    out = prepared(videos, tmp_path_factory.mktemp("out") / "set")
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in videos.iterdir()} == before
    return out


def test_every_source_has_a_line_with_what_became_of_it(data):
    lines = [json.loads(line) for line in (data / "sources.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in lines} == {
        "Bob.mov": None,
        "ann 1.mov": None,
        "ann 2.mov": None,
        "copy.mov": "duplicate",
        "silent.mov": "silent",
        "text.mp4": "corrupt",
    }
    index = json.loads((data / "index.json").read_text())
    assert index["sources"] == {"accepted": 3, "corrupt": 1, "duplicate": 1, "silent": 1}
    assert index["clips"] == {"accepted": 6, "duplicate": 2, "too_short": 4}  # 2 frames are left of 60
    assert not (data / ".staging").exists()


def test_webdataset_reads_what_the_index_says(data):
    index = json.loads((data / "index.json").read_text())
    groups: dict[str, set] = {}
    for shard in index["shards"]:
        samples = list(webdataset.WebDataset(str(data / shard["file"]), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [entry["key"] for entry in shard["samples"]]
        for sample, entry in zip(samples, shard["samples"], strict=True):
            assert re.fullmatch("[a-z0-9_-]+", sample["__key__"])
            wanted = {"video.mp4", "audio.flac", "ref.png", "vad.npy", "meta.json"}
            meta = json.loads(sample["meta.json"])
            wanted |= {"txt"} if meta["person_id"] == "ann" else set()
            assert {name for name in sample if not name.startswith("__")} == wanted
            assert (meta["split"], meta["frames"], meta["fps"]) == (shard["split"], entry["frames"], 25)
            assert meta["frames"] % 4 == 1
            groups.setdefault(meta["person_id"] or meta["source"], set()).add(shard["split"])
            if "txt" in wanted:
                assert sample["txt"].decode() == "eine Frau, die grüßt"
    assert groups.keys() == {"ann", "Bob.mov"} and all(len(splits) == 1 for splits in groups.values())


def test_the_report_is_one_file_with_reasons_histograms_and_pictures(data):
    page = (data / "report.html").read_text()
    assert "6 clips" in page and "3 rejected" in page
    for code in ("corrupt", "duplicate", "silent"):
        assert f"<td>{code}</td>" in page
    assert page.count("data:image/jpeg;base64,") == 6 and page.count("data:image/png;base64,") == 1
    assert "http" not in page and not re.search(r"src='(?!data:)", page)


def test_a_finished_set_is_left_alone_and_another_config_or_source_refused(data, videos, tmp_path, capsys):
    before = contents(data)
    prepared(videos, data)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"rules\.crf.*another folder"):
        prepared(videos, data, "rules.crf=30")
    with pytest.raises(FileExistsError, match="other sources"):
        prepared(videos / "Bob.mov", data)
    assert contents(data) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        prepared(videos, tmp_path / "mine")
    with pytest.raises(ValueError, match="outside of the sources"):
        prepared(videos, videos)
    assert {file.name for file in videos.iterdir()} >= {"Bob.mov"} and not (videos / "config.json").exists()


def test_other_weights_under_the_same_name_are_another_config(videos, tmp_path):
    weights = tmp_path / "autoencoder.safetensors"
    network = {
        "_target_": "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder",
        "channels": 48,
        "widths": [8, 8],
    }
    parts = f"encode={{autoencoder: {{_target_: avatar.models.checkpoint.load, path: '{weights}'}}}}"
    for fingerprint in ("first", "second"):
        net = checkpoint.new(network)
        checkpoint.write(Bundle("autoencoder", net.state_dict(), {"network": network}), weights)
        if fingerprint == "first":
            out = prepared(videos / "Bob.mov", tmp_path / "set", parts)
            with tarfile.open(next((out / "shards").glob("*.tar"))) as tar:
                assert [name for name in tar.getnames() if name.endswith(".latent.npy")]
        else:
            with pytest.raises(FileExistsError, match=r"encoders\.latent"):
                prepared(videos / "Bob.mov", tmp_path / "set", parts)


@pytest.mark.parametrize(
    "override, told",
    [
        ("splits.train=0.7", "sum to 1"),
        ("splits.a-b=0", "names of letters"),
        ("layout=folder", "talkvid"),
        ("layout=hdtf", "videos=None"),
        ("workers=-1", "workers"),
        ("rules.faces=maybe", "keep or reject"),
        ("rules.multiple=7", "even"),
        ("rules.longest_s=0.5", "longest_s"),
    ],
)
def test_mistakes_are_told(videos, tmp_path, override, told):
    with pytest.raises(Exception, match=told) as error:
        prepared(videos, tmp_path / "out", override)
    assert isinstance(error.value.__cause__ or error.value, ValueError)
    assert not (tmp_path / "out").exists()  # so that the mended command can have it


def test_two_runs_into_one_folder_are_refused(videos, tmp_path):
    (tmp_path / "set").mkdir()
    with prepare._locked(tmp_path / "set"), pytest.raises(ValueError, match="another run"):
        prepared(videos, tmp_path / "set")


class Killed(BaseException):
    """The end, in the middle."""


SLOW_MOMENTS = [pytest.param(moment, marks=pytest.mark.slow) for moment in range(24) if moment not in (5, 22)]


@pytest.mark.parametrize("moment", [5, 22, *SLOW_MOMENTS])
def test_stopped_at_any_file_it_goes_on_to_the_same_set(data, videos, tmp_path, monkeypatch, moment):
    """Stopped before or after the n-th renaming; nothing is cleaned up from then on, as after a kill."""
    count, dead = 0, False

    def rename(source, target, _rename=os.rename):
        nonlocal count, dead
        count += 1
        dead = count == moment // 2 + 1
        if not dead or moment % 2:
            _rename(source, target)
        if dead:
            raise Killed

    def cleaning(function):
        return lambda *args, **kwargs: None if dead else function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "replace", rename)
        patch.setattr(shutil, "rmtree", cleaning(shutil.rmtree))
        patch.setattr(Path, "unlink", cleaning(Path.unlink))
        with pytest.raises(Killed):
            prepared(videos, tmp_path / "set")
    prepared(videos, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(data)


@pytest.mark.slow
def test_killed_for_real_it_goes_on_to_the_same_set_and_leaves_nobody_behind(data, videos, tmp_path):
    out = tmp_path / "set"
    arguments = [f"source='{videos}'", f"out='{out}'", *TINY, "workers=2", f"hydra.run.dir='{tmp_path}/run'"]
    command = [sys.executable, "-m", "avatar.prepare", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300  # the machine may be busy
    while not list(out.glob(".staging/*/line.json")):  # at least one source is staged
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists()
    while any(Path(f"/proc/{pid}/stat").exists() for pid in children):
        assert time.monotonic() < deadline, "workers outlive a killed run"
        time.sleep(0.05)
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    wanted, got = contents(data), contents(out)
    assert got == wanted


def test_the_config_composes_with_the_shipped_encoders(tmp_path):
    with initialize_config_dir(run.CONFIGS, version_base="1.3"):
        cfg = compose("prepare", overrides=["source=a", "out=b", "folder=/tmp", "encode='${shipped}'"])
    encode = OmegaConf.to_container(cfg, resolve=True)["encode"]
    assert set(encode) == {"autoencoder", "audio", "text"}
