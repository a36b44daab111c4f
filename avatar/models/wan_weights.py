"""Convert Wan transformer checkpoints (diffusers, original, Self-Forcing/CausVid `.pt`) to and from this backbone.

    Wan 2.1 T2V / I2V, Wan 2.2 TI2V        a folder of safetensors with an index, or one .safetensors file
    Self-Forcing, CausVid, Causal-Forcing  a .pt file with the original names under `generator_ema` or `generator`

Tensors are read one by one into a network on the meta device, so peak memory is the network and one tensor. Tensors
stored in the requested precision are memory-mapped, as in a bundle. Layers that Wan lacks (audio, labels, reference
channels, …) are zero-initialised, so a loaded model is unchanged.
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
from avatar.models.weight_files import LazyTensors, open_weights
from avatar.nn.attention import zero_init_
from avatar.nn.embeddings import TextProjection

# Module names: here, in diffusers' layout, in the original layout. N is the number of a block.
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
    """Load a backbone with the weights of a Wan checkpoint, or build one with fresh weights.

        load(network, "Wan2.1-T2V-1.3B-Diffusers/transformer", dtype="bfloat16")

    Args:
        network: config of a VideoDiT, `_target_` and constructor arguments.
        weights: path of a folder or file, see the module's docstring; None: fresh weights.
        kind: kind of the network's origin: "teacher", or "student" for a causal few-step network.
        dtype: precision of the parameters, for files of any precision: "float32", "bfloat16" or "float16".
        allow: patterns (`*`) of tensor names, of the file or the network, that may be unknown, missing or of another
            shape; parameters of the network that the file lacks are initialised.

    Raises:
        MissingFileError: no such path.
        UserError: another `kind` or `dtype`, a damaged file, or tensors that don't match, each by its name.
    """
    for name, given, choices in (("kind", kind, bundle.KINDS), ("dtype", dtype, DTYPES)):
        if given not in choices:
            raise UserError(f"got {name}={given!r}; expected one of {', '.join(choices)}: change it")
    if weights is None:
        fresh = bundle.new(network)
        fresh.origin = replace(bundle.origin_of(fresh), kind=kind)
        return fresh.to(DTYPES[dtype])
    files = open_weights(Path(weights))
    with torch.device("meta"):
        net: VideoDiT = bundle.new(network)
    if not isinstance(net.text, TextProjection):
        raise UserError(
            f"got model.network.text={type(net.text).__name__}; expected a TextProjection, since Wan takes "
            "features of a text encoder: choose a Wan model=…"
        )
    found = _matching_names(net, files, allow)
    _init_missing(net, [name for name in net.state_dict() if name not in found], DTYPES[dtype])
    for ours, theirs in found.items():
        tensor = _from_wan(ours, files.read[theirs](), net.patch)
        _set_parameter(net, ours, tensor.to(DTYPES[dtype]))
    origin = bundle.origin_of(net)
    net.origin = replace(origin, kind=kind, fingerprint=bundle.fingerprint(net.state_dict()))  # pyright: ignore
    return net.eval()


def export(net: VideoDiT, folder: Path, allow: Collection[str] = ()) -> None:
    """Write the network in diffusers' `WanTransformer3DModel` format: config.json and one safetensors file.

    Args:
        net: a network of Wan's architecture; its text is embedded by a TextProjection.
        folder: path of the output, missing or empty.
        allow: patterns (`*`) of parameters that Wan lacks and that are left out although they aren't zero.

    Raises:
        UserError: layers that Wan lacks aren't zero, so the exported network would differ; or another text embedder.
        ExistingFileError: the folder isn't empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ExistingFileError(f"{folder} isn't empty, and nothing in it is overwritten; choose another folder")
    pairs, config = names_of(net, DIFFUSERS), json.dumps(_diffusers_config(net), indent=2, sort_keys=True)
    nonzero = [name for name in _nonzero_additions(net) if not _allowed(allow, name)]
    if nonzero:
        raise UserError(
            f"got nonzero {', '.join(nonzero[:6])}{', …' if len(nonzero) > 6 else ''}; expected zero in layers that "
            "Wan lacks, or the exported network would differ: add them to allow to leave them out"
        )
    state = net.state_dict()
    tensors = {theirs: _to_wan(ours, state[ours], net.patch) for ours, theirs in pairs.items()}
    save_tensors(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(config)


def names_of(net: VideoDiT, layout: Mapping[str, str] = DIFFUSERS) -> dict[str, str]:
    """Tensor names here → names in a layout, for all tensors that Wan's networks have too."""
    names = {}
    for ours in net.state_dict():
        module, suffix = (ours[: -len(suffix)], suffix) if (suffix := _suffix(ours)) else (ours, "")
        number = re.match(r"blocks\.(\d+)\.", module)
        theirs = layout.get(re.sub(r"^blocks\.\d+\.", "blocks.N.", module))
        if theirs is not None:
            names[ours] = theirs.replace("N", number[1], 1) + suffix if number else theirs + suffix
    return names


def _layout(files: LazyTensors) -> Mapping[str, str]:
    """The layout of the names in the files."""
    for layout in (DIFFUSERS, ORIGINAL):
        if f"{layout['time.linear_1']}.weight" in files.read:
            return layout
    raise UserError(
        f"got {', '.join(list(files.read)[:3])}, … in {files.path}; expected diffusers' or the original names of a Wan "
        "transformer: give the transformer's folder or file"
    )


def _suffix(name: str) -> str:
    return next((suffix for suffix in (".weight", ".bias") if name.endswith(suffix)), "")


def _from_wan(name: str, tensor: Tensor, patch: int) -> Tensor:
    if name == "patches.proj.weight":
        return tensor.flatten(1)
    if name.startswith("out."):  # Wan's output patches are channels-last
        return rearrange(tensor, "(p c) ... -> (c p) ...", p=patch * patch)
    return tensor[0] if name.endswith(("modulation", "modulation_out")) else tensor


def _to_wan(name: str, tensor: Tensor, patch: int) -> Tensor:
    if name == "patches.proj.weight":
        return rearrange(tensor, "d (c p q) -> d c 1 p q", p=patch, q=patch)
    if name.startswith("out."):
        return rearrange(tensor, "(c p) ... -> (p c) ...", p=patch * patch)
    return tensor[None] if name.endswith(("modulation", "modulation_out")) else tensor


def _matching_names(net: VideoDiT, files: LazyTensors, allow: Collection[str]) -> dict[str, str]:
    """Name here → name in the files, for tensors of the right shape. Raises UserError for others not in `allow`."""
    pairs, parameters = names_of(net, _layout(files)), net.state_dict()
    allowed = {theirs for ours, theirs in pairs.items() if _allowed(allow, ours, theirs)}
    allowed |= {name for name in files.read.keys() - set(pairs.values()) if _allowed(allow, name)}
    with torch.device("meta"):
        expected = {pairs[ours]: _to_wan(ours, torch.empty(parameters[ours].shape), net.patch) for ours in pairs}
    got = {name: torch.empty(read().shape, device="meta") for name, read in files.read.items()}
    wrong = bundle.state_dict_mismatches(
        {name: tensor for name, tensor in expected.items() if name not in allowed},
        {name: tensor for name, tensor in got.items() if name not in allowed},
    )
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(
            f"{files.path} does not match the network: {'; '.join(wrong[:8])}{more}; choose the model=… of these "
            "weights, or add the names that may differ to allow"
        )
    return {ours: name for ours, name in pairs.items() if name in got and got[name].shape == expected[name].shape}


def _allowed(allow: Collection[str], *names: str) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in allow)


def _set_parameter(net: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    net.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor))


def _init_missing(net: VideoDiT, names: Collection[str], dtype: torch.dtype) -> None:
    """Allocate and initialise the parameters that the file lacks; added layers and blocks are zero-initialised."""
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = net.get_submodule(path)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
    net.zero_init_added_layers()
    for number, block in enumerate(net.blocks):
        if f"blocks.{number}.attention.out.weight" in names:  # the network has more blocks than the file
            for leaf in ("attention.out", "text.out", "ffn.2"):
                zero_init_(block.get_submodule(leaf))


def _nonzero_additions(net: VideoDiT) -> list[str]:
    """Names of parameters that Wan lacks and that change the output because they aren't zero."""
    added = ("labels.", "target_time.linear_2.", "guidance.linear_2.", "input_skip.weights.", "patches.reference.")
    return [
        name
        for name, parameter in net.named_parameters()
        if (name.startswith(added) or re.match(r"blocks\.\d+\.audio\.out\.", name)) and parameter.any()
    ]


def _diffusers_config(net: VideoDiT) -> dict[str, Any]:
    image, text = net.image, net.text
    if not isinstance(text, TextProjection):
        raise UserError(
            f"got a network with text={type(text).__name__}; expected a TextProjection, as in Wan: only "
            "such networks can be exported"
        )
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
