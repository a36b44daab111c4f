"""Time, throughput and peak memory of a training step of `train.py`, on random clips.

    # 2 cores, reduced width
    python benchmarks/training_step.py model.network.layers=6 model.network.dim=384 model.network.ffn=2240 \
        model.network.heads=3 --frames 16 --height 240 --width 416
    # Wan 2.1 1.3B at 480×832×81 frames, one GPU
    python benchmarks/training_step.py transforms=large trainer.precision=bf16-mixed +objective.optimizer.fused=true \
        --device cuda

Other arguments override the config of `train.py`; the default model is `wan_1_3b`. The share of the
ceiling (model FLOPs utilisation) is

    3 × FLOPs of a forward pass × clips / seconds / FLOP/s of large matrix products

without the FLOPs of recomputed activations. The ceiling is measured on the same device, in the same run and precision.
Target on one H200: at least 45 %.
"""

import argparse
import math
import resource
import statistics
import tempfile
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
import lightning
import torch
from hydra import compose, initialize_config_dir
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from avatar import cli
from avatar.commands.summarize import clip_of
from avatar.files import write_text
from avatar.models import flops
from avatar.models.transforms.apply import apply_transforms
from avatar.models.video_dit import VideoDiT
from avatar.nn.embeddings import TextProjection
from avatar.process import set_up_torch
from avatar.provenance import with_provenance
from avatar.training import fit
from avatar.types import REGIONS, ROLES, Batch, Conditioning

WARM = 3  # steps that are not counted: kernels are chosen and compiled, and the optimiser allocates its state


# Torch's attention kernels in the order in which they are tried.
LAST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION, *LAST],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *LAST],
}


class RandomClips(lightning.LightningDataModule):
    """Data module of random clips of one size, with audio and a caption of maximum length."""

    def __init__(self, net: VideoDiT, clip: flops.ClipShape, clips: int, steps: int):
        super().__init__()
        self.batch, self.steps = random_batch(net, clip, clips), steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * self.steps, batch_size=None)  # pyright: ignore[reportArgumentType]


def random_batch(net: VideoDiT, clip: flops.ClipShape, clips: int) -> Batch:
    b, l, space = clips, clip.latents, (clip.height, clip.width)
    features = (net.text.features,) if isinstance(net.text, TextProjection) else ()
    words = torch.randn(b, 1, clip.text_tokens, *features) if features else torch.ones(b, 1, clip.text_tokens).long()
    unspecified = torch.zeros(b, l, dtype=torch.long)
    cond = Conditioning(
        reference=torch.randn(b, net.channels, 1, *space),
        audio=torch.randn(b, len(ROLES), l, net.audio.tokens, net.audio.features),
        audio_mask=torch.ones(b, len(ROLES), l, dtype=torch.bool),
        text=words,
        text_mask=torch.ones(b, 1, clip.text_tokens, dtype=torch.bool),
        text_event=unspecified,
        state=unspecified,
        emotion=unspecified,
        emotion_intensity=torch.zeros(b, l),
        gesture=unspecified,
        image=None if net.image is None else torch.randn(b, clip.image_tokens, net.image.features),
        concat_latents=torch.randn(b, net.extra_in_channels, l, *space) if net.extra_in_channels else None,
    )
    latents = torch.randn(b, net.channels, l, *space)
    return Batch(latents, cond, torch.rand(b, len(REGIONS), l, *space), [f"random-{n}" for n in range(b)])


class Clock(lightning.Callback):
    """Seconds of every step, from the batch's arrival to the end of its update."""

    def __init__(self):
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = now()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seconds.append(now() - self.began)
        self.losses.append(trainer.callback_metrics["train/loss"].item())


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations a second of large matrix products, the best of five runs."""
    edge = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for repeats in (1, 10, 10, 10, 10, 10):
        start = now()
        for _ in range(repeats):
            a @ b
        best = min(best, (now() - start) / repeats)
    return 2 * edge**3 / best


def peak_bytes(device: str) -> int:
    """Most memory in use at once so far: of the device, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    own = ["model=wan_1_3b", f"folder={folder}", "name=benchmark", f"seed={arguments.seed}", *arguments.overrides]
    with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=own)
    fit.silence_lightning()
    warnings.filterwarnings("ignore", ".*no `val_dataloader`")
    set_up_torch(cfg.threads)
    lightning.seed_everything(cfg.seed, verbose=False)
    objective = hydra.utils.instantiate(cfg.objective)
    pixels = {name: getattr(arguments, name) for name in ("frames", "height", "width", "text_tokens", "image_tokens")}
    clip = clip_of(objective.net, **pixels)
    data = RandomClips(objective.net, clip, arguments.clips, WARM + arguments.steps)
    step_flops = 3 * arguments.clips * flops.forward_flops(objective.net, clip)
    parameters = flops.parameters(objective.net)
    apply_transforms(objective, hydra.utils.instantiate(cfg.transforms, _convert_="all"))
    clock = Clock()
    trainer = hydra.utils.instantiate(
        cfg.trainer,
        accelerator=arguments.device,
        callbacks=[clock],
        plugins=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with sdpa_kernel(KERNELS[arguments.attention], set_priority=True):
        trainer.fit(objective, data)
    peak = peak_bytes(arguments.device)  # before the ceiling takes memory of its own
    dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
    best = ceiling(arguments.device, dtype)
    seconds = statistics.median(clock.seconds[WARM:])
    return {
        "parameters": parameters,
        "clip": vars(clip) | {"clips": arguments.clips},
        "precision": trainer.precision,
        "attention": arguments.attention,
        "step_s": seconds,
        "steps_s": clock.seconds,
        "losses": clock.losses,
        "model_flops": step_flops,
        "achieved_flops_per_s": step_flops / seconds,
        "ceiling_flops_per_s": best,
        "utilisation": step_flops / seconds / best,
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="time, utilisation and memory of a training step")
    parser.add_argument("overrides", nargs="*", help="of train.py's config, such as transforms=large")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, value in (("frames", 80), ("height", 480), ("width", 832), ("text-tokens", 512), ("image-tokens", 257)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("clips", 1), ("steps", 10), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--attention", default="flash", choices=tuple(KERNELS))
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments, folder)
    print(
        f"step {measured['step_s']:.3f} s   {measured['achieved_flops_per_s'] / 1e12:.3g} of "
        f"{measured['ceiling_flops_per_s'] / 1e12:.3g} TFLOP/s = {measured['utilisation']:.1%}   "
        f"peak {measured['peak_bytes'] / 2**30:.2f} GiB"
    )
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
