"""What train.py, distill.py and infer.py share: one run from a resolved config, and how its mistakes are told.

Exit codes: 0 done, 2 the user's mistake (one line on stderr says what was got, wanted, and how to mend it; with
AVATAR_TRACEBACK=1 in the environment the traceback stands before it), 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1.
"""

import ctypes
import functools
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from avatar.models import bundle
from avatar.models.transforms import prepare
from avatar.models.video_dit import VideoDiT
from avatar.protocols import AudioEncoder, ImageEncoder, LatentData, TextEncoder, TrainingData, VideoAutoencoder
from avatar.provenance import git_revision
from avatar.training import run_checkpoint

CONFIGS = str(Path(__file__).parent.parent / "configs")

# What Lightning would have a user know is no mistake here: batches are ready made, frozen networks stay frozen, and
# a folder that is resumed has its metrics already.
HARMLESS = (
    ".*does not have many workers",
    ".*in eval mode",
    ".*but have no `validation_step`",
    ".*exists and is not empty",
    ".*isinstance.treespec",
    ".*is not resumable",
)
MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)  # of the user; all else is ours


def main(config: str, task: Callable[[DictConfig], None]) -> None:
    """Run a task under Hydra with the config of this name; mistakes become one line and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed and swallowed

    @functools.wraps(task)
    def told(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except MISTAKES as error:  # caught inside, before Hydra adds lines of its own
            _tell(error)

    try:
        hydra.main(config_path=CONFIGS, config_name=config, version_base="1.3")(told)()
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except MISTAKES as error:
        _tell(error)


def fit(cfg: DictConfig) -> None:
    """One training run: data, objective, callbacks and loggers from the config, checkpoints and a bundle in its
    folder."""
    import lightning  # takes longer than all else together, and only training needs it

    settings = OmegaConf.to_yaml(cfg, resolve=True)  # which tells what is missing
    check_whole(1, steps=cfg.steps)
    check_whole(0, seed=cfg.seed)
    prepare_torch(cfg.threads)
    quieten()
    lightning.seed_everything(cfg.seed, verbose=False)
    _check_folder(cfg)
    data: TrainingData = hydra.utils.instantiate(cfg.data)
    objective = hydra.utils.instantiate(cfg.objective)
    if isinstance(data, LatentData):
        made = {part: getattr(data, part) for part in bundle.ENCODERS}
        for net in objective.children():
            if hasattr(net, "origin"):
                bundle.check_latents(net, data.autoencoder)  # pyright: ignore[reportArgumentType]
                bundle.check_encoders(net, encoders(cfg), made)
            if isinstance(net, VideoDiT):
                check_fit(net, data.autoencoder, data.audio, data.text, data.image, data.sizes())
    _check_regions(objective, data)
    _check_optimizers(objective)
    # Dataclasses would otherwise come back as configs.
    prepare(objective, hydra.utils.instantiate(cfg.prepare, _convert_="all"))
    resume = cfg.resume
    if resume == "last":
        resume = run_checkpoint.newest(Path(cfg.folder, "checkpoints"))
    if resume is not None:
        _check_resumable(resume, objective)
    trainer = hydra.utils.instantiate(
        cfg.trainer,
        callbacks=list(hydra.utils.instantiate(cfg.callbacks).values()),
        logger=list(hydra.utils.instantiate(cfg.logger).values()),
    )
    _check_passes(trainer, objective, data)
    data.check(trainer.world_size)
    _open_folder(Path(cfg.folder), settings)
    if trainer.is_global_zero:
        print(data.told(trainer.world_size))
        streamed = data if isinstance(data, LatentData) and cfg.kind in ("causal_teacher", "student") else None
        if streamed is not None and (note := unseen(cfg.plan.window, streamed.buckets.lengths)):
            print(note)
    try:
        trainer.fit(objective, data, ckpt_path=resume, weights_only=True)
    except SystemExit as stop:  # how Lightning leaves after a signal, when callbacks have saved what they save
        asked = stop.__context__.args if isinstance(stop.__context__, KeyboardInterrupt) else (signal.SIGTERM,)
        number = signal.Signals(asked[0] if asked else signal.SIGINT)
        if trainer.is_global_zero and (saved := getattr(trainer.checkpoint_callback, "last_model_path", "")):
            print(f"stopped by {number.name}; go on with resume={saved}", file=sys.stderr)
        raise KeyboardInterrupt(number) from stop
    except Exception:
        if trainer.strategy.launcher is not None:  # the ranks that this one started may wait for it for long
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise


def check_fit(
    net: VideoDiT,
    autoencoder: VideoAutoencoder,
    audio: AudioEncoder,
    text: TextEncoder,
    image: ImageEncoder | None,
    sizes: Collection,
) -> None:
    """Raise ValueError unless a network can read what these make, in latents of these heights and widths."""
    net.check_inputs(autoencoder, audio, image)
    net.check_forms(audio.states, text.encode([""])[0], sizes)


def unseen(window: int, lengths: Collection[int]) -> str | None:
    """What to say of a plan whose window no clip of training fills: a stream will look back further."""
    if window <= max(lengths):
        return None
    return (
        f"plan.window={window} latents, but clips of training have {max(lengths)} at most: a stream will look back "
        "further than training did; raise data.buckets.lengths, or lower plan.window"
    )


def encoders(cfg: DictConfig) -> dict[str, Any]:
    """The parts of a config that a trained network needs beside itself, as its bundle keeps them."""
    parts = OmegaConf.create({part: cfg[part] for part in bundle.ENCODERS})
    return OmegaConf.to_container(parts, resolve=True)  # pyright: ignore[reportReturnType]


def check_whole(least: int, **values: object) -> None:
    """Raise ValueError for a setting that is no whole number from `least` on."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value}; wanted a whole number from {least} on, such as {name}={least + 1}")


def check_text(**values: object) -> None:
    """Raise ValueError for a setting that is no text."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}={value}; wanted a text, such as \"{name}='...'\"")


def prepare_torch(threads: object) -> None:
    """Torch on so many CPU threads (None: as it is), and memory that is kept."""
    if threads is not None:
        check_whole(1, threads=threads)
        torch.set_num_threads(threads)  # pyright: ignore[reportArgumentType]
    keep_memory()


def keep_memory() -> None:
    """Let glibc keep freed memory: by default it returns large blocks at once, and half the time goes to page
    faults."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
        mallopt(trim_threshold, most)
        mallopt(mmap_threshold, 2**25)  # the most that glibc takes


def _check_folder(cfg: DictConfig) -> None:
    """Raise an error for a folder that can't be this run's; the first rank opens it when nothing else is wrong."""
    from lightning.pytorch.utilities import rank_zero_only

    _check_shared_folder(cfg)
    if cfg.resume is None and not rank_zero_only.rank and Path(cfg.folder, "config.yaml").exists():
        raise FileExistsError(
            f"{cfg.folder} holds a run already, which is not overwritten; give another folder=, or resume= to go on "
            "with it"
        )


def _open_folder(folder: Path, settings: str) -> None:
    """The run's folder with its config and, a line for each start, the revision of the code; by the first rank."""
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(settings)
    with (folder / "revision.txt").open("a") as file:
        file.write(f"{git_revision() or 'unknown'}\n")


def _check_shared_folder(cfg: DictConfig) -> None:
    """Raise ValueError where each of several processes would have a folder named by the second it began in."""
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) == 1 or not HydraConfig.initialized():
        return
    hydra_config = HydraConfig.get()
    named = any(override.startswith("hydra.run.dir=") for override in hydra_config.overrides.hydra)
    named = named or hydra_config.mode == RunMode.MULTIRUN  # by the one that launched them all
    if cfg.folder == hydra_config.runtime.output_dir and not named:
        raise ValueError(f"processes that share no folder, here {cfg.folder}; name one for all: folder=outputs/NAME")


def _check_passes(trainer: Any, objective: Any, data: TrainingData) -> None:
    """Raise ValueError unless a run is one pass over its batches, and an update comes after as many passes as its batch
    is shared out among."""
    if trainer.max_epochs != 1:
        raise ValueError(f"trainer.max_epochs={trainer.max_epochs}; a run is of `steps` batches: raise steps")
    passes = trainer.accumulate_grad_batches if objective.automatic_optimization else objective.accumulate
    if passes != data.accumulate:
        raise ValueError(
            f"an update after {passes} passes, but batches shared out among {data.accumulate}; set both by one: "
            f"accumulate={max(passes, data.accumulate)}"
        )


def _check_regions(objective: Any, data: TrainingData) -> None:
    """Raise ValueError where a region is to count more, and no training sample has a mask of it."""
    for name in objective.emphasis.regions:
        if name not in data.regions:
            raise ValueError(
                f"objective.emphasis.{name}={getattr(objective.emphasis, name)}, but no training sample has a mask of "
                f"its {name}; set objective.emphasis.{name}=0, or prepare the videos with a face detector: "
                "detectors.face, see data/README.md"
            )


def _check_optimizers(objective: Any) -> None:
    """Raise ValueError for settings that an optimiser refuses, before hours of encoding."""
    try:
        objective.configure_optimizers()
    except (TypeError, ValueError) as error:
        raise ValueError(f"an optimiser refuses its settings ({error}); check objective.optimizer") from error


def _check_resumable(path: str | Path, objective: torch.nn.Module) -> None:
    """Raise ValueError for a checkpoint that isn't one of this objective and these networks."""
    wanted = f"give a .ckpt of this run's checkpoints folder, and the arguments of that run; got resume={path}"
    try:
        saved = run_checkpoint.shapes(Path(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {wanted}") from error
    own = {name: weight.shape for name, weight in objective.state_dict().items()}
    saved = {name: shape for name, shape in saved.items() if not name.startswith(run_checkpoint.AVERAGE)}
    strange = sorted(own.keys() ^ saved.keys()) or [name for name in own if own[name] != saved[name]]
    if strange:
        raise ValueError(f"a checkpoint of other networks, different in {', '.join(strange[:3])}; {wanted}")


def quieten() -> None:
    """Keep Lightning from telling what is no news."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)


def _tell(error: BaseException) -> NoReturn:
    """One line on stderr, and out."""
    if os.environ.get("AVATAR_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {_message(error)}", file=sys.stderr)
    sys.exit(2)


def _message(error: BaseException) -> str:
    """The cause's own, for Hydra wraps errors of constructors in its own; with its place, if it speaks of none."""
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        quoted = f"\"{name}='{value}'\""
        return f"can't read {error.override}; quote what has special characters, and again for the shell: {quoted}"
    where = None
    while isinstance(error, HydraException) and (cause := error.__cause__) is not None:
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return f"{str(error).splitlines()[0].rstrip('.')}: there is no such setting; --cfg job shows all there are"
        where = where or re.search(r"full_key: (\S+)", str(error))
        error = cause
    text = str(error)
    if "Original Traceback" in text:  # of a data loader's worker, which ends in "Type: message"
        text = text.strip().rsplit("\n", 1)[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    return text if where is None or isinstance(error, MISTAKES) else f"{where[1]} can't be made ({text}); check it"
