"""The preprocess command: from files to a data set that WebDataset reads, with and without interruptions."""

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from avatar import cli
from avatar.commands import preprocess
from avatar.media.decode import read_audio, read_video
from avatar.models import bundle
from avatar.models.audio_encoders.log_mel import LogMel
from tests.data.preprocess.videos import scene, speech, talk, write
from tests.stages import random_autoencoder

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
    """Three valid videos, a copy and two invalid ones."""
    folder = tmp_path_factory.mktemp("Videos mit ä")
    for seed, name in enumerate(("ann 1.mov", "ann 2.mov", "Bob.mov")):
        talk(folder / name, seed=seed)
    for name in ("ann 1", "ann 2"):
        (folder / f"{name}.json").write_text('{"person_id": "ann", "caption": "eine Frau, die grüßt"}')
    (folder / "copy.mov").write_bytes((folder / "Bob.mov").read_bytes())
    (folder / "text.mp4").write_text("hello")
    write(folder / "silent.mov", scene(np.arange(30) / 25), 0 * speech(1.2))
    return folder


def run_preprocess(videos: Path, out: Path, *overrides: str) -> Path:
    changes = OmegaConf.from_dotlist([*TINY, *overrides])
    preprocess.preprocess(OmegaConf.merge(compose_config(), changes, {"source": str(videos), "out": str(out)}))
    return out


@functools.cache
def compose_config():
    with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        cfg = compose("preprocess", overrides=["source=?", "out=?", "folder=/tmp"])
    OmegaConf.set_struct(cfg, False)
    return cfg


def contents(out: Path) -> dict[str, bytes]:
    """All files but the stamps, which depend on the times of the sources."""
    files = [file for file in out.rglob("*") if file.is_file() and file.name not in ("stamps.json", ".lock")]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def data(videos, tmp_path_factory):
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in videos.iterdir()}
    out = run_preprocess(videos, tmp_path_factory.mktemp("out") / "set")
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in videos.iterdir()} == before
    return out


def test_every_source_has_a_status_line(data):
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


def test_webdataset_reads_the_samples_of_the_index(data):
    index = json.loads((data / "index.json").read_text())
    groups: dict[str, set] = {}
    for shard in index["shards"]:
        samples = list(webdataset.WebDataset(str(data / shard["file"]), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [entry["key"] for entry in shard["samples"]]
        for sample, entry in zip(samples, shard["samples"], strict=True):
            assert re.fullmatch("[a-z0-9_-]+", sample["__key__"])
            expected = {"video.mp4", "audio.flac", "ref.png", "vad.npy", "meta.json"}
            meta = json.loads(sample["meta.json"])
            expected |= {"txt"} if meta["person_id"] == "ann" else set()
            assert {name for name in sample if not name.startswith("__")} == expected
            assert (meta["split"], meta["frames"], meta["fps"]) == (shard["split"], entry["frames"], 25)
            assert meta["frames"] % 4 == 1 and entry["regions"] == meta["regions"] == []
            groups.setdefault(meta["person_id"] or meta["source"], set()).add(shard["split"])
            assert sample.get("txt", b"").decode() == entry["caption"]
            if "txt" in expected:
                assert entry["caption"] == "eine Frau, die grüßt"
    assert groups.keys() == {"ann", "Bob.mov"} and all(len(splits) == 1 for splits in groups.values())


def test_report_is_one_file_with_reasons_histograms_and_images(data):
    page = (data / "report.html").read_text()
    assert "6 clips" in page and "3 rejected" in page
    for code in ("corrupt", "duplicate", "silent"):
        assert f"<td>{code}</td>" in page
    assert page.count("data:image/jpeg;base64,") == 6 and page.count("data:image/png;base64,") == 1
    assert "http" not in page and not re.search(r"src='(?!data:)", page)


def test_finished_set_is_unchanged_and_other_configs_or_sources_are_rejected(data, videos, tmp_path, capsys):
    before = contents(data)
    run_preprocess(videos, data)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"rules\.crf.*another folder"):
        run_preprocess(videos, data, "rules.crf=30")
    with pytest.raises(FileExistsError, match="other sources"):
        run_preprocess(videos / "Bob.mov", data)
    assert contents(data) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        run_preprocess(videos, tmp_path / "mine")
    with pytest.raises(ValueError, match="outside of the sources"):
        run_preprocess(videos, videos)
    assert {file.name for file in videos.iterdir()} >= {"Bob.mov"} and not (videos / "config.json").exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_autoencoder(tmp_path_factory.mktemp("weights") / "autoencoder.safetensors")


@pytest.fixture(scope="module")
def encoded(videos, weights, tmp_path_factory):
    shipped = ("encode=${shipped}", f"shipped.autoencoder.path={weights}")
    return run_preprocess(videos / "ann 1.mov", tmp_path_factory.mktemp("out") / "set", *shipped)


def test_shipped_encoders_encode_the_stored_clip(encoded, videos, weights):
    """With `encode='${shipped}'`, but random weights of the autoencoder."""
    net, audio = bundle.load(str(weights)), LogMel()
    expected_features = audio.encode(torch.from_numpy(read_audio(videos / "ann 1.mov")))
    (shard,) = (encoded / "shards").iterdir()
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(str(shard), shardshuffle=False)}
    assert len(found) == 2
    for sample in found.values():
        meta = json.loads(sample["meta.json"])
        frames = read_video(write_temporary(encoded, sample["video.mp4"]))[0]
        reference = read_video(write_temporary(encoded, sample["ref.png"]))[0]
        for name, pixels in (("latent.npy", frames), ("ref_latent.npy", reference)):
            with torch.inference_mode():
                expected = net.encode(torch.from_numpy(pixels).permute(3, 0, 1, 2)[None] / 127.5 - 1)[0]
            assert load_array(sample[name]).dtype == np.float16
            np.testing.assert_allclose(load_array(sample[name]), expected, atol=2e-3, rtol=2e-3)
        first = round(25 * meta["start_s"])
        features = load_array(sample["afeat.npy"])
        assert features.dtype == np.float16 and features.shape == (meta["frames"], 1, audio.dim)
        np.testing.assert_allclose(features[:, 0], expected_features[first : first + meta["frames"]], atol=3e-3)
        assert (bytes(load_array(sample["text.npy"])[:-1].astype(np.uint8) - 3)).decode() == "eine Frau, die grüßt"
        assert meta["latent"] == {"autoencoder": net.origin.fingerprint} and meta["audio_features"] == audio.fingerprint


def write_temporary(out: Path, content: bytes) -> Path:
    (out.parent / "part").write_bytes(content)
    return out.parent / "part"


def load_array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content))


def test_encodings_are_deterministic_and_other_weights_of_the_same_path_rejected(encoded, videos, weights, tmp_path):
    (tmp_path / "again").mkdir()
    shipped = ("encode=${shipped}", f"shipped.autoencoder.path={weights}")
    assert contents(run_preprocess(videos / "ann 1.mov", tmp_path / "again" / "set", *shipped)) == contents(encoded)
    before = weights.read_bytes()
    try:
        random_autoencoder(weights, channels=5)
        with pytest.raises(FileExistsError, match=r"encoders\.latent"):
            run_preprocess(videos / "ann 1.mov", encoded, *shipped)
    finally:
        weights.write_bytes(before)


def test_unfinished_set_inside_the_folder_of_its_sources_is_continued(tmp_path, monkeypatch):
    talk(tmp_path / "video.mov", seconds=1.2)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "finish", lambda *arguments: None)  # as if the run was killed after the last source
        run_preprocess(tmp_path, tmp_path / "set")
    assert list((tmp_path / "set" / ".staging").rglob("*.video.mp4"))
    run_preprocess(tmp_path, tmp_path / "set")
    assert json.loads((tmp_path / "set" / "index.json").read_text())["sources"] == {"accepted": 1}


def test_dead_worker_is_reported_and_staged_sources_are_kept(videos, tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *arguments): ...

        def submit(self, stage, source, staging):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

        def shutdown(self, **options): ...

    monkeypatch.setattr(preprocess, "ProcessPoolExecutor", Broken)
    with pytest.raises(OSError, match=r"worker died.*(Bob|ann|copy|silent|text).*run again with fewer workers"):
        run_preprocess(videos, tmp_path / "other", "workers=2")
    assert not (tmp_path / "other" / "index.json").exists() and (tmp_path / "other" / ".staging").is_dir()


@pytest.mark.parametrize(
    "override, message",
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
def test_invalid_settings_are_rejected(videos, tmp_path, override, message):
    with pytest.raises(Exception, match=message) as error:
        run_preprocess(videos, tmp_path / "out", override)
    assert isinstance(error.value.__cause__ or error.value, ValueError)
    assert not (tmp_path / "out").exists()  # so that the corrected command can use it


def test_two_runs_into_one_folder_are_rejected(videos, tmp_path):
    (tmp_path / "set").mkdir()
    with preprocess._locked(tmp_path / "set"), pytest.raises(ValueError, match="another run"):
        run_preprocess(videos, tmp_path / "set")


class Killed(BaseException):
    """Stands for the end of the process."""


SLOW_STEPS = [pytest.param(step, marks=pytest.mark.slow) for step in range(24) if step != 22]


@pytest.mark.parametrize("step", [22, *SLOW_STEPS])
def test_run_that_was_killed_at_any_rename_continues_to_the_same_set(data, videos, tmp_path, monkeypatch, step):
    """Killed before or after the n-th rename; nothing is cleaned up from then on, as after SIGKILL."""
    count, dead = 0, False

    def rename(source, target, _rename=os.rename):
        nonlocal count, dead
        count += 1
        dead = count == step // 2 + 1
        if not dead or step % 2:
            _rename(source, target)
        if dead:
            raise Killed

    def unless_dead(function):
        return lambda *args, **kwargs: None if dead else function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "replace", rename)
        patch.setattr(shutil, "rmtree", unless_dead(shutil.rmtree))
        patch.setattr(Path, "unlink", unless_dead(Path.unlink))
        with pytest.raises(Killed):
            run_preprocess(videos, tmp_path / "set")
    run_preprocess(videos, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(data)


def kill(process: subprocess.Popen, children: list[int]) -> None:
    process.send_signal(signal.SIGKILL)


def interrupt(process: subprocess.Popen, children: list[int]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does


def kill_workers(process: subprocess.Popen, children: list[int]) -> None:
    for pid in children:
        if b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop, code, message",
    [(kill, -signal.SIGKILL, ""), (interrupt, 130, ""), (kill_workers, 2, "error: a worker died")],
)
def test_killed_process_continues_to_the_same_set_and_leaves_no_workers(data, videos, tmp_path, stop, code, message):
    out = tmp_path / "set"
    arguments = [f"source='{videos}'", f"out='{out}'", *TINY, "workers=1", f"hydra.run.dir='{tmp_path}/run'"]
    process = subprocess.Popen(
        [sys.executable, "-m", "avatar", "preprocess", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore SIGINT
    )
    deadline = time.monotonic() + 300  # the machine may be busy
    while not list(out.glob(".staging/*/line.json")):  # at least one source is staged
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    stop(process, children)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors and message in errors
    assert not (out / "index.json").exists() and list(out.glob(".staging/*/line.json"))
    while any(Path(f"/proc/{pid}/stat").exists() for pid in children):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.05)
    run_preprocess(videos, out)
    assert contents(out) == contents(data)
