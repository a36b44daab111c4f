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
from avatar.objectives.optim import trainable_parameters
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
    """Raise UserError unless a network can read the outputs of these components.

    Args:
        net: the network.
        autoencoder, audio, text, image: the components of its data; image is None without an image encoder.
        sizes: heights and widths of the latents.

    Raises:
        UserError: channels, strides, feature sizes, prompts or latent sizes that don't fit the network.
    """
    net.check_inputs(autoencoder, audio, image)
    net.check_shapes(audio.num_layers, text.encode([""])[0], sizes)


def check_puppet(world: World, autoencoder: VideoAutoencoder) -> None:
    """Raise UserError unless the autoencoder fits the puppets: both of states, or a stride that divides the size."""
    if isinstance(world, StateWorld) != isinstance(autoencoder, StateAutoencoder):
        raise UserError(
            f"got puppets of {type(world).__name__} with a {type(autoencoder).__name__}; expected puppet=states only "
            "with autoencoder=states: leave out puppet=, which follows from autoencoder="
        )
    if any(side % autoencoder.spatial_stride for side in world.shape):
        raise UserError(
            f"got puppets of {world.shape[0]} pixels with an autoencoder of spatial stride "
            f"{autoencoder.spatial_stride}; expected a multiple of it: choose puppet=64px, 128px or 256px"
        )


def window_note(window: int, lengths: Collection[int]) -> str | None:
    """A note for a plan whose window is longer than every training clip, else None.

    Args:
        window: latents that a chunk attends to.
        lengths: latents per training clip.
    """
    if window <= max(lengths):
        return None
    return (
        f"plan.window={window} latents, but training clips have at most {max(lengths)}: a stream will attend to "
        "latents further back than in training; raise data.buckets.lengths or lower plan.window"
    )


def precision_note(precision: object, cost: float) -> str | None:
    """A note for training in bf16 on a CPU that multiplies fp32 faster, else None.

    Args:
        precision: of the trainer.
        cost: time of a matrix product in bf16 ÷ in fp32.
    """
    if cost < 1.5:
        return None
    return (
        f"trainer.precision={precision}, but this CPU takes about {cost:.0f} times as long for a product in bf16 as in "
        "fp32: trainer.precision=32-true is faster"
    )


def check_folder(cfg: DictConfig) -> None:
    """Raise UserError for a folder that this run can't use. It is created later, after all other checks."""
    from lightning.pytorch.utilities import rank_zero_only

    _check_shared_folder(cfg)
    if cfg.resume is None and not rank_zero_only.rank and Path(cfg.folder, "config.yaml").exists():
        raise ExistingFileError(
            f"{cfg.folder} contains a run, which is not overwritten; give another folder=, or resume= to continue it"
        )


def _check_shared_folder(cfg: DictConfig) -> None:
    """Raise UserError if processes started separately would use different folders, named by their starting times."""
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) == 1 or not HydraConfig.initialized():
        return
    hydra_config = HydraConfig.get()
    named = any(override.startswith("hydra.run.dir=") for override in hydra_config.overrides.hydra)
    named = named or hydra_config.mode == RunMode.MULTIRUN  # the launching process has named it for all
    if cfg.folder == hydra_config.runtime.output_dir and not named:
        raise UserError(
            f"got a folder per process, such as {cfg.folder}; expected one for all: give folder=outputs/NAME"
        )


def check_accumulation(trainer: Any, objective: Any, data: TrainingData) -> None:
    """Raise UserError unless a run is one epoch, and trainer and data agree on the micro-batches per update."""
    if trainer.max_epochs != 1:
        raise UserError(f"trainer.max_epochs={trainer.max_epochs}; expected 1, of `steps` batches: raise steps")
    accumulate = trainer.accumulate_grad_batches if objective.automatic_optimization else objective.accumulate
    if accumulate != data.accumulate:
        raise UserError(
            f"got {accumulate} micro-batches per update and batches split into {data.accumulate}; expected equal "
            f"numbers: set both by accumulate={max(accumulate, data.accumulate)}"
        )


def check_regions(objective: Any, data: TrainingData) -> None:
    """Raise UserError for a region that has extra loss weight, if no training sample has a mask of it."""
    for name in objective.region_weights.regions:
        if name not in data.regions:
            raise UserError(
                f"objective.region_weights.{name}={getattr(objective.region_weights, name)}, but no training sample "
                f"has a mask of its {name}; set objective.region_weights.{name}=0, or preprocess the videos with a "
                "face detector: detectors.face, see data/README.md"
            )


def check_optimizers(objective: Any) -> None:
    """Raise UserError for invalid settings of an optimiser, before hours of encoding."""
    for name, net in (("optimizer", "net"), ("critic_optimizer", "critic")):
        if (build := getattr(objective, name, None)) is None:
            continue
        try:
            build(trainable_parameters(getattr(objective, net)))
        except (TypeError, ValueError) as error:
            raise UserError(f"can't build an optimiser ({error}); check objective.{name}") from error
    objective.configure_optimizers()


def check_resumable(path: str | Path, objective: torch.nn.Module) -> None:
    """Raise UserError for a checkpoint of another objective or of other networks.

    Args:
        path: a checkpoint file or folder.
        objective: the objective that will load it.
    """
    fix = f"give a .ckpt from this run's checkpoints folder and the arguments of that run; got resume={path}"
    try:
        saved = run_checkpoint.read_shapes(Path(path))
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; {fix}") from error
    own = {name: weight.shape for name, weight in objective.state_dict().items()}
    saved = {name: shape for name, shape in saved.items() if not name.startswith(run_checkpoint.AVERAGE)}
    different = sorted(own.keys() ^ saved.keys()) or [name for name in own if own[name] != saved[name]]
    if different:
        raise UserError(f"the checkpoint's networks differ from this run's in {', '.join(different[:3])}; {fix}")
