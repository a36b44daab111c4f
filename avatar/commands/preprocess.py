"""Anybody's talking videos → shards to train on: `python -m avatar preprocess source=FOLDER out=data/myset`.

Sources are staged one by one, side by side in processes, under `OUT/.staging`; when all are, shards, `sources.jsonl`,
`report.html` and at last `index.json` are written from there, and the staging folder goes. A run that is killed at any
moment goes on from the sources that were staged, and ends with the same bytes. Sources are only ever read.
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

VERSION = 3  # of what the stages make; part of the config that an unfinished set belongs to
LAYOUTS = {"talkvid": importers.talkvid, "hdtf": importers.hdtf}
MADE_OF = ("rules", "detectors", "scorers", "encode", "splits", "shard_mb")  # what a data set depends on
OWN = ("config.json", "stamps.json", "sources.jsonl", "report.html", "index.json")
SPLITS_WANTED = "splits={train: 0.9, dev: 0.05, test: 0.05}"


def preprocess(cfg: DictConfig) -> None:
    """The data set of a config; refuses a folder that holds another one."""
    require_int(0, workers=cfg.workers)
    require_int(1, shard_mb=cfg.shard_mb)
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    dataset_spec: dict[str, Any] = {"version": VERSION, **{name: config[name] for name in MADE_OF}}
    _check_splits(dataset_spec["splits"])
    out = Path(cfg.out).absolute()
    staging = out / ".staging"
    sources = [source for source in _sources(cfg) if not source.path.is_relative_to(staging)]  # an earlier run's clips
    if inside := [source.path for source in sources if source.path.is_relative_to(out)]:
        raise UserError(f"out={out} holds the source {inside[0]}; choose a folder outside of the sources")
    # Also where worker processes do the work: invalid rules or models show before anything is written.
    _start(dataset_spec, cfg.device)
    dataset_spec["encoders"] = _worker_state["tools"].encoders.line()  # whose weights may have changed under their name
    stamps = {source.name: source.stamp() for source in sources}
    create_folder(out)
    with _locked(out):
        for left in [file for name in OWN for file in out.glob(f".{name}.*.tmp")]:
            left.unlink(missing_ok=True)
        if _opened(out, dataset_spec, stamps):
            shutil.rmtree(staging, ignore_errors=True)
            print(f"{out / 'index.json'} is there already, of these sources and this config; nothing to do")
            return
        for left in staging.glob(".*.tmp"):
            shutil.rmtree(left)
        lines = _staged(sources, staging, dataset_spec, cfg.workers, cfg.device)
        finish(out, lines, dataset_spec, stamps)


def finish(out: Path, lines: Sequence[shards.Line], dataset_spec: Mapping[str, Any], stamps: Mapping[str, Any]) -> None:
    """From staged sources to the data set; `index.json`, which ends it, comes last."""
    from avatar.data.preprocess import page  # brings matplotlib, for which workers, who import this module, would wait

    staging = out / ".staging"
    lines = shards.without_duplicates([{k: v for k, v in line.items() if k != "stamp"} for line in lines])
    found = shards.samples(lines, staging, dataset_spec["splits"])
    written = shards.write(out / "shards", found, dataset_spec["shard_mb"] * 1_000_000)
    index = shards.index(lines, written, dataset_spec)
    for stale in {f.name for f in (out / "shards").iterdir()} - {Path(shard["file"]).name for shard in written}:
        (out / "shards" / stale).unlink()
    write_text(out / "sources.jsonl", "".join(dumps(line) + "\n" for line in lines))
    write_text(out / "report.html", page.html(out.name, lines, index, found))
    write_text(out / "stamps.json", dumps(stamps) + "\n")
    write_text(out / "index.json", json.dumps(index, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    shutil.rmtree(staging, ignore_errors=True)
    seconds = sum(split["seconds"] for split in index["splits"].values())
    print(
        f"{len(found)} clips, {seconds / 60:.1f} minutes, of {progress_text(index['sources'])}: {out / 'report.html'}"
    )
    if not found:
        raise UserError(f"no clip of {len(lines)} sources is left; {out / 'sources.jsonl'} says why for each")


def _sources(cfg: DictConfig) -> list[Source]:
    if cfg.layout == "files":
        return find(cfg.source if isinstance(cfg.source, str) else list(cfg.source))
    if cfg.layout not in LAYOUTS:
        raise UserError(f"layout={cfg.layout}; wanted files, {' or '.join(LAYOUTS)}")
    require_str(source=cfg.source, videos=cfg.videos)
    sources, notes = LAYOUTS[cfg.layout](Path(cfg.source), Path(cfg.videos))
    for note in notes:
        print(note)
    if not sources:
        raise UserError(f"none of the videos that {cfg.source} names is in videos={cfg.videos}; check both")
    return sources


def _check_splits(splits: Mapping[str, float]) -> None:
    shares = list(splits.values())
    if any(not isinstance(s, int | float) or s < 0 for s in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"splits={splits}, which are no shares that sum to 1; wanted something like {SPLITS_WANTED}")
    if strange := [name for name in splits if not (name.isascii() and name.isalnum())]:
        raise UserError(f"splits are named {', '.join(strange)}; wanted names of letters, as in {SPLITS_WANTED}")


def _opened(out: Path, dataset_spec: Mapping[str, Any], stamps: Mapping[str, Any]) -> bool:
    """Whether the folder holds the whole data set; a folder with another, or with anything else, is refused."""
    config = out / "config.json"
    if not config.exists():
        if strange := [file.name for file in out.iterdir() if file.name != ".lock"]:
            raise ExistingFileError(
                f"out={out} holds other things, such as {strange[0]}; give an empty or a new folder"
            )
        write_text(config, dumps(dataset_spec) + "\n")
        return False
    before = json.loads(config.read_text(encoding="utf-8"))
    if before != json.loads(dumps(dataset_spec)):
        raise ExistingFileError(
            f"out={out} was begun with another {' and '.join(_differences(before, dataset_spec))}; give these as they "
            f"were (they are in {config}), or another folder"
        )
    if not (out / "index.json").exists():
        return False
    if json.loads((out / "stamps.json").read_text(encoding="utf-8")) != json.loads(dumps(stamps)):
        raise ExistingFileError(
            f"out={out} is a finished data set of other sources, or of these before they changed; prepare the new ones "
            "into a folder of their own, and train on both"
        )
    return True


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted names of the settings that differ, one level down."""
    names = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [f"{name}.{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        elif old != new:
            names.append(name)
    return names


def _staged(
    sources: Sequence[Source], staging: Path, dataset_spec: Mapping[str, Any], workers: int, device: str
) -> list[shards.Line]:
    """The sources' lines, each staged now or before; progress goes by bytes, which say best what is left to do."""
    create_folder(staging)
    size = {source.name: max(_size(source), 1) for source in sources}
    # The largest first, so that none is left over when all others are done.
    queue = sorted(sources, key=lambda source: -size[source.name])
    counted: Counter[str] = Counter()
    columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    lines = []
    with Progress(*columns, TextColumn("{task.description}")) as progress:
        bar = progress.add_task("", total=sum(size.values()))
        for line in _each(queue, staging, dataset_spec, workers, device):
            lines.append(line)
            counted[line["reason"] or "accepted"] += 1
            progress.update(bar, advance=size[line["source"]], description=progress_text(counted))
    return lines


def _each(
    sources: Sequence[Source], staging: Path, dataset_spec: Mapping[str, Any], workers: int, device: str
) -> Iterator[shards.Line]:
    """Lines as they come from so many processes; 0: from this one, which has rules and tools at hand."""
    if workers == 0:
        for source in sources:
            yield _stage(source, staging)
        return
    # Spawned, not forked: FFmpeg's and torch's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_process, (dataset_spec, device))
    try:
        asked = {pool.submit(_stage, source, staging): source for source in sources}
        for done in as_completed(asked):
            try:
                yield done.result()
            except BrokenProcessPool:
                raise FileAccessError(
                    f"a worker died, maybe for lack of memory, when {asked[done].name} was still to do; what is staged "
                    "is kept: run again with fewer workers, or with workers=0 to see which source it is"
                ) from None
    except BaseException:  # Ctrl-C too, which is not to wait for an hour of video
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def progress_text(counted: Mapping[str, int]) -> str:
    return f"{sum(counted.values())} sources: " + ", ".join(f"{n} {name}" for name, n in sorted(counted.items()))


def _size(source: Source) -> int:
    return source.path.stat().st_size if source.path.exists() else 0


_worker_state: dict[str, Any] = {}  # of a process: its rules and tools, made once


def _start(dataset_spec: Mapping[str, Any], device: str) -> None:
    rules: Rules = hydra.utils.instantiate(dataset_spec["rules"])
    encoders = Encoders(**_made(dataset_spec["encode"] or {}))
    encoders.check(rules.temporal_stride, rules.multiple)
    for encoder in (encoders.autoencoder, encoders.audio, encoders.text):
        if isinstance(encoder, torch.nn.Module):
            encoder.eval().to(choose_device(device))
    detectors = Detectors(**_made(dataset_spec["detectors"]))
    _worker_state.update(rules=rules, tools=Models(detectors, _made(dataset_spec["scorers"]), encoders))


def _made(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: hydra.utils.instantiate(part) for name, part in parts.items()}


def _start_process(dataset_spec: Mapping[str, Any], device: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=follow, daemon=True).start()  # a killed parent leaves nobody behind
    torch.set_num_threads(1)
    _start(dataset_spec, device)


def _stage(source: Source, staging: Path) -> shards.Line:
    return pipeline.stage(source, staging, _worker_state["rules"], _worker_state["tools"])


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the folder against a second run, where the system has locks that die with their process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is preparing out={out}; wait for it, or give another folder") from None
        yield
