"""Throughput of preprocessing, compared with decoding alone: `python benchmarks/preprocess.py --seconds 60 --size 512`.

Renders videos of a moving textured scene with camera grain, preprocesses them with `workers` processes, and prints
source-seconds per second: of the command, with and without the start of its processes, and of PyAV decoding the same
files with the same number of processes, one thread each. The figure to compare is the share of the decoding speed that
preprocessing reaches. The videos need no change, so they are copied; `rules.pictures=encode` encodes them.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from time import perf_counter

import av
import numpy as np
from hydra import compose, initialize_config_dir

from avatar import cli
from avatar.commands import preprocess
from avatar.provenance import machine
from avatar.types import FRAME_RATE, SAMPLE_RATE


def write_video(path: Path, seconds: float, size: int, seed: int) -> None:
    """Write H.264 and AAC of a ball that moves over a swaying texture, with a little grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    grain = rng.normal(0, 2, (8, size, size, 1))
    patches = np.kron(rng.normal(0, 12, (size // 8, size // 8)), np.ones((8, 8)))
    texture = np.stack([90 + 60 * x, 110 + 40 * y, 120 + 30 * x * y], axis=-1) + patches[..., None]
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=FRAME_RATE, options={"preset": "medium", "crf": "20"})
        video.width, video.height, video.pix_fmt = size, size, "yuv420p"
        audio = file.add_stream("aac", rate=48_000, layout="mono")
        for number in range(round(seconds * FRAME_RATE)):
            time = number / FRAME_RATE
            image = np.roll(texture, (round(3 * np.sin(time)), round(6 * np.sin(1.3 * time))), (0, 1))
            image += grain[number % 8]
            ball = (x - 0.5 - 0.1 * np.sin(2 * time + seed)) ** 2 + (y - 0.5 - 0.05 * np.sin(7 * time)) ** 2 < 0.06
            image[ball] = (200, 150, 120) + grain[number % 8][ball]
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
            file.mux(video.encode(frame))
            samples = av.AudioFrame.from_ndarray(rng.normal(0, 0.1, (1, 1920)).astype(np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts, samples.time_base = 48_000, 1920 * number, Fraction(1, 48_000)
            file.mux(audio.encode(samples))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))


def decode(path: Path) -> int:
    """Decode all frames and the audio, resampled to 16 kHz: the lower bound of the work."""
    with av.open(str(path)) as file:
        file.streams.video[0].codec_context.thread_count = 1
        frames = sum(1 for _ in file.decode(video=0))
    with av.open(str(path)) as file:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
        for frame in file.decode(audio=0):
            resampler.resample(frame)
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description="source-seconds per second, compared with decoding alone")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each source")
    parser.add_argument("--size", type=int, default=512, help="height and width")
    parser.add_argument("--sources", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="of configs/preprocess.yaml")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="preprocess-"))
    try:
        measure(folder, arguments)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    videos = folder / "videos"
    videos.mkdir()
    files = [videos / f"{number}.mp4" for number in range(arguments.sources)]
    for number, file in enumerate(files):
        write_video(file, arguments.seconds, arguments.size, number)
    total = arguments.seconds * arguments.sources
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(int, range(arguments.workers)))
        start = perf_counter()
        assert sum(pool.map(decode, files)) == round(arguments.seconds * FRAME_RATE) * len(files)
        floor = perf_counter() - start

    def run(source: Path, out: Path) -> float:
        workers = [f"workers={arguments.workers}", "folder=.", *arguments.overrides]
        with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
            cfg = compose("preprocess", overrides=[f"source='{source}'", f"out='{out}'", *workers])
        start = perf_counter()
        preprocess.preprocess(cfg)
        return perf_counter() - start

    # The cost that does not depend on the sources: starting the processes, and the report.
    short = folder / "short"
    short.mkdir()
    write_video(short / "short.mp4", 4.2, 64, 0)
    run(short, folder / "first-set")  # imports modules in this process
    start_up = run(short, folder / "short-set")
    took = run(videos, folder / "set")
    lines = [json.loads(line) for line in (folder / "set" / "sources.jsonl").read_text().splitlines()]
    print(f"machine      {machine()}")
    rate = sum(file.stat().st_size for file in files) * 8 / 1000 / total
    form = f"{arguments.size} x {arguments.size}, {rate:.0f} kb/s"
    print(f"sources      {arguments.sources} x {arguments.seconds:g} s, {form}")
    print(f"decoding     {total / floor:8.1f} s/s   PyAV alone, {arguments.workers} processes")
    counts = Counter(clip["pictures"] for line in lines for clip in line["clips"] if clip["status"] == "accepted")
    print(f"clips        {', '.join(f'{count} {how}' for how, count in counts.items())}")
    print(f"preprocessing{total / took:8.1f} s/s   with {start_up:.1f} s of start-up")
    print(f"             {total / (took - start_up):8.1f} s/s   without: {floor / (took - start_up):.0%} of the floor")


if __name__ == "__main__":
    main()
