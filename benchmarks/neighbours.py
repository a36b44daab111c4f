"""Cost of busy neighbour processes: `python benchmarks/neighbours.py --out benchmarks/results/neighbours.json`.

The shipped student streams the bundled sentence, and a nano network makes forward and backward passes over random
latents, each alone and beside processes that keep the cores busy. With a thread per core, three waiting policies of
OpenMP threads are compared: `default` (libgomp's own), `passive` (sleep at once) and `short` (`avatar/threads.py`);
`single` is one thread, which waits for no other. Training runs as `short`, a stream as `single` (`configs/infer.yaml`).
The figure of a stream is its real-time factor, that of training the seconds per step, both without start-up and
warm-up. A run ends after `--limit` seconds, with the figure of what it has done by then.

Policies, alone and beside neighbours, take turns, so that changes of the machine's speed affect all of them. The figure
is the median; every run is stored. A run during which other processes took more than a tenth of the cores is repeated.
Target: at most 3 times the time alone.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from avatar.threads import SPIN_COUNT, shorten_spinning

POLICIES: dict[str, dict[str, str]] = {
    "default": {"GOMP_SPINCOUNT": "300000"},  # what libgomp does without any setting
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "short": {},
    "single": {},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_DYNAMIC")  # removed from the environment of a run
WARMUP = 2  # steps of training that are not counted


def stream_factor(limit: float, threads: int | None) -> dict[str, Any]:
    """Measure the real-time factor of the shipped student, as `infer.py` streams it."""
    import torch
    from hydra import compose, initialize_config_dir

    from avatar import cli
    from avatar.commands.infer import open_session
    from avatar.media.decode import read_audio, read_image
    from avatar.media.frames import from_uint8
    from avatar.process import set_up_torch
    from avatar.streaming.simulation import StreamStats, stream

    with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        cfg = compose("infer", overrides=["folder=unused"])
    set_up_torch(threads)
    image, _ = read_image(cfg.image, cfg.size)
    session = open_session(cfg, from_uint8(image[None])[None])
    records = []
    begun = perf_counter()
    for emitted in stream(session, torch.from_numpy(read_audio(cfg.audio))):
        records.append(emitted)
        if perf_counter() - begun > limit:
            return {"figure": StreamStats.of(records).real_time_factor, "cut": True}
    return {"figure": StreamStats.of(records).real_time_factor, "cut": False}


def step_seconds(limit: float, threads: int | None, steps: int) -> dict[str, Any]:
    """Measure a forward and backward pass of the teacher's network over a batch of the size in `train.py`."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from avatar import cli
    from avatar.nn.masks import FullView
    from avatar.process import set_up_torch
    from avatar.types import Conditioning

    with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=["folder=unused", "name=unused"])
    set_up_torch(threads)
    torch.manual_seed(cfg.seed)
    net = instantiate(cfg.model.network).train()
    l = max(cfg.data.buckets.lengths)
    b, side = cfg.data.buckets.max_latents_per_batch // l, cfg.puppet.size // cfg.latent.spatial_stride
    none = torch.zeros(b, l, dtype=torch.long)
    cond = Conditioning(
        reference=torch.randn(b, net.channels, 1, side, side),
        audio=torch.randn(b, 2, l, net.audio.tokens, net.audio.features),
        audio_mask=torch.ones(b, 2, l, dtype=torch.bool),
        text=torch.ones(b, 1, 24, dtype=torch.long),
        text_mask=torch.ones(b, 1, 24, dtype=torch.bool),
        text_event=none,
        state=none,
        emotion=none,
        emotion_intensity=torch.zeros(b, l),
        gesture=none,
    )
    x, t, view = torch.randn(b, net.channels, l, side, side), torch.rand(b, l), FullView(torch.arange(l))
    times = [perf_counter()]
    while len(times) <= WARMUP + steps and times[-1] - times[0] <= limit:
        net(x, t, cond, view).square().mean().backward()
        times.append(perf_counter())
    warm = min(WARMUP, len(times) - 2)  # a run that was cut short has at least one step
    return {"figure": (times[-1] - times[warm]) / (len(times) - 1 - warm), "cut": len(times) <= WARMUP + steps}


def run_once(job: str, policy: str, neighbours: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a job in its own process, beside `neighbours` busy ones."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | POLICIES[policy]
    own = [sys.executable, __file__, "--job", job, "--limit", str(arguments.limit), "--steps", str(arguments.steps)]
    own += ["--threads", "1"] if policy == "single" else []
    with ExitStack() as ends:
        for _ in range(neighbours):
            busy = ends.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            ends.callback(busy.kill)  # before it is waited for
        done = subprocess.run(own, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_undisturbed(job: str, policy: str, neighbours: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Repeat a run until other processes took less than a tenth of the cores during it."""
    while True:
        begun, before = perf_counter(), other_seconds()
        result = run_once(job, policy, neighbours, arguments)
        share = (other_seconds() - before) / (perf_counter() - begun) / (os.cpu_count() or 1)
        if share < 0.1:
            return result
        print(
            f"{job} {policy}, {neighbours} neighbours: other processes took {share:.0%} of the cores; again", flush=True
        )
        time.sleep(5)


def other_seconds() -> float:
    """CPU time so far of processes that this one did not start; 0 on systems without /proc/stat."""
    if not (stat := Path("/proc/stat")).exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for job in ("stream", "training"):
        runs: dict[str, dict[str, list]] = {policy: {"alone": [], "beside": []} for policy in arguments.policies}
        for _ in range(arguments.repeats):
            for company, count in (("alone", 0), ("beside", arguments.neighbours)):
                for policy in arguments.policies:
                    runs[policy][company].append(run_undisturbed(job, policy, count, arguments))
        measured[job] = {}
        for policy, found in runs.items():
            row: dict[str, Any] = {}
            for company, results in found.items():
                figures = [result["figure"] for result in results]
                row |= {company: statistics.median(figures), f"{company}_runs": figures}
                row[f"{company}_cut"] = sum(result["cut"] for result in results)
            row["slowdown"] = row["beside"] / row["alone"]
            measured[job][policy] = row
            print(
                f"{job:9} {policy:8} alone {row['alone']:.3f}   beside {arguments.neighbours} busy "
                f"{row['beside']:.3f}   {row['slowdown']:.2f} times, "
                f"{row['beside_cut']} of {arguments.repeats} cut short",
                flush=True,
            )
        if "default" in measured[job]:
            for row in measured[job].values():
                row["alone_beside_default"] = row["alone"] / measured[job]["default"]["alone"]
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="a stream and training, alone and beside busy processes")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=tuple(POLICIES))
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of training")
    parser.add_argument("--threads", type=int, help="of the run; default: one per core")
    parser.add_argument("--limit", type=float, default=30, help="seconds of a run")
    parser.add_argument(
        "--job", choices=("stream", "training"), help="one run, printed as JSON (used by this script itself)"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    if arguments.job is not None:
        shorten_spinning()
        limit, threads = arguments.limit, arguments.threads
        if arguments.job == "stream":
            print(json.dumps(stream_factor(limit, threads)))
        else:
            print(json.dumps(step_seconds(limit, threads, arguments.steps)))
        return
    measured = measure(arguments)
    if arguments.out is not None:
        from avatar.files import write_text
        from avatar.provenance import with_provenance

        policies = POLICIES | {"short": {"GOMP_SPINCOUNT": SPIN_COUNT}}
        write_text(
            arguments.out, with_provenance(policies=policies, neighbours=arguments.neighbours, measured=measured)
        )


if __name__ == "__main__":
    main()
