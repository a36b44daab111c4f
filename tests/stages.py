"""Tiny training runs in the state world, in this process with one thread; and bundles of random weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from avatar import cli
from avatar.models import bundle
from avatar.training import fit
from avatar.types import Bundle

QUIET = (
    "threads=1",
    "data.workers=0",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
)
FRAMES = (*QUIET, "data.frames=5", "data.batch=2")  # for objectives that train on frames
ANY_DATA = (
    *QUIET,
    "autoencoder=states",
    "model=states",
    "callbacks=base",
    "++callbacks.ema._target_=avatar.training.callbacks.ema.EMA",
    "++callbacks.ema.decay=0.97",
    "data.buckets.max_latents_per_batch=16",
)
TINY = (*ANY_DATA, "data.train.count=4", "data.train.latents=8", "data.dev.count=2", "data.dev.latents=8")
SMALL_NET = (
    "model.network.dim=24",
    "model.network.ffn=32",
    "model.network.heads=2",
    "model.network.layers=1",
    "model.network.text.dim=24",
    "model.network.text.width=8",
    "model.network.text.layers=1",
)
FILTERS = tuple(f"ignore:{message}" for message in fit.IGNORED_WARNINGS)


def composed(config: str, *overrides: str) -> DictConfig:
    """The config that Hydra composes from these overrides."""
    with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return compose(config, list(overrides))


def fitted(script: str, folder: Path, *overrides: str, tiny: Sequence[str] = TINY) -> Path:
    """Train a tiny run of a stage in `folder` and return its bundle; runs in one parent folder share encoded clips."""
    cfg = composed(script, *tiny, f"folder='{folder}'", f"cache='{folder.parent / 'cache'}'", "name=test", *overrides)
    fit.fit(cfg)
    return folder / f"{cfg.kind}.safetensors"


def random_bundle(path: Path, kind: str, *overrides: str, **changes: Any) -> Path:
    """Write a bundle of a small backbone, like a stage with these overrides, but with random weights.

    With zero-initialised layers all networks would compute the same. `changes` apply to the fields of the bundle or to
    its config ("audio", "text").
    """
    cfg = composed("train", *SMALL_NET, *overrides)
    config: dict[str, Any] = {"network": plain(cfg.model.network), "audio": plain(cfg.audio), "text": plain(cfg.text)}
    config |= {part: changes.pop(part) for part in ("audio", "text") if part in changes}
    fields = {"plan": None if kind == "teacher" else plain(cfg.plan)} | changes
    return write_random(path, kind, config, **fields)


def random_autoencoder(path: Path, channels: int = 4) -> Path:
    """Write a bundle of a small autoencoder of pixels with random weights."""
    target = "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder"
    network = {"_target_": target, "channels": channels, "widths": [4, 4]}
    return write_random(path, "autoencoder", {"network": network})


def write_random(path: Path, kind: str, config: Mapping[str, Any], **fields: Any) -> Path:
    """Write a bundle of the network that a config builds, with noise added to its initial weights."""
    torch.manual_seed(0)
    state = bundle.new(config["network"]).state_dict()
    weights = {name: w + 0.1 * torch.randn_like(w).abs() for name, w in state.items()}
    bundle.write(Bundle(kind, weights, config, **fields), path)
    return path


def plain(config: DictConfig) -> Any:
    """A part of a config as dicts and lists, as bundles store it."""
    return OmegaConf.to_container(config, resolve=True)
