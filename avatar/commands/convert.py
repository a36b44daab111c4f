"""Conversion of published weights to a bundle, and of a bundle to diffusers' layout.

python -m avatar convert model=wan_1_3b model.weights=Wan2.1-T2V-1.3B-Diffusers/transformer out=wan/teacher.safetensors
python -m avatar convert bundle=wan/teacher.safetensors out=wan/transformer
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from avatar.errors import ExistingFileError, UserError
from avatar.models import bundle, registry, wan_weights
from avatar.models.video_dit import VideoDiT
from avatar.training import fit
from avatar.types import Bundle


def convert(cfg: DictConfig) -> None:
    """Write the bundle `cfg.out` from `cfg.model.weights`, or a folder in diffusers' layout from `cfg.bundle`.

    Args:
        cfg: config `convert`, whose comments describe each setting.

    Raises:
        UserError: missing or unreadable weights, encoders that don't fit the network, an existing `cfg.out`.
    """
    out = Path(cfg.out)
    if cfg.bundle is None:
        _to_bundle(cfg, out)
    else:
        net = bundle.load(cfg.bundle)
        if not isinstance(net, VideoDiT):
            raise UserError(
                f"got {cfg.bundle}, a bundle of a {type(net).__name__}; expected one of a backbone (VideoDiT): give "
                "another bundle="
            )
        wan_weights.export(net, out, cfg.allow)
    print(out)


def _to_bundle(cfg: DictConfig, out: Path) -> None:
    if OmegaConf.select(cfg, "model.weights") is None:
        raise UserError("no weights to convert; give model.weights=FOLDER_OR_FILE and a model= that has this setting")
    if out.suffix != ".safetensors":
        raise UserError(f"out={out}; expected a name that ends in .safetensors")
    if out.exists():
        raise ExistingFileError(f"{out} exists and is not overwritten; give another out=")
    encoders = fit.encoders(cfg)
    _check_encoders(cfg.model.network, encoders)
    net = hydra.utils.instantiate(cfg.model)
    origin = bundle.origin_of(net)
    plan = OmegaConf.to_container(cfg.plan, resolve=True) if origin.kind == "student" else None
    config = {**encoders, "network": origin.network}
    bundle.write(Bundle(origin.kind, net.state_dict(), config, {}, plan), out)  # pyright: ignore[reportArgumentType]


def _check_encoders(network: DictConfig, encoders: Mapping[str, Any]) -> None:
    """Raise UserError for encoders that don't fit the network, as far as that can be checked without their weights."""
    with torch.device("meta"):
        net: VideoDiT = bundle.new(network)
    if (net.image is None) != (encoders["image"] is None):
        raise UserError(
            f"got {'an' if encoders['image'] else 'no'} image encoder for a network "
            f"{'without' if net.image is None else 'with'} an image projection; image-to-video networks need "
            "image_encoder=clip, others image_encoder=none"
        )
    built = {
        part: registry.build(config, registry.PARTS[part])
        for part, config in encoders.items()
        if bundle.has_no_weights(config)
    }
    if "audio" in built and net.strides is not None:
        net.check_audio(built["audio"], net.strides[0])
    if "text" in built:
        net.text.check(built["text"].encode([""])[0])
