"""Wan's published weights in and out: diffusers' layout, the original one, and causal students trained from them.

    Wan 2.1 T2V / I2V, Wan 2.2 TI2V        a folder of safetensors with an index, or one such file
    Self-Forcing, CausVid, Causal-Forcing  a .pt whose `generator_ema` or `generator` holds the original names

Tensors come one by one into a network that has no memory before: the peak is the network and one tensor. Those that a
file has in the precision that is asked for are mapped, as a bundle's are. What the backbone adds to Wan's (audio,
labels, reference channels, …) starts at zero: a loaded one computes what it computed.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from avatar.errors import ExistingFileError, UserError
from avatar.files import atomic_path, save_tensors
from avatar.models import bundle
from avatar.models.video_dit import VideoDiT
from avatar.models.weight_files import Published, opened
from avatar.nn.attention import zero_init_
from avatar.nn.embeddings import TextProjection

# Module here, in diffusers' layout, in the original one; N stands for the number of a block.
MODULES = (
    ("patches.proj", "patch_embedding", "patch_embedding"),
    ("time.linear_1", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("time.linear_2", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("modulation", "condition_embedder.time_proj", "time_projection.1"),
    ("text.linear_1", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text.linear_2", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("image.norm_in", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("image.linear_1", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("image.linear_2", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("image.norm_out", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("blocks.N.attention.q", "blocks.N.attn1.to_q", "blocks.N.self_attn.q"),
    ("blocks.N.attention.k", "blocks.N.attn1.to_k", "blocks.N.self_attn.k"),
    ("blocks.N.attention.v", "blocks.N.attn1.to_v", "blocks.N.self_attn.v"),
    ("blocks.N.attention.out", "blocks.N.attn1.to_out.0", "blocks.N.self_attn.o"),
    ("blocks.N.attention.norm_q", "blocks.N.attn1.norm_q", "blocks.N.self_attn.norm_q"),
    ("blocks.N.attention.norm_k", "blocks.N.attn1.norm_k", "blocks.N.self_attn.norm_k"),
    ("blocks.N.norm_text", "blocks.N.norm2", "blocks.N.norm3"),
    ("blocks.N.text.q", "blocks.N.attn2.to_q", "blocks.N.cross_attn.q"),
    ("blocks.N.text.k", "blocks.N.attn2.to_k", "blocks.N.cross_attn.k"),
    ("blocks.N.text.v", "blocks.N.attn2.to_v", "blocks.N.cross_attn.v"),
    ("blocks.N.text.out", "blocks.N.attn2.to_out.0", "blocks.N.cross_attn.o"),
    ("blocks.N.text.norm_q", "blocks.N.attn2.norm_q", "blocks.N.cross_attn.norm_q"),
    ("blocks.N.text.norm_k", "blocks.N.attn2.norm_k", "blocks.N.cross_attn.norm_k"),
    ("blocks.N.text.image.k", "blocks.N.attn2.add_k_proj", "blocks.N.cross_attn.k_img"),
    ("blocks.N.text.image.v", "blocks.N.attn2.add_v_proj", "blocks.N.cross_attn.v_img"),
    ("blocks.N.text.image.norm_k", "blocks.N.attn2.norm_added_k", "blocks.N.cross_attn.norm_k_img"),
    ("blocks.N.ffn.0", "blocks.N.ffn.net.0.proj", "blocks.N.ffn.0"),
    ("blocks.N.ffn.2", "blocks.N.ffn.net.2", "blocks.N.ffn.2"),
    ("blocks.N.modulation", "blocks.N.scale_shift_table", "blocks.N.modulation"),
    ("modulation_out", "scale_shift_table", "head.modulation"),
    ("out", "proj_out", "head.head"),
)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
DIFFUSERS, ORIGINAL = ({row[0]: row[column] for row in MODULES} for column in (1, 2))


def load(
    network: Any, weights: str | None = None, kind: str = "teacher", dtype: str = "float32", allow: Collection[str] = ()
) -> VideoDiT:
    """A backbone with published weights, or a new one if there are none.

    Args:
        network: its config; `weights` a folder or file as the module's docstring lists.
        kind: "teacher", or "student" for a causal few-step network.
        dtype: of the parameters, whatever the file has; see DTYPES.
        allow: patterns (`*`) of names, of the file or the network, that may be unknown, missing or mis-shaped.

    Raises UserError naming every other such tensor; those of the network's that are missing keep their fresh start.
    """
    for name, given, choices in (("kind", kind, bundle.KINDS), ("dtype", dtype, DTYPES)):
        if given not in choices:
            raise UserError(f"{name}={given!r} of a model; choose one of {', '.join(choices)}")
    if weights is None:
        fresh = bundle.new(network)
        fresh.origin = replace(bundle.origin_of(fresh), kind=kind)
        return fresh.to(DTYPES[dtype])
    published = opened(Path(weights))
    with torch.device("meta"):
        net: VideoDiT = bundle.new(network)
    if not isinstance(net.text, TextProjection):
        raise UserError(f"text by {type(net.text).__name__}; Wan's networks take features: TextProjection")
    pairs = names_of(net, _layout(published))
    found = _fitting(net, published, pairs, allow)
    _start(net, [name for name in net.state_dict() if name not in found], DTYPES[dtype])
    for ours, theirs in found.items():
        tensor = _ours(ours, published.read[theirs](), net.patch)
        _assign(net, ours, tensor.to(DTYPES[dtype]))
    origin = bundle.origin_of(net)
    net.origin = replace(origin, kind=kind, fingerprint=bundle.fingerprint(net.state_dict()))  # pyright: ignore
    return net.eval()


def export(net: VideoDiT, folder: Path, allow: Collection[str] = ()) -> None:
    """Write the network as diffusers' `WanTransformer3DModel` reads it: config.json and one safetensors file.

    Raises UserError if what Wan lacks isn't silent (the file would compute something else), unless named in `allow`,
    and FileExistsError for a folder that holds something.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ExistingFileError(f"{folder} isn't empty, and nothing in it is overwritten; give another folder")
    pairs, config = names_of(net, DIFFUSERS), json.dumps(_diffusers_config(net), indent=2, sort_keys=True)
    loud = [name for name in _nonzero_additions(net) if not _allowed(allow, name)]
    if loud:
        raise UserError(
            f"Wan has no place for {', '.join(loud[:6])}{', …' if len(loud) > 6 else ''}, which are not zero: "
            "it would be another network; name them in allow to leave them out"
        )
    state = net.state_dict()
    tensors = {theirs: _theirs(ours, state[ours], net.patch) for ours, theirs in pairs.items()}
    save_tensors(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(config)


def names_of(net: VideoDiT, layout: Mapping[str, str] = DIFFUSERS) -> dict[str, str]:
    """Name here → name there, of every tensor that Wan's networks have too."""
    names = {}
    for ours in net.state_dict():
        module, end = (ours[: -len(end)], end) if (end := _ending(ours)) else (ours, "")
        number = re.match(r"blocks\.(\d+)\.", module)
        theirs = layout.get(re.sub(r"^blocks\.\d+\.", "blocks.N.", module))
        if theirs is not None:
            names[ours] = theirs.replace("N", number[1], 1) + end if number else theirs + end
    return names


def _layout(published: Published) -> Mapping[str, str]:
    """The table of the names that stand in it."""
    for layout in (DIFFUSERS, ORIGINAL):
        if f"{layout['time.linear_1']}.weight" in published.read:
            return layout
    raise UserError(
        f"{published.path} holds neither diffusers' nor the original names of a Wan transformer, but "
        f"{', '.join(list(published.read)[:3])}, …; give the transformer's folder or file"
    )


def _ending(name: str) -> str:
    return next((end for end in (".weight", ".bias") if name.endswith(end)), "")


def _ours(name: str, tensor: Tensor, patch: int) -> Tensor:
    if name == "patches.proj.weight":
        return tensor.flatten(1)
    if name.startswith("out."):  # Wan's patches come out channels last
        return rearrange(tensor, "(p c) ... -> (c p) ...", p=patch * patch)
    return tensor[0] if name.endswith(("modulation", "modulation_out")) else tensor


def _theirs(name: str, tensor: Tensor, patch: int) -> Tensor:
    if name == "patches.proj.weight":
        return rearrange(tensor, "d (c p q) -> d c 1 p q", p=patch, q=patch)
    if name.startswith("out."):
        return rearrange(tensor, "(c p) ... -> (p c) ...", p=patch * patch)
    return tensor[None] if name.endswith(("modulation", "modulation_out")) else tensor


def _fitting(net: VideoDiT, published: Published, pairs: Mapping[str, str], allow: Collection[str]) -> dict[str, str]:
    """The pairs whose tensors can be taken over; ValueError for all others that aren't allowed."""
    expected, fitting = net.state_dict(), {}
    wrong = [f"unknown {name}" for name in published.read.keys() - set(pairs.values()) if not _allowed(allow, name)]
    for ours, theirs in pairs.items():
        if theirs not in published.read:
            wrong += [] if _allowed(allow, ours, theirs) else [f"missing {theirs}"]
            continue
        with torch.device("meta"):
            wanted = _theirs(ours, torch.empty(expected[ours].shape), net.patch).shape
        if (got := published.read[theirs]().shape) == wanted:
            fitting[ours] = theirs
        elif not _allowed(allow, ours, theirs):
            wrong.append(f"{theirs} is {tuple(got)}, wanted {tuple(wanted)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(
            f"{published.path} doesn't fit the network: {'; '.join(sorted(wrong)[:8])}{more}; choose the model=… of "
            "these weights, or name in allow what may differ"
        )
    return fitting


def _allowed(allow: Collection[str], *names: str) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in allow)


def _assign(net: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    net.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor))


def _start(net: VideoDiT, names: Collection[str], dtype: torch.dtype) -> None:
    """Memory and a start for the tensors that the file doesn't have: as in a new network, and silent."""
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = net.get_submodule(path)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
    net.zero_init_added_layers()
    for number, block in enumerate(net.blocks):
        if f"blocks.{number}.attention.out.weight" in names:  # a deeper network than the file's
            for leaf in ("attention.out", "text.out", "ffn.2"):
                zero_init_(block.get_submodule(leaf))


def _nonzero_additions(net: VideoDiT) -> list[str]:
    """What Wan's networks lack and is not zero where it enters."""
    quiet = ("labels.", "target_time.linear_2.", "guidance.linear_2.", "input_skip.weights.", "patches.reference.")
    return [
        name
        for name, parameter in net.named_parameters()
        if (name.startswith(quiet) or re.match(r"blocks\.\d+\.audio\.out\.", name)) and parameter.any()
    ]


def _diffusers_config(net: VideoDiT) -> dict[str, Any]:
    image, text = net.image, net.text
    if not isinstance(text, TextProjection):
        raise UserError(f"a network whose text enters by {type(text).__name__}; Wan's enters as an encoder's features")
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, net.patch, net.patch],
        "num_attention_heads": net.heads,
        "attention_head_dim": net.dim // net.heads,
        "in_channels": net.channels + net.extra_in_channels,
        "out_channels": net.channels,
        "text_dim": text.features,
        "freq_dim": net.time.frequencies,
        "ffn_dim": net.ffn,
        "num_layers": net.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None if image is None else image.features,
        "added_kv_proj_dim": None if image is None else net.dim,
    }
