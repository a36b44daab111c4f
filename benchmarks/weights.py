"""Peak memory of loading published weights: `python benchmarks/weights.py --out benchmarks/results/weights.json`.

Writes a transformer of diffusers' layout with random weights in shards, then loads it in a fresh process, and compares
the rise of that process's peak memory with the bytes of the network. Target: at most 1.15. The excess
is one tensor, as stored and as loaded, so at full size the ratio is

    1 + (bytes of the largest tensor, stored and loaded) / (bytes of the network)
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from avatar.files import write_text
from avatar.models import flops, wan_weights
from avatar.provenance import with_provenance

CHILD = """
import json, re, sys, torch
from avatar.models import flops, wan_weights
def peak():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])
network, folder, dtype = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
with torch.device("meta"):
    wan_weights.load(network)  # imports the modules that loading needs
before = peak()
net = wan_weights.load(network, folder, dtype=dtype)
print(json.dumps([before, peak(), sum(p.numel() * p.element_size() for p in net.parameters())]))
"""


def network(dim: int, ffn: int, layers: int) -> dict:
    return {
        "_target_": "avatar.models.video_dit.VideoDiT",
        "channels": 16,
        "dim": dim,
        "ffn": ffn,
        "heads": dim // 128,
        "layers": layers,
        "patch": 2,
        "audio_features": 160,
        "audio_tokens": 9,
        "text": {"_target_": "avatar.nn.embeddings.TextProjection", "features": 4096, "dim": dim},
    }


def measure(dim: int, ffn: int, layers: int, dtype: str) -> dict[str, float]:
    """Bytes of the network, rise of the peak, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        model = WanTransformer3DModel(
            num_attention_heads=dim // 128, attention_head_dim=128, num_layers=layers, ffn_dim=ffn
        )
        model.save_pretrained(folder, max_shard_size="200MB")
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        del model
        child = [sys.executable, "-c", CHILD, json.dumps(network(dim, ffn, layers)), folder, dtype]
        out = subprocess.run(child, check=True, capture_output=True, text=True).stdout
    before, peak, bytes_of = json.loads(out)
    rise = peak - before
    return {"file_bytes": stored, "network_bytes": bytes_of, "rise_bytes": rise, "ratio": rise / bytes_of}


def at_full_size(name: str, dtype: torch.dtype) -> float:
    """The ratio that the formula gives for a model's config, its weights stored in fp32."""
    text = (Path("configs/model") / f"{name}.yaml").read_text()
    dim, ffn, layers = (int(re.search(rf"\n  {key}: (\d+)", text)[1]) for key in ("dim", "ffn", "layers"))  # pyright: ignore
    with torch.device("meta"):
        net = wan_weights.load(network(dim, ffn, layers))
    largest = max(parameter.numel() for parameter in net.parameters())
    return 1 + largest * (4 + dtype.itemsize) / (flops.parameters(net) * dtype.itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of loading published weights")
    for key, value in (("dim", 1536), ("ffn", 8960), ("layers", 6)):
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    measured: dict[str, object] = {}
    for dtype in ("float32", "bfloat16"):
        row = measure(arguments.dim, arguments.ffn, arguments.layers, dtype)
        network_mib, rise_mib = row["network_bytes"] / 2**20, row["rise_bytes"] / 2**20
        print(f"{dtype:9} network {network_mib:7.0f} MiB   peak {rise_mib:7.0f} MiB   ratio {row['ratio']:.3f}")
        measured[dtype] = row
    measured["wan_14b, bfloat16, by the formula"] = ratio = at_full_size("wan_14b", torch.bfloat16)
    print(f"wan_14b in bfloat16, by the formula: ratio {ratio:.3f}")
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
