"""Throughput of data loading: `python benchmarks/loading.py --seconds 20`.

Writes a set of random latents as preprocessed shards, reads it as training does, in this process, and prints samples
and latents per second of one worker: (i) from the shards, (ii) rendered by the puppet world for the training of the
autoencoder.
The result is compared with the consumption of one GPU that trains a large teacher:

    FLOPs per sample = 6 P n + 12 d_model layers n²       n tokens = latents · height · width / patch²
    samples per second = mfu · peak / FLOPs per sample

6 P n are the products with weights, forward and backward (arXiv:2001.08361), 12 d layers n² those of full attention
(4 forward, twice that backward); nothing is recomputed. Loading is from the page cache, if the set fits in there. With
--out the figures are written as JSON.
"""

import argparse
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from avatar.data.batch_schedule import UNIFORM
from avatar.data.bucketing import LengthBuckets
from avatar.data.puppet_frames import FrameBatches
from avatar.data.shard_index import Filters
from avatar.data.shards import ShardClips
from avatar.files import write_text
from avatar.models import bundle
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.autoencoders.causal_conv import CausalConvAutoencoder
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.provenance import machine, with_provenance
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import PixelWorld
from avatar.types import SAMPLES_PER_FRAME


def autoencoder(channels: int) -> Any:
    """An autoencoder with random weights; loading latents needs only its strides and fingerprint."""
    target = "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder"
    return bundle.new({"_target_": target, "channels": channels, "widths": [4, 4]})


def write_set(folder: Path, samples: int, latents: int, net: Any, size: int, audio: LogMel) -> int:
    """Write shards of a hundred samples, and return the bytes of one sample."""
    (folder / "shards").mkdir(parents=True)
    rng, frames, side = np.random.default_rng(0), 1 + net.temporal_stride * latents, size // net.spatial_stride
    meta = {
        "reference": "outside",
        "repairs": [],
        "latent": {"autoencoder": net.origin.fingerprint},
        "audio_features": audio.fingerprint,
        "text_features": None,
    }
    parts = {
        "afeat.npy": as_npy(rng.normal(size=(frames, 1, audio.dim)).astype(np.float16)),
        "audio.flac": rng.bytes(frames * SAMPLES_PER_FRAME),  # of the size of such audio; it is never decoded
        "latent.npy": as_npy(rng.normal(size=(net.channels, 1 + latents, side, side)).astype(np.float16)),
        "meta.json": json.dumps(meta).encode(),
        "ref_latent.npy": as_npy(rng.normal(size=(net.channels, 1, side, side)).astype(np.float16)),
        "txt": b"a woman speaks",
        "vad.npy": as_npy(np.ones(frames, np.uint8)),
    }
    shards = []
    for split, count in (("train", samples), ("dev", 1)):
        keys = [f"{split}-{number:06d}" for number in range(count)]
        for first in range(0, count, 100):
            path = folder / "shards" / f"{split}-{first // 100:06d}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for key in keys[first : first + 100]:
                    for name, content in parts.items():
                        member = tarfile.TarInfo(f"{key}.{name}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            entries = [
                {"key": key, "frames": frames, "height": size, "width": size, "scores": {}}
                for key in keys[first : first + 100]
            ]
            shards.append(
                {"file": f"shards/{path.name}", "split": split, "bytes": path.stat().st_size, "samples": entries}
            )
    (folder / "index.json").write_text(json.dumps({"schema": 1, "shards": shards}))
    return sum(map(len, parts.values()))


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def measure_rate(batches, samples_of, seconds: float) -> dict[str, float]:
    """Measure samples per second of wall time and of CPU time, after a first batch that is not counted."""
    batches = iter(batches)
    next(batches)
    samples, wall, cpu = 0, perf_counter(), process_time()
    while perf_counter() - wall < seconds:
        samples += samples_of(next(batches))
    return {"per_s": samples / (perf_counter() - wall), "per_cpu_s": samples / (process_time() - cpu)}


def measure_shards(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    net, audio = autoencoder(arguments.channels), LogMel()
    size = write_set(folder, arguments.samples, arguments.latents, net, arguments.size, audio)
    side = arguments.size // net.spatial_stride
    data = ShardClips(
        str(folder),
        train="train",
        dev="dev",
        filters=Filters(None, "keep"),
        pictures=None,
        autoencoder=net,
        audio=audio,  # pyright: ignore[reportArgumentType]
        text=ByteTokenizer(),
        pause=10,
        history=8,
        region_weights={"face": 0.0, "lips": 0.0},
        buckets=LengthBuckets((arguments.latents,), (1.0,), arguments.latents * side * side * 4),
        placement=UNIFORM,
        on_error="raise",
        steps=1_000_000,
        seed=0,
        workers=0,
    )
    data.setup("fit")
    rates = measure_rate(data.train_dataloader(), lambda batch: len(batch.keys), arguments.seconds)
    return rates | {"bytes_per_sample": size}


def measure_puppets(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    frames = 1 + CausalConvAutoencoder.temporal_stride * arguments.latents
    batches = FrameBatches(PixelWorld(64), Scene(), "train", 0, 1_000_000, 0, 4, frames, folder)
    return measure_rate((batches[i] for i in range(len(batches))), lambda batch: len(batch.keys), arguments.seconds)


def teacher(arguments: argparse.Namespace) -> dict[str, float]:
    side = arguments.size // CausalConvAutoencoder.spatial_stride // arguments.patch
    tokens = arguments.latents * side * side
    flops = 6 * arguments.parameters * tokens + 12 * arguments.width * arguments.layers * tokens**2
    return {
        "tokens_per_sample": tokens,
        "flops_per_sample": flops,
        "per_s": arguments.mfu * arguments.peak_tflops * 1e12 / flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="samples per second of one worker, compared with a teacher's consumption"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--samples", type=int, default=400, help="of the set")
    parser.add_argument("--latents", type=int, default=20, help="of a clip, four frames each")
    parser.add_argument("--size", type=int, default=512, help="height and width of the frames, in pixels")
    parser.add_argument("--channels", type=int, default=16, help="of latents")
    parser.add_argument("--parameters", type=float, default=1.3e9)
    parser.add_argument("--width", type=int, default=1536, help="of the teacher")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one GPU; 989: H100 or H200, dense bf16")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's worker
    folder = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        shards, puppets = measure_shards(arguments, folder / "set"), measure_puppets(arguments, folder / "speech")
    finally:
        shutil.rmtree(folder)
    consumption = teacher(arguments)
    print(f"machine   {machine()}")
    print(f"clips     {arguments.latents} latents; shards of {arguments.size} px, puppets of 64 px")
    print(f"shards    {shards['per_s']:9.1f} samples/s   a worker; {shards['per_cpu_s']:.1f} per CPU-s")
    print(
        f"puppets   {puppets['per_s']:9.1f} samples/s   a worker, rendered; {puppets['per_cpu_s']:.1f} per CPU-second"
    )
    print(
        f"teacher   {consumption['per_s']:9.1f} samples/s   per GPU; {arguments.parameters / 1e9:g} B parameters, "
        f"mfu {arguments.mfu:g} of {arguments.peak_tflops:g} TFLOP/s; {consumption['tokens_per_sample']} tokens, "
        f"{consumption['flops_per_sample'] / 1e12:.0f} TFLOPs per sample"
    )
    print(f"          one worker feeds {shards['per_s'] / consumption['per_s']:.0f} such GPUs from shards")
    if arguments.out:
        settings = {name: value for name, value in vars(arguments).items() if name != "out"}
        results = {"settings": settings, "shards": shards, "puppets": puppets, "teacher": consumption}
        write_text(arguments.out, with_provenance(**results))


if __name__ == "__main__":
    main()
