"""Preprocessing of talking videos to training shards: `python -m avatar preprocess source=FOLDER out=data/myset`.

Worker processes stage the sources one by one under `OUT/.staging`. When all are staged, the shards, `sources.jsonl`,
`report.html` and finally `index.json` are written from there, and the staging folder is deleted. A run that was killed
at any point continues from the staged sources, and its output is the same byte for byte. Sources are never changed.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import hydra
import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avatar.data.preprocess import importers, pipeline, shards
from avatar.data.preprocess.detectors import Detectors
from avatar.data.preprocess.encoding import Encoders
from avatar.data.preprocess.rules import Models, Rules
from avatar.data.preprocess.samples import dumps
from avatar.data.preprocess.sources import Source, find
from avatar.errors import ExistingFileError, FileAccessError, UserError, require_int, require_str
from avatar.files import create_folder, write_text
from avatar.process import choose_device

VERSION = 3  # of the stages' outputs; part of the config, so that a data set is of one version
LAYOUTS = {"talkvid": importers.talkvid, "hdtf": importers.hdtf}
SPEC_KEYS = ("rules", "detectors", "scorers", "encode", "splits", "shard_mb")  # settings that a data set depends on
OUTPUT_FILES = ("config.json", "stamps.json", "sources.jsonl", "report.html", "index.json")
SPLITS_EXAMPLE = "splits={train: 0.9, dev: 0.05, test: 0.05}"


def preprocess(cfg: DictConfig) -> None:
    """Write the data set of a config into `cfg.out`, or continue an unfinished one.

    Args:
        cfg: config `preprocess`, whose comments describe each setting.

    Raises:
        UserError: invalid settings or sources, or a folder with other files or another data set.
    """
    require_int(0, workers=cfg.workers)
    require_int(1, shard_mb=cfg.shard_mb)
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    dataset_spec: dict[str, Any] = {"version": VERSION, **{name: config[name] for name in SPEC_KEYS}}
    _check_splits(dataset_spec["splits"])
    out = Path(cfg.out).absolute()
    staging = out / ".staging"
    sources = [source for source in _sources(cfg) if not source.path.is_relative_to(staging)]  # an earlier run's clips
    if inside := [source.path for source in sources if source.path.is_relative_to(out)]:
        raise UserError(f"out={out} contains the source {inside[0]}; choose a folder outside of the sources")
    # In this process too, even if workers do the work: invalid rules or models are found before anything is written.
    _set_up_worker(dataset_spec, cfg.device)
    # Fingerprints of the weights, which may differ under the same path.
    dataset_spec["encoders"] = _worker_state["models"].encoders.fingerprints()
    stamps = {source.name: source.stamp() for source in sources}
    create_folder(out)
    with _locked(out):
        for leftover in [file for name in OUTPUT_FILES for file in out.glob(f".{name}.*.tmp")]:
            leftover.unlink(missing_ok=True)
        if _is_finished(out, dataset_spec, stamps):
            shutil.rmtree(staging, ignore_errors=True)
            print(f"{out / 'index.json'} already exists for these sources and this config; nothing to do")
            return
        for leftover in staging.glob(".*.tmp"):
            shutil.rmtree(leftover)
        lines = _stage_all(sources, staging, dataset_spec, cfg.workers, cfg.device)
        finish(out, lines, dataset_spec, stamps)


def finish(out: Path, lines: Sequence[shards.Line], dataset_spec: Mapping[str, Any], stamps: Mapping[str, Any]) -> None:
    """Write the data set from the staged sources; `index.json` is last, so that it marks a complete one."""
    from avatar.data.preprocess import report  # imports matplotlib, which workers (they import this module) don't need

    staging = out / ".staging"
    lines = shards.reject_duplicates([{k: v for k, v in line.items() if k != "stamp"} for line in lines])
    found = shards.samples(lines, staging, dataset_spec["splits"])
    written = shards.write(out / "shards", found, dataset_spec["shard_mb"] * 1_000_000)
    index = shards.index(lines, written, dataset_spec)
    for stale in {f.name for f in (out / "shards").iterdir()} - {Path(shard["file"]).name for shard in written}:
        (out / "shards" / stale).unlink()
    write_text(out / "sources.jsonl", "".join(dumps(line) + "\n" for line in lines))
    write_text(out / "report.html", report.html(out.name, lines, index, found))
    write_text(out / "stamps.json", dumps(stamps) + "\n")
    write_text(out / "index.json", json.dumps(index, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    shutil.rmtree(staging, ignore_errors=True)
    seconds = sum(split["seconds"] for split in index["splits"].values())
    print(
        f"{len(found)} clips, {seconds / 60:.1f} minutes, of {progress_text(index['sources'])}: {out / 'report.html'}"
    )
    if not found:
        raise UserError(f"no clip of {len(lines)} sources was accepted; {out / 'sources.jsonl'} lists the reasons")


def _sources(cfg: DictConfig) -> list[Source]:
    if cfg.layout == "files":
        return find(cfg.source if isinstance(cfg.source, str) else list(cfg.source))
    if cfg.layout not in LAYOUTS:
        raise UserError(f"layout={cfg.layout}; expected files, {' or '.join(LAYOUTS)}")
    require_str(source=cfg.source, videos=cfg.videos)
    sources, notes = LAYOUTS[cfg.layout](Path(cfg.source), Path(cfg.videos))
    for note in notes:
        print(note)
    if not sources:
        raise UserError(f"videos={cfg.videos} contains none of the videos that source={cfg.source} lists; check both")
    return sources


def _check_splits(splits: Mapping[str, float]) -> None:
    shares = list(splits.values())
    if any(not isinstance(s, int | float) or s < 0 for s in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"splits={splits}; expected shares that sum to 1, such as {SPLITS_EXAMPLE}")
    if invalid := [name for name in splits if not (name.isascii() and name.isalnum())]:
        raise UserError(f"got splits named {', '.join(invalid)}; expected names of letters, as in {SPLITS_EXAMPLE}")


def _is_finished(out: Path, dataset_spec: Mapping[str, Any], stamps: Mapping[str, Any]) -> bool:
    """Whether the folder contains the finished data set; writes the config of a new one.

    Raises:
        ExistingFileError: a folder with another data set or with other files.
    """
    config = out / "config.json"
    if not config.exists():
        if other := [file.name for file in out.iterdir() if file.name != ".lock"]:
            raise ExistingFileError(f"out={out} contains other files, such as {other[0]}; give an empty or new folder")
        write_text(config, dumps(dataset_spec) + "\n")
        return False
    before = json.loads(config.read_text(encoding="utf-8"))
    if before != json.loads(dumps(dataset_spec)):
        raise ExistingFileError(
            f"out={out} was started with another {' and '.join(_differences(before, dataset_spec))}; give the former "
            f"settings, which are in {config}, or another folder"
        )
    if not (out / "index.json").exists():
        return False
    if json.loads((out / "stamps.json").read_text(encoding="utf-8")) != json.loads(dumps(stamps)):
        raise ExistingFileError(
            f"out={out} is a finished data set of other sources, or of earlier versions of them; preprocess the new "
            "ones into another folder, and train on both"
        )
    return True


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ; dotted names for those within a mapping."""
    names = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [f"{name}.{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        elif old != new:
            names.append(name)
    return names


def _stage_all(
    sources: Sequence[Source], staging: Path, dataset_spec: Mapping[str, Any], workers: int, device: str
) -> list[shards.Line]:
    """Stage the sources that are not staged yet, and return the lines of all. Progress counts bytes, like the work."""
    create_folder(staging)
    size = {source.name: max(_size(source), 1) for source in sources}
    # The largest first, so that no worker is busy with one when the others have finished.
    queue = sorted(sources, key=lambda source: -size[source.name])
    counted: Counter[str] = Counter()
    columns = (TextColumn("preprocessing"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    lines = []
    with Progress(*columns, TextColumn("{task.description}")) as progress:
        bar = progress.add_task("", total=sum(size.values()))
        for line in _stage_each(queue, staging, dataset_spec, workers, device):
            lines.append(line)
            counted[line["reason"] or "accepted"] += 1
            progress.update(bar, advance=size[line["source"]], description=progress_text(counted))
    return lines


def _stage_each(
    sources: Sequence[Source], staging: Path, dataset_spec: Mapping[str, Any], workers: int, device: str
) -> Iterator[shards.Line]:
    """The lines of the sources in the order in which `workers` processes finish them; 0: this process."""
    if workers == 0:
        for source in sources:
            yield _stage(source, staging)
        return
    # Spawned, not forked: the threads of FFmpeg and torch don't exist in a forked process.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_process, (dataset_spec, device))
    try:
        submitted = {pool.submit(_stage, source, staging): source for source in sources}
        for done in as_completed(submitted):
            try:
                yield done.result()
            except BrokenProcessPool:
                raise FileAccessError(
                    f"a worker died, perhaps for lack of memory, before {submitted[done].name} was staged; staged "
                    "sources are kept: run again with fewer workers, or with workers=0 to find the source"
                ) from None
    except BaseException:  # also Ctrl-C: it must not wait for the sources in progress
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def progress_text(counted: Mapping[str, int]) -> str:
    """The number of sources, and the number with each verdict."""
    return f"{sum(counted.values())} sources: " + ", ".join(f"{n} {name}" for name, n in sorted(counted.items()))


def _size(source: Source) -> int:
    return source.path.stat().st_size if source.path.exists() else 0


_worker_state: dict[str, Any] = {}  # rules and models of this process, built once


def _set_up_worker(dataset_spec: Mapping[str, Any], device: str) -> None:
    rules: Rules = hydra.utils.instantiate(dataset_spec["rules"])
    encoders = Encoders(**_instantiate(dataset_spec["encode"] or {}))
    encoders.check(rules.temporal_stride, rules.multiple)
    for encoder in (encoders.autoencoder, encoders.audio, encoders.text):
        if isinstance(encoder, torch.nn.Module):
            encoder.eval().to(choose_device(device))
    detectors = Detectors(**_instantiate(dataset_spec["detectors"]))
    _worker_state.update(rules=rules, models=Models(detectors, _instantiate(dataset_spec["scorers"]), encoders))


def _instantiate(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: hydra.utils.instantiate(part) for name, part in parts.items()}


def _start_process(dataset_spec: Mapping[str, Any], device: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    threading.Thread(target=exit_with_parent, daemon=True).start()  # also when the parent is killed
    torch.set_num_threads(1)
    _set_up_worker(dataset_spec, device)


def _stage(source: Source, staging: Path) -> shards.Line:
    return pipeline.stage(source, staging, _worker_state["rules"], _worker_state["models"])


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder against a second run; the lock ends with the process."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing out={out}; wait until it ends, or give another folder") from None
    try:
        yield
    finally:
        lock.release()
