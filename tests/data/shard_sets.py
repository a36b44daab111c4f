"""Small preprocessed sets of random numbers, in the format of `data/README.md`."""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from avatar.models import bundle
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.text_encoders.bytes import ByteTokenizer

AUDIO, TEXT, STRIDE = LogMel(mels=8), ByteTokenizer(96), 4
NUMBERS = 3  # per state vector
Files = dict[str, Any]  # of a sample: name → array, text or bytes


def autoencoder(mean: float = 0.0):
    target = "avatar.models.autoencoders.state.StateAutoencoder"
    return bundle.new({"_target_": target, "mean": [mean] * NUMBERS, "std": [1.0] * NUMBERS})


def sample(key: str, frames: int, height: int = 1, width: int = 1, net: Any = None, audio: Any = AUDIO) -> Files:
    """Files of a sample of a set with `encode`: latents of `net` (default: `autoencoder()`), features, labels."""
    net = net or autoencoder()
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    latents = 1 + (frames - 1) // STRIDE
    shape = (net.channels, latents, height // net.spatial_stride, width // net.spatial_stride)
    return {
        "afeat.npy": rng.normal(size=(frames, 1, audio.dim)).astype(np.float16),
        "audio.flac": flac(rng.integers(-3000, 3000, frames * 640).astype(np.int16)),
        "latent.npy": rng.normal(size=shape).astype(np.float16),
        "meta.json": {
            "key": key,
            "reference": "outside",
            "repairs": [],
            "latent": {"autoencoder": net.origin.fingerprint},
            "audio_features": audio.fingerprint,
            "text_features": TEXT.fingerprint,
        },
        "ref_latent.npy": rng.normal(size=(net.channels, 1, *shape[2:])).astype(np.float16),
        "txt": f"a caption of {key}",
        "vad.npy": np.ones(frames, np.uint8),
    }


def write_set(
    folder: Path,
    splits: Mapping[str, int],
    *,
    frames: Sequence[int] = (33,),
    sizes: Sequence[tuple[int, int]] = ((1, 1),),
    shards: int = 2,
    make: Callable[..., Files] = sample,
    scores: Callable[[int], Mapping[str, float | None]] = lambda number: {"motion": 0.1},
) -> Path:
    """Write a set with `splits[name]` samples of each split, whose lengths and sizes take turns, in `shards` shards."""
    (folder / "shards").mkdir(parents=True)
    listed = []
    for split, count in splits.items():
        entries = []
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            entries.append(
                {
                    "key": f"{split}-{folder.name}-{number:03d}",
                    "frames": frames[number % len(frames)],
                    "height": height,
                    "width": width,
                    "scores": dict(scores(number)),
                }
            )
        for number in range(shards):
            part = entries[number::shards]
            if not part:
                continue
            path = folder / "shards" / f"{split}-{number:06d}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for entry in part:
                    files = make(entry["key"], entry["frames"], entry["height"], entry["width"])
                    if "face.npy" in files:
                        entry["regions"] = ["face", "lips"]
                    for name, content in sorted(files.items()):
                        data = as_bytes(content)
                        member = tarfile.TarInfo(f"{entry['key']}.{name}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            listed.append(
                {"file": f"shards/{path.name}", "split": split, "bytes": path.stat().st_size, "samples": part}
            )
    (folder / "index.json").write_text(json.dumps({"schema": 1, "shards": listed}))
    return folder


def as_bytes(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, np.ndarray):
        file = io.BytesIO()
        np.save(file, content)
        return file.getvalue()
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def flac(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def mp4(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12", "g": "25", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()
