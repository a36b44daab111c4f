"""Throughput of preprocessing, compared with decoding alone: `python benchmarks/preprocess.py --seconds 60 --size 512`.

Draws videos of a moving textured scene with camera grain, preprocesses them with `workers` processes, and
prints source-seconds per wall-second: of the whole command, without the start of its processes, and of PyAV decoding
the same files with as many processes, one thread each. The share of the second that the first reaches is the figure to
compare. The films are what clips are to be, so that pictures are copied; `rules.pictures=encode` has them encoded.
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


def draw(path: Path, seconds: float, size: int, seed: int) -> None:
    """H.264 and AAC, as they come from the net: a ball that wanders over a swaying texture, under a little grain."""
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
            picture = np.roll(texture, (round(3 * np.sin(time)), round(6 * np.sin(1.3 * time))), (0, 1))
            picture += grain[number % 8]
            ball = (x - 0.5 - 0.1 * np.sin(2 * time + seed)) ** 2 + (y - 0.5 - 0.05 * np.sin(7 * time)) ** 2 < 0.06
            picture[ball] = (200, 150, 120) + grain[number % 8][ball]
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
            file.mux(video.encode(frame))
            sound = av.AudioFrame.from_ndarray(rng.normal(0, 0.1, (1, 1920)).astype(np.float32), "fltp", "mono")
            sound.sample_rate, sound.pts, sound.time_base = 48_000, 1920 * number, Fraction(1, 48_000)
            file.mux(audio.encode(sound))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))


def decode(path: Path) -> int:
    """The floor: every frame of the pictures, and of the sound resampled to the clock, and nothing done with them."""
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
    parser.add_argument("overrides", nargs="*", help="of configs/prepare.yaml")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        measure(folder, arguments)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    videos = folder / "videos"
    videos.mkdir()
    files = [videos / f"{number}.mp4" for number in range(arguments.sources)]
    for number, file in enumerate(files):
        draw(file, arguments.seconds, arguments.size, number)
    total = arguments.seconds * arguments.sources
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(int, range(arguments.workers)))
        start = perf_counter()
        assert sum(pool.map(decode, files)) == round(arguments.seconds * FRAME_RATE) * len(files)
        floor = perf_counter() - start

    def whole(source: Path, out: Path) -> float:
        workers = [f"workers={arguments.workers}", "folder=.", *arguments.overrides]
        with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
            cfg = compose("prepare", overrides=[f"source='{source}'", f"out='{out}'", *workers])
        start = perf_counter()
        preprocess.preprocess(cfg)
        return perf_counter() - start

    # What a run costs whatever its sources last: processes that start, and the report.
    short = folder / "short"
    short.mkdir()
    draw(short / "short.mp4", 4.2, 64, 0)
    start_up = whole(short, folder / "short-set")
    took = whole(videos, folder / "set")
    lines = [json.loads(line) for line in (folder / "set" / "sources.jsonl").read_text().splitlines()]
    print(f"machine      {machine()}")
    rate = sum(file.stat().st_size for file in files) * 8 / 1000 / total
    form = f"{arguments.size} x {arguments.size}, {rate:.0f} kb/s"
    print(f"sources      {arguments.sources} x {arguments.seconds:g} s, {form}")
    print(f"decoding     {total / floor:8.1f} s/s   PyAV alone, {arguments.workers} processes")
    made = Counter(clip["pictures"] for line in lines for clip in line["clips"] if clip["status"] == "accepted")
    print(f"clips        {', '.join(f'{count} {how}' for how, count in made.items())}")
    print(f"preparing    {total / took:8.1f} s/s   with {start_up:.1f} s of start-up")
    print(f"             {total / (took - start_up):8.1f} s/s   without: {floor / (took - start_up):.0%} of the floor")


if __name__ == "__main__":
    main()
