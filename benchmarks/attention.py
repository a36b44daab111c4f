"""Attention on the CPU, forward and backward: `python benchmarks/attention.py --out benchmarks/results/attention.json`.

Milliseconds of `avatar.nn.dot_product.attention` and of torch's fused kernel in fp32 and bf16, for the three attentions
of a nano block: over the clip, over prompts with a mask, and over each latent's audio. The two alternate; medians.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from avatar.files import write_text
from avatar.nn.dot_product import attention
from avatar.provenance import with_provenance

SHAPES = {  # batch, queries, keys, whether a mask
    "clip": (16, 128, 144, False),
    "prompts": (16, 144, 194, True),
    "audio": (144, 16, 19, True),
}
HEADS, DIM = 3, 64


def measure(shape: tuple[int, int, int, bool], dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median milliseconds of each implementation."""
    b, n, m, masked = shape
    q, k, v = (torch.randn(b, HEADS, length, DIM, dtype=dtype, requires_grad=True) for length in (n, m, m))
    mask = torch.zeros(b, 1, n, m, dtype=dtype) if masked else None
    times: dict[str, list[float]] = {"ours": [], "fused": []}
    kinds: dict[str, Callable[..., Tensor]] = {"ours": attention, "fused": scaled_dot_product_attention}
    for _ in range(repeats + 2):
        for name, function in kinds.items():
            start = perf_counter()
            function(q, k, v, mask).sum().backward()
            times[name].append(1000 * (perf_counter() - start))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="milliseconds of attention on the CPU, forward and backward")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    measured = {
        str(dtype).removeprefix("torch."): {
            name: measure(shape, dtype, arguments.repeats) for name, shape in SHAPES.items()
        }
        for dtype in (torch.float32, torch.bfloat16)
    }
    for dtype, rows in measured.items():
        for name, row in rows.items():
            print(f"{dtype:9} {name:8}" + "".join(f"  {key} {value:6.2f} ms" for key, value in row.items()))
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
