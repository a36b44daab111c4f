"""Timesteps at which labels matter: `python benchmarks/label_timesteps.py TEACHER --autoencoder AUTOENCODER`.

Held-out latents are noised, and a teacher predicts their velocity with the true emotion, with another one, and without
labels; neither has a prompt. Where the noisy latents show the expression themselves, the label is worth nothing: a
label that holds for a whole clip is visible in many numbers at once, so only training samples near t = 1 teach it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from avatar.commands.held_out import HeldOutClips
from avatar.data.clip_encoding import ClipSet
from avatar.diffusion import path
from avatar.diffusion.packing import Bidirectional
from avatar.files import write_text
from avatar.metrics.statistics import interval
from avatar.models import bundle
from avatar.objectives.weighting import RegionWeights
from avatar.provenance import with_provenance
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import PixelWorld
from avatar.types import EMOTIONS

TIMES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
REGIONS = RegionWeights(face=2.0, lips=16.0, eyes=16.0)


@torch.no_grad()
def measure(held_out: HeldOutClips, net: torch.nn.Module, seed: int) -> dict[str, dict[str, list[float]]]:
    """Loss per timestep, conditioning and clip, with the loss weights of regions."""
    x0, cond = held_out.batch.latents, held_out.batch.conditioning
    keep = torch.zeros(len(x0), dtype=torch.bool)
    true, none = (cond.without(audio=keep, text=~keep, labels=drop) for drop in (keep, ~keep))
    moods = len(EMOTIONS) - 1
    conds = {"true": true, "other": replace(true, emotion=(true.emotion % moods) + 1), "none": none}
    generator, weight = torch.Generator().manual_seed(seed), REGIONS(held_out.batch.regions)
    eps = torch.randn(x0.shape, generator=generator)
    losses: dict[str, dict[str, list[float]]] = {}
    for time in track(TIMES, "timesteps"):
        t = torch.full((len(x0), x0.shape[2]), time)
        x_t = path.noised(x0, eps, t)
        losses[str(time)] = {
            name: (weight * (Bidirectional().velocity(net, x_t, t, each, x0) - (eps - x0)).square())
            .mean((1, 2, 3, 4))
            .tolist()
            for name, each in conds.items()
        }
    return losses


def gaps(losses: dict[str, list[float]]) -> dict[str, object]:
    """Mean loss with the true label, and what another or no label adds to it, with 95 % intervals over clips."""
    true = np.array(losses["true"])
    row: dict[str, object] = {"loss": float(true.mean())}
    for name in ("other", "none"):
        more = np.array(losses[name]) - true
        row[name] = float(more.mean())
        row[f"{name}_ci"] = list(interval(more[:, None], lambda rows: float(rows.mean())))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="how much an emotion's label lowers the loss at each timestep")
    parser.add_argument("teacher", help="a teacher's bundle")
    parser.add_argument("--autoencoder", default="data/nano/autoencoder.safetensors", help="that of its latents")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--latents", type=int, default=16, help="per clip")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("data/cache"))
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    net, autoencoder = bundle.load(arguments.teacher, ["teacher"]), bundle.load(arguments.autoencoder, ["autoencoder"])
    bundle.check_latents(net, autoencoder)
    origin = bundle.origin_of(net)
    encoders = {part: origin.build_encoder(part, None) for part in bundle.ENCODERS}
    clips = ClipSet(
        "dev", "speaking", arguments.clips, arguments.latents, scene=Scene(framings={"portrait": 0.6, "half": 0.4})
    )
    held_out = HeldOutClips(
        PixelWorld(arguments.size), autoencoder, **encoders, clips=clips, cache=arguments.cache, workers=0
    )
    measured = {time: gaps(losses) for time, losses in measure(held_out, net, arguments.seed).items()}
    print("   t   loss  + another emotion  + no labels")
    for time, row in measured.items():
        print(f"{time:>4}  {row['loss']:.3f}  {row['other']:17.4f}  {row['none']:13.4f}")
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
