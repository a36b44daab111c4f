"""Autoencoders under noise on their latents: `python benchmarks/decoder_noise.py data/nano/autoencoder.safetensors`.

A diffusion model leaves errors on the latents that act like noise of σ = 0.2 to 0.3. Held-out clips are encoded, noise
is added, and the decoded frames are scored: PSNR, lip-sync r, ΔE, undecodable frames, and sharpness (mean absolute
Laplacian) and flicker (mean absolute frame difference) relative to the true frames.
"""

import argparse
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from avatar.data.clip_encoding import ClipSet
from avatar.files import write_text
from avatar.metrics import identity, lip_sync
from avatar.metrics.state_estimation import PixelReader
from avatar.models import bundle
from avatar.objectives.autoencoder import psnr
from avatar.provenance import with_provenance
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import PixelWorld

LAPLACIAN = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]


def sharpness(video: Tensor) -> float:
    """Mean absolute Laplacian of frames, `c f h w`."""
    images = video.transpose(0, 1).flatten(0, 1)[:, None]
    return float(torch.nn.functional.conv2d(images, LAPLACIAN).abs().mean())


def flicker(video: Tensor) -> float:
    """Mean absolute difference of consecutive frames, `c f h w`."""
    return float(video.diff(dim=1).abs().mean())


@torch.no_grad()
def measure(path: str, sigma: float, clips: ClipSet, cache: Path, size: int) -> dict[str, float]:
    """Scores of decoded latents with noise of standard deviation `sigma`."""
    net, world, reader = bundle.load(path, ["autoencoder"]), PixelWorld(size), PixelReader(size)
    frames, read, errors = 1 + net.temporal_stride * clips.latents, [], []
    ratios: dict[str, list[float]] = {"sharpness": [], "flicker": []}
    for i in track(range(clips.count), f"σ = {sigma}"):
        clip = clips.make(i, frames, cache)
        video = world.video(clip, 0, frames)
        latents = net.encode(video[None])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i))
        made = net.decode(torch.cat([latents[:, :, :1], (latents + sigma * noise)[:, :, 1:]], dim=2))[0, :, 1:]
        errors.append(psnr(made, video[:, 1:]).item())
        ratios["sharpness"].append(sharpness(made) / sharpness(video[:, 1:]))
        ratios["flicker"].append(flicker(made) / flicker(video[:, 1:]))
        read.append(reader.read(clip, made, start=1))
    mean = {name: sum(values) / len(values) for name, values in {"psnr": errors, **ratios}.items()}
    return {
        **mean,
        "lip_sync_r": lip_sync.correlation(read),
        "closure_recall": lip_sync.closure_recall(read),
        "delta_e": identity.delta_e(read),
        "undecodable_rate": identity.undecodable_rate(read),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="scores of autoencoders whose latents have noise")
    parser.add_argument("bundles", nargs="+", help="autoencoders")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--latents", type=int, default=16, help="per clip")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--cache", type=Path, default=Path("data/cache/speech"))
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    scene = Scene(
        framings={"portrait": 0.6, "half": 0.4}, commands_hz=0.3, moods=0.3, things=0.4, backdrops=("disc", "room")
    )
    clips = ClipSet("dev", "speaking", arguments.clips, arguments.latents, scene=scene)
    measured = {
        path: {str(sigma): measure(path, sigma, clips, arguments.cache, arguments.size) for sigma in arguments.sigmas}
        for path in arguments.bundles
    }
    for path, rows in measured.items():
        print(path)
        for sigma, row in rows.items():
            print(f"  σ {sigma:4}" + "".join(f"  {key} {value:.3f}" for key, value in row.items()))
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
