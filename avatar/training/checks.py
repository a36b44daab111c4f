"""Checks of a training run before anything is encoded or written: inputs, folder, batches, optimisers, checkpoint."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from avatar.errors import ExistingFileError, UserError
from avatar.models.autoencoders.state import StateAutoencoder
from avatar.models.video_dit import VideoDiT
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, TrainingData, VideoAutoencoder
from avatar.puppet.worlds import StateWorld, World
from avatar.training import run_checkpoint


def check_inputs(
    net: VideoDiT,
    autoencoder: VideoAutoencoder,
    audio: AudioEncoder,
    text: TextEncoder,
    image: ImageEncoder | None,
    sizes: Collection,
) -> None:
    """Raise UserError unless a network can read what these make, in latents of these heights and widths."""
    net.check_inputs(autoencoder, audio, image)
    net.check_shapes(audio.num_layers, text.encode([""])[0], sizes)


def check_puppet(world: World, autoencoder: VideoAutoencoder) -> None:
    """Raise UserError unless an autoencoder encodes what these puppets are: states, or pixels its stride divides."""
    if isinstance(world, StateWorld) != isinstance(autoencoder, StateAutoencoder):
        raise UserError(
            f"puppets of {type(world).__name__} with a {type(autoencoder).__name__}; puppet=states and "
            "autoencoder=states go together: leave out puppet=, which follows from autoencoder="
        )
    if any(side % autoencoder.spatial_stride for side in world.shape):
        raise UserError(
            f"puppets of {world.shape[0]} pixels with an autoencoder of spatial stride {autoencoder.spatial_stride}; "
            "choose a multiple: puppet=64px, 128px or 256px"
        )


def window_note(window: int, lengths: Collection[int]) -> str | None:
    """What to say of a plan whose window no clip of training fills: a stream will look back further."""
    if window <= max(lengths):
        return None
    return (
        f"plan.window={window} latents, but clips of training have {max(lengths)} at most: a stream will look back "
        "further than training did; raise data.buckets.lengths, or lower plan.window"
    )


def check_folder(cfg: DictConfig) -> None:
    """Raise an error for a folder that can't be this run's; the first rank opens it when nothing else is wrong."""
    from lightning.pytorch.utilities import rank_zero_only

    _check_shared_folder(cfg)
    if cfg.resume is None and not rank_zero_only.rank and Path(cfg.folder, "config.yaml").exists():
        raise ExistingFileError(
            f"{cfg.folder} holds a run already, which is not overwritten; give another folder=, or resume= to go on "
            "with it"
        )


def _check_shared_folder(cfg: DictConfig) -> None:
    """Raise UserError where each of several processes would have a folder named by the second it began in."""
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) == 1 or not HydraConfig.initialized():
        return
    hydra_config = HydraConfig.get()
    named = any(override.startswith("hydra.run.dir=") for override in hydra_config.overrides.hydra)
    named = named or hydra_config.mode == RunMode.MULTIRUN  # by the one that launched them all
    if cfg.folder == hydra_config.runtime.output_dir and not named:
        raise UserError(f"processes that share no folder, here {cfg.folder}; name one for all: folder=outputs/NAME")


def check_accumulation(trainer: Any, objective: Any, data: TrainingData) -> None:
    """Raise UserError unless a run is one pass over its batches, and an update comes after as many passes as its batch
    is shared out among."""
    if trainer.max_epochs != 1:
        raise UserError(f"trainer.max_epochs={trainer.max_epochs}; a run is of `steps` batches: raise steps")
    passes = trainer.accumulate_grad_batches if objective.automatic_optimization else objective.accumulate
    if passes != data.accumulate:
        raise UserError(
            f"an update after {passes} passes, but batches shared out among {data.accumulate}; set both by one: "
            f"accumulate={max(passes, data.accumulate)}"
        )


def check_regions(objective: Any, data: TrainingData) -> None:
    """Raise UserError where a region is to count more, and no training sample has a mask of it."""
    for name in objective.region_weights.regions:
        if name not in data.regions:
            raise UserError(
                f"objective.region_weights.{name}={getattr(objective.region_weights, name)}, but no training sample "
                f"has a mask of its {name}; set objective.region_weights.{name}=0, or prepare the videos with a face "
                "detector: detectors.face, see data/README.md"
            )


def check_optimizers(objective: Any) -> None:
    """Raise UserError for settings that an optimiser refuses, before hours of encoding."""
    try:
        objective.configure_optimizers()
    except (TypeError, ValueError) as error:
        raise UserError(f"an optimiser refuses its settings ({error}); check objective.optimizer") from error


def check_resumable(path: str | Path, objective: torch.nn.Module) -> None:
    """Raise UserError for a checkpoint that isn't one of this objective and these networks."""
    wanted = f"give a .ckpt of this run's checkpoints folder, and the arguments of that run; got resume={path}"
    try:
        saved = run_checkpoint.shapes(Path(path))
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; {wanted}") from error
    own = {name: weight.shape for name, weight in objective.state_dict().items()}
    saved = {name: shape for name, shape in saved.items() if not name.startswith(run_checkpoint.AVERAGE)}
    strange = sorted(own.keys() ^ saved.keys()) or [name for name in own if own[name] != saved[name]]
    if strange:
        raise UserError(f"a checkpoint of other networks, different in {', '.join(strange[:3])}; {wanted}")
