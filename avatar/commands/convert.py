"""Published weights to a bundle, which every other command takes, and a bundle back to diffusers' layout.

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
    """Write `cfg.out` from `cfg.model.weights`, or from `cfg.bundle` if that is given."""
    out = Path(cfg.out)
    if cfg.bundle is None:
        _to_bundle(cfg, out)
    else:
        net = bundle.load(cfg.bundle)
        if not isinstance(net, VideoDiT):
            raise UserError(f"{cfg.bundle} holds a {type(net).__name__}; diffusers' layout is for backbones")
        wan_weights.export(net, out, cfg.allow)
    print(out)


def _to_bundle(cfg: DictConfig, out: Path) -> None:
    if OmegaConf.select(cfg, "model.weights") is None:
        raise UserError("no weights to convert; give model.weights=FOLDER_OR_FILE with a model= that takes them")
    if out.suffix != ".safetensors":
        raise UserError(f"a bundle named {out}; give out= a name that ends in .safetensors")
    if out.exists():
        raise ExistingFileError(f"{out} exists, and is not overwritten; give another out=")
    encoders = fit.encoders(cfg)
    _check_encoders(cfg.model.network, encoders)
    net = hydra.utils.instantiate(cfg.model)
    origin = bundle.origin_of(net)
    plan = OmegaConf.to_container(cfg.plan, resolve=True) if origin.kind == "student" else None
    config = {**encoders, "network": origin.network}
    bundle.write(Bundle(origin.kind, net.state_dict(), config, {}, plan), out)  # pyright: ignore[reportArgumentType]


def _check_encoders(network: DictConfig, encoders: Mapping[str, Any]) -> None:
    """Raise UserError for what its encoders make and the network can't take, as far as they tell without weights."""
    with torch.device("meta"):
        net: VideoDiT = bundle.new(network)
    if (net.image is None) != (encoders["image"] is None):
        raise UserError(
            f"{'an' if encoders['image'] else 'no'} image encoder for a network that takes "
            f"{'none' if net.image is None else 'its features'}; image-to-video networks need one "
            "(image_encoder=clip), others none (image_encoder=none)"
        )
    made = {
        part: registry.build(config, registry.PARTS[part])
        for part, config in encoders.items()
        if bundle.has_no_weights(config)
    }
    if "audio" in made and net.strides is not None:
        net.check_audio(made["audio"], net.strides[0])
    if "text" in made:
        net.text.check(made["text"].encode([""])[0])
