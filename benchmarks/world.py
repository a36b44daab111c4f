"""Cost of the puppet world: `OMP_NUM_THREADS=1 python benchmarks/world.py --out benchmarks/results/world.json`.

Milliseconds per frame of simulating a clip's audio and motion (`make`), of rendering (`draw`) and of state estimation
(`read`), for each framing; and seconds to build the state estimator of a new puppet. Target: at most 5 ms to render and
estimate a frame of 64 pixels on one core.
"""

import argparse
from pathlib import Path
from time import perf_counter

from avatar.files import write_text
from avatar.provenance import with_provenance
from avatar.puppet.clip import make_clip
from avatar.puppet.scene import Scene
from avatar.puppet.setting import CAMERAS
from avatar.puppet.state_estimator import StateEstimator


def measure(framing: str, size: int, clips: int, frames: int) -> dict[str, float]:
    """Of one framing: milliseconds per frame of each step, and seconds to build a state estimator."""
    scene = Scene(framings={framing: 1.0}, cues=0.5, beats=0.5, commands_hz=0.5, things=0.5)
    took = dict.fromkeys(("make", "draw", "read", "build"), 0.0)
    for seed in range(clips):
        times = [perf_counter()]
        clip = make_clip(seed, "test", frames, "speaking", backend="formant", directed=scene)
        times.append(perf_counter())
        drawn = clip.frames(size)
        times.append(perf_counter())
        estimator = StateEstimator(clip.identity, size, clip.setting)
        times.append(perf_counter())
        estimator.estimate(drawn)
        times.append(perf_counter())
        for name, before, after in zip(("make", "draw", "build", "read"), times, times[1:], strict=False):
            took[name] += after - before
    per_frame = {f"{name}_ms": 1000 * took[name] / (clips * frames) for name in ("make", "draw", "read")}
    return {**per_frame, "build_s": took["build"] / clips}


def main() -> None:
    parser = argparse.ArgumentParser(description="milliseconds per frame to simulate, render and estimate puppets")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, default=200, help="per clip")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    measured = {name: measure(name, arguments.size, arguments.clips, arguments.frames) for name in CAMERAS}
    for name, row in measured.items():
        print(f"{name:10}" + "".join(f"{key} {value:7.3f}   " for key, value in row.items()))
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
