"""The backbone's forward pass compared with diffusers' `WanTransformer3DModel`, on the same weights and input.

    python benchmarks/backbone.py --out benchmarks/results/backbone.json                      # 2 cores, reduced width
    python benchmarks/backbone.py --device cuda --dtype bfloat16 --dim 1536 --ffn 8960 --heads 12 --layers 30 \
        --latents 21 --height 60 --width 104                                                    # Wan 2.1 1.3B, 480p

Text to video, with one prompt and without audio and sink: what both networks support. The two take turns, so that
changes of the machine's speed affect both; the ratio is that of the medians. Target: at most 1.03, eager and compiled.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from diffusers import WanTransformer3DModel

from avatar.files import write_text
from avatar.models import wan_weights
from avatar.nn.masks import FullView
from avatar.provenance import with_provenance
from avatar.types import Conditioning

CHANNELS, TEXT, WORDS = 16, 4096, 512


def pair(arguments: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, diffusers') with the same random weights; ours without the blocks' audio, which diffusers lacks."""
    torch.manual_seed(arguments.seed)
    theirs = WanTransformer3DModel(
        num_attention_heads=arguments.heads,
        attention_head_dim=arguments.dim // arguments.heads,
        num_layers=arguments.layers,
        ffn_dim=arguments.ffn,
    )
    config = {
        "_target_": "avatar.models.video_dit.VideoDiT",
        "channels": CHANNELS,
        "dim": arguments.dim,
        "ffn": arguments.ffn,
        "heads": arguments.heads,
        "layers": arguments.layers,
        "patch": 2,
        "audio_features": 160,
        "audio_tokens": 9,
        "audio_injection": arguments.audio,
        "text": {"_target_": "avatar.nn.embeddings.TextProjection", "features": TEXT, "dim": arguments.dim},
    }
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = wan_weights.load(config, folder)
    dtype = getattr(torch, arguments.dtype)
    return ours.to(arguments.device, dtype).eval(), theirs.to(arguments.device, dtype).eval()


def inputs(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    latents, size = arguments.latents, (arguments.height, arguments.width)
    nothing = torch.zeros(1, latents, dtype=torch.long)
    cond = Conditioning(
        reference=torch.randn(1, CHANNELS, 1, *size),
        audio=torch.zeros(1, 2, latents, 9, 160),
        audio_mask=torch.zeros(1, 2, latents, dtype=torch.bool),
        text=torch.randn(1, 1, WORDS, TEXT),
        text_mask=torch.ones(1, 1, WORDS, dtype=torch.bool),
        text_event=nothing,
        state=nothing,
        emotion=nothing,
        emotion_intensity=torch.zeros(1, latents),
        gesture=nothing,
    )
    dtype = getattr(torch, arguments.dtype)
    cond = cond.map(lambda t: t.to(arguments.device, dtype if t.is_floating_point() else t.dtype))
    x = torch.randn(1, CHANNELS, latents, *size).to(arguments.device, dtype)
    return x, torch.full((1, latents), 0.7).to(arguments.device, dtype), cond


def seconds(call: Callable[[], object], device: str) -> float:
    start = perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, object]:
    ours, theirs = pair(arguments)
    x, t, cond = inputs(arguments)
    view = FullView(torch.arange(arguments.latents, device=arguments.device))
    measured: dict[str, object] = {}
    for way in ("eager", "compiled"):
        if way == "compiled":
            for net in (ours, theirs):
                for block in net.blocks:
                    block.compile()
        calls = (
            lambda: ours(x, t, cond, view),
            lambda: theirs(x, 1000 * t[:, 0], cond.text[:, 0], return_dict=False)[0],
        )
        a, b = (call() for call in calls)  # warm-up, too
        error = ((a - b).abs().max() / b.abs().max()).item()
        taken = [[seconds(call, arguments.device) for call in calls] for _ in range(arguments.repeats)]
        mine, its = (statistics.median(column) for column in zip(*taken, strict=True))
        measured[way] = {"ours_s": mine, "diffusers_s": its, "ratio": mine / its, "relative_error": error}
        print(f"{way:9} ours {mine:.3f} s   diffusers {its:.3f} s   ratio {mine / its:.3f}   error {error:.1e}")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="our forward pass compared with diffusers' on the same weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, value in (("dim", 384), ("ffn", 2240), ("heads", 3), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("latents", 6), ("height", 30), ("width", 52)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--audio", default="addition", choices=("attention", "addition"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    measured = measure(arguments)
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
