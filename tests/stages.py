"""Stages run in this process, as the scripts run them: in the state world, small, with one thread."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from avatar import run

TINY = (
    "world=states",
    "model=states",
    "callbacks=base",
    "++callbacks.ema._target_=avatar.callbacks.ema.EMA",
    "++callbacks.ema.decay=0.97",
    "threads=1",
    "data.workers=0",
    "data.train.count=4",
    "data.train.latents=8",
    "data.dev.count=2",
    "data.dev.latents=8",
    "data.buckets.budget=16",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
)
FILTERS = tuple(f"ignore:{message}" for message in run.HARMLESS)


def composed(config: str, *overrides: str) -> DictConfig:
    """A config as Hydra makes it of these overrides."""
    with initialize_config_dir(run.CONFIGS, version_base="1.3"):
        return compose(config, list(overrides))


def fitted(script: str, folder: Path, *overrides: str) -> Path:
    """The bundle of a stage's tiny run into `folder`; clips are shared with the runs beside it."""
    cfg = composed(script, *TINY, f"folder='{folder}'", f"cache='{folder.parent / 'cache'}'", "name=test", *overrides)
    run.fit(cfg)
    return folder / f"{cfg.kind}.safetensors"
