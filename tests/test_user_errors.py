"""Errors of commands: a user error is printed as one line with exit code 2, a bug with its traceback."""

import sys
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException

from avatar import cli
from avatar.__main__ import COMMANDS
from avatar.__main__ import main as package
from avatar.errors import FileAccessError, MissingFileError, UserError
from avatar.files import save_tensors, write_text
from avatar.objectives.flow_matching import FlowMatching
from avatar.process import choose_device
from avatar.renamed import RENAMED, RENAMED_CHOICES, REPLACED, check_overrides
from avatar.training import fit
from tests.stages import FILTERS, SMALL_NET, TINY

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
ROOT = Path(__file__).parents[1]


class Broken(torch.nn.Module):
    """An objective whose constructor fails."""

    def __init__(self, error: str, **unused: object):
        super().__init__()
        raise {"bug": ValueError, "user": UserError, "type": TypeError}[error]("planted")


class BrokenSamples(torch.utils.data.Dataset):
    """Samples that a data loader's worker fails to read."""

    def __init__(self, error: type[Exception]):
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise self.error("planted")


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """A function that calls train.py in this process: arguments -> exit code and stderr."""

    def call(*arguments: str, task=fit.fit) -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.chdir(ROOT)
        quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null")
        place = (f"folder='{tmp_path}/run'", f"cache='{tmp_path}/cache'", f"hydra.run.dir='{tmp_path}/run'")
        monkeypatch.setattr(sys, "argv", ["train", *place, *arguments, *quiet])
        capsys.readouterr()
        try:
            cli.main("train", task)
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "former, now",
    [
        ("world=states", "use autoencoder=states"),
        ("world=pixels", "use autoencoder=nano"),
        ("world=mine", "use autoencoder=nano|wan21|wan22|ltx|states, and puppet="),
        ("world.view.size=128", "use puppet.size=128"),
        ("world.autoencoder.path=a.safetensors", "use autoencoder.path=a.safetensors"),
        ("world.channels=4", "use latent.channels=4"),
        ("prepare=large", "use transforms=large"),
        ("+prepare.net.lora.rank=2", "use transforms.net.lora.rank=2"),
        ("objective.emphasis.lips=8", "use objective.region_weights.lips=8"),
        ("data.emphasis.lips=8", "use data.region_weights.lips=8"),
        ("data.buckets.budget=96", "use data.buckets.max_latents_per_batch=96"),
        ("data.buckets.multiple=8", "use data.buckets.batch_multiple_of=8"),
        ("audio_encoder@audio=wav2vec2", "use audio_encoder=wav2vec2"),
        ("text_encoder@text=umt5", "use text_encoder=umt5"),
        ("image_encoder@image=clip", "use image_encoder=clip"),
        ("audio_encoder@shipped.audio=wav2vec2", "use audio_encoder=wav2vec2"),
        ("trainer=dry", "use python -m avatar summarize"),
        ("scene=grown", "use scene=full"),
        ("callbacks.finite.skips=3", "use callbacks.nonfinite_guard.skips=3"),
        ("~callbacks.finite", "use callbacks.nonfinite_guard"),
        ("model.network.more_channels=20", "use model.network.extra_in_channels=20"),
    ],
)
def test_a_former_name_is_rejected_with_the_new_one(train, tmp_path, former, now):
    code, stderr = train(former)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and now in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("former", [*RENAMED, *REPLACED, *RENAMED_CHOICES, "scene=portrait,grown"])
def test_every_former_name_is_rejected(former):
    with pytest.raises(UserError, match="has been renamed; use"):
        check_overrides([former if "=" in former else f"{former}=1"])


def test_names_that_only_share_a_prefix_with_a_former_one_are_accepted():
    check_overrides(["scene=full", "trainer=ddp", "worlds=1", "data.buckets.budgets=1", "--cfg", "job"])


@pytest.mark.parametrize("error, shown", [("bug", ValueError), ("type", TypeError)])
def test_a_bug_in_a_constructor_shows_its_traceback(train, error, shown):
    with pytest.raises(InstantiationException, match="planted") as caught:
        train(*TINY, f"+objective.error={error}", "objective._target_=tests.test_user_errors.Broken")
    assert isinstance(caught.value.__cause__, shown)


def test_a_user_error_in_a_constructor_is_one_line(train):
    code, stderr = train(*TINY, "+objective.error=user", "objective._target_=tests.test_user_errors.Broken")
    assert code == 2 and stderr == "error: planted\n"


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, ZeroDivisionError])
def test_a_bug_in_a_training_step_shows_its_traceback(train, monkeypatch, kind):
    def step(*_: object) -> None:
        raise kind("planted")

    monkeypatch.setattr(FlowMatching, "training_step", step)
    with pytest.raises(kind, match="planted"):
        train(*TINY, *SMALL_NET, "steps=1")


def test_a_user_error_in_a_training_step_is_one_line(train, monkeypatch):
    def step(*_: object) -> None:
        raise MissingFileError("planted")

    monkeypatch.setattr(FlowMatching, "training_step", step)
    code, stderr = train(*TINY, *SMALL_NET, "steps=1")
    assert code == 2 and [line for line in stderr.splitlines() if "planted" in line] == ["error: planted"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("kind, message", [(UserError, "planted"), (FileAccessError, "planted"), (ValueError, None)])
def test_errors_of_a_data_loaders_worker_keep_their_kind(kind, message):
    with pytest.raises(kind) as caught:
        next(iter(torch.utils.data.DataLoader(BrokenSamples(kind), num_workers=1)))
    assert cli.user_message(caught.value) == message


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "mistake, message",
    [
        ("+objective.foo=1", "unexpected keyword argument 'foo'"),
        ("+trainer.foo=1", "unexpected keyword argument 'foo'"),
        ("~objective.pattern", "missing 1 required"),
        ("objective._target_=avatar.objectives.nothing.Nothing", "avatar.objectives.nothing"),
        ("objective._target_=avatar.objectives.flow_matching.Nothing", "Nothing"),
        ("seed=${nothing}", "nothing"),
        ("autoencoder=states puppet=64px", "only with autoencoder=states: leave out puppet="),
        ("device=abacus", "device=abacus; expected auto, cpu, cuda"),
        ("device=cuda:99", "got device=cuda:99; this machine has"),
    ],
)
def test_a_config_error_is_one_line(train, mistake, message):
    code, stderr = train(*TINY, *SMALL_NET, *mistake.split(), "steps=1")
    assert code == 2 and message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr


def test_a_run_folder_that_cannot_be_created_is_one_line(train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, stderr = train(f"hydra.run.dir='{tmp_path}/file/run'")
    assert code == 2 and stderr.startswith("error: ") and "hydra.run.dir=FOLDER" in stderr


def test_system_errors_while_writing_are_user_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileAccessError, match="choose another folder"):
        write_text(tmp_path / "file" / "a.txt", "text")
    with pytest.raises(FileAccessError, match="choose another folder"):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "file" / "a.safetensors")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FileAccessError, match="No space left"):
        write_text(tmp_path / "b.txt", "text")
    assert not (tmp_path / "b.txt").exists()


def test_devices_are_chosen_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_package_lists_its_commands(monkeypatch, capsys):
    for arguments in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "argv", ["avatar", *arguments])
        package()
        listed = capsys.readouterr().out
        assert all(f"  {name} " in listed for name in COMMANDS)


def test_an_unknown_command_is_rejected(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["avatar", "evaluat"])
    with pytest.raises(SystemExit) as stop:
        package()
    assert stop.value.code == 2 and "no command evaluat; expected one of infer, evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("debug", ["fast", "profiler", "overfit"])
def test_debug_runs_end_within_seconds(train, tmp_path, debug):
    short = {"fast": [], "profiler": ["steps=6"], "overfit": ["steps=2"]}[debug]
    code, stderr = train(f"debug={debug}", "threads=1", "device=cpu", "callbacks=base", *short)
    assert code == 0, stderr
    assert (tmp_path / "run" / "teacher.safetensors").exists()
    assert bool(list((tmp_path / "run").glob("*profile*"))) == (debug == "profiler")
