"""The training run: `fit` builds data, objective, callbacks and loggers from a resolved config and trains them."""

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from avatar.errors import UserError, require_int
from avatar.files import create_folder, write_text, writing
from avatar.models import bundle, registry
from avatar.models.transforms.apply import apply_transforms
from avatar.models.video_dit import VideoDiT
from avatar.process import bf16_cost, choose_device, set_up_torch
from avatar.protocols import LatentData, TrainingData
from avatar.provenance import git_revision
from avatar.training import checks, run_checkpoint

# Lightning's warnings about things that are intended here: the loader returns complete batches, frozen networks stay in
# eval mode, and the folder of a resumed run contains its metrics.
IGNORED_WARNINGS = (
    ".*does not have many workers",
    ".*in eval mode",
    ".*but have no `validation_step`",
    ".*exists and is not empty",
    ".*isinstance.treespec",
    ".*is not resumable",
)


def fit(cfg: DictConfig) -> None:
    """Train an objective as its config says, and write checkpoints, metrics and a bundle into `cfg.folder`.

        python train.py objective=flow_matching steps=3000 seed=1

    Args:
        cfg: a config of train.py or distill.py.

    Raises:
        UserError: invalid settings, before anything is encoded or written; later, for NaN or unreadable samples.
        KeyboardInterrupt: after a signal, when a checkpoint has been saved; its argument is the signal.
    """
    import lightning  # slow to import, and only training needs it

    settings = OmegaConf.to_yaml(cfg, resolve=True)  # raises for missing values
    require_int(1, steps=cfg.steps)
    require_int(0, seed=cfg.seed)
    set_up_torch(cfg.threads)
    if choose_device(cfg.device).index is not None:  # Lightning chooses by trainer.accelerator
        raise UserError(
            f"got device={cfg.device}; expected auto, cpu, cuda or mps: choose a GPU by trainer.devices=[N]"
        )
    silence_lightning()
    lightning.seed_everything(cfg.seed, verbose=False)
    checks.check_folder(cfg)
    data: TrainingData = hydra.utils.instantiate(cfg.data)
    objective = hydra.utils.instantiate(cfg.objective)
    if isinstance(data, LatentData):
        if (world := getattr(data, "world", None)) is not None:  # data of real videos have no puppet world
            checks.check_puppet(world, data.autoencoder)
        built = {part: getattr(data, part) for part in bundle.ENCODERS}
        for net in objective.children():
            if hasattr(net, "origin"):
                bundle.check_latents(net, data.autoencoder)  # pyright: ignore[reportArgumentType]
                bundle.check_encoders(net, encoders(cfg), built)
            if isinstance(net, VideoDiT):
                checks.check_inputs(net, data.autoencoder, data.audio, data.text, data.image, data.sizes())
    checks.check_regions(objective, data)
    checks.check_optimizers(objective)
    # Without _convert_="all", nested dataclasses would remain configs.
    apply_transforms(objective, hydra.utils.instantiate(cfg.transforms, _convert_="all"))
    resume = cfg.resume
    if resume == "last":
        resume = run_checkpoint.newest(Path(cfg.folder, "checkpoints"))
    if resume is not None:
        checks.check_resumable(resume, objective)
    trainer = hydra.utils.instantiate(
        cfg.trainer,
        callbacks=list(hydra.utils.instantiate(cfg.callbacks).values()),
        logger=list(hydra.utils.instantiate(cfg.logger).values()),
    )
    checks.check_accumulation(trainer, objective, data)
    data.check(trainer.world_size)
    _open_folder(Path(cfg.folder), settings)
    if trainer.is_global_zero:
        print(data.describe_batch(trainer.world_size))
        streamed = data if isinstance(data, LatentData) and cfg.kind in ("causal_teacher", "student") else None
        if streamed is not None and (note := checks.window_note(cfg.plan.window, streamed.buckets.lengths)):
            print(note)
        bf16_on_cpu = trainer.strategy.root_device.type == "cpu" and "bf16" in str(cfg.trainer.precision)
        if bf16_on_cpu and (note := checks.precision_note(cfg.trainer.precision, bf16_cost())):
            print(note)
    try:
        trainer.fit(objective, data, ckpt_path=resume, weights_only=True)
    except SystemExit as stop:  # Lightning exits so after a signal, when the callbacks have saved
        received = stop.__context__.args if isinstance(stop.__context__, KeyboardInterrupt) else (signal.SIGTERM,)
        number = signal.Signals(received[0] if received else signal.SIGINT)
        if trainer.is_global_zero and (saved := getattr(trainer.checkpoint_callback, "last_model_path", "")):
            print(f"stopped by {number.name}; continue with resume={saved}", file=sys.stderr)
        raise KeyboardInterrupt(number) from stop
    except Exception:
        if trainer.strategy.launcher is not None:  # the ranks that this process launched might wait for it
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise


def encoders(cfg: DictConfig) -> dict[str, Any]:
    """The config of each encoder by its registered name, as bundles record it."""
    parts = OmegaConf.create({part: cfg[part] for part in bundle.ENCODERS})
    return registry.registered(OmegaConf.to_container(parts, resolve=True))


def _open_folder(folder: Path, settings: str) -> None:
    """On rank 0, create the run's folder, write its config, and append the code's revision, one line per start."""
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank:
        return
    create_folder(folder)
    write_text(folder / "config.yaml", settings)
    with writing(folder), (folder / "revision.txt").open("a") as file:
        file.write(f"{git_revision() or 'unknown'}\n")


def silence_lightning() -> None:
    """Silence Lightning's messages below warnings, and the warnings in IGNORED_WARNINGS."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
