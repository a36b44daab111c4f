"""What a user sees of a command: one line and exit code 2 for a mistake, folders that say what a run was."""

import os
import signal
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from avatar import film, run
from avatar.data.decode import read_video
from avatar.models import checkpoint
from tests.stages import FILTERS, TINY, fitted

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
ROOT = Path(__file__).parents[1]
QUIET = ("hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.output_subdir=null")
TASKS = {"train": run.fit, "distill": run.fit, "infer": film.film}


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """A script's call in this process: its arguments → its exit code and what it wrote on stderr."""

    def call(script: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by the command itself; taken back after the test
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *arguments, f"hydra.run.dir='{tmp_path}/run'", *QUIET])
        capsys.readouterr()
        try:
            run.main(script, TASKS[script])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


class CtrlC(lightning.Callback):
    """The user's Ctrl-C after so many batches."""

    def __init__(self, after: int):
        self.after = after

    def on_train_batch_start(self, trainer, module, batch, index: int) -> None:
        if index == self.after:
            signal.raise_signal(signal.SIGINT)


def test_a_users_own_files_become_a_film(command, tmp_path):
    portrait, speech, out = tmp_path / "mein Porträt.png", tmp_path / "hallo.wav", tmp_path / "me.mp4"
    Image.fromarray(np.full((90, 70, 3), 128, np.uint8)).save(portrait)
    wavfile.write(speech, 44_100, np.zeros((44_100, 2), np.int16))
    code, stderr = command("infer", f"image='{portrait}'", f"audio='{speech}'", f"out='{out}'", "plan={chunk: 3}")
    assert code == 0, stderr
    frames, rate = read_video(out)
    assert frames.shape == (25, 64, 64, 3) and rate == 25


@pytest.mark.parametrize(
    "script, mistake, told",
    [
        ("train", "stepz=1", "stepz"),
        ("train", "objective.lip_wait=1", "lip_wait"),
        ("train", "objective=magic", "magic"),
        ("train", "world=mars", "mars"),
        ("train", "steps=many", "steps=many; wanted a whole number"),
        ("train", "seed=-1", "seed=-1; wanted a whole number"),
        ("distill", "objective=consistency", "teacher"),
        ("infer", "world=states", "no pictures"),
        ("infer", "gesture=salute", "salute"),
        ("infer", "image=nobody.png", "nobody.png"),
        ("infer", "image=pyproject.toml", "pyproject.toml"),
        ("infer", "audio=silence.wav", "silence.wav"),
        ("infer", "audio=pyproject.toml", "pyproject.toml"),
        ("infer", "student=pyproject.toml", "pyproject.toml"),
        ("infer", "student=nothing.safetensors", "nothing.safetensors"),
        ("infer", "student=data/nano/autoencoder.safetensors", "'autoencoder'; wanted student"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path, script, mistake, told):
    code, stderr = command(script, mistake, *([f"out='{tmp_path}/a.mp4'"] if script == "infer" else []))
    assert code == 2 and told in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.mp4"))


def test_a_value_that_a_constructor_refuses_is_a_mistake_too(command, tmp_path):
    code, stderr = command("train", *TINY, "callbacks.ema.decay=2.0", f"folder='{tmp_path}/a'", f"cache='{tmp_path}/c'")
    assert code == 2 and stderr.splitlines() == ["error: decay 2.0; an average needs one in [0, 1)"]


def test_a_folder_that_can_not_be_made_is_a_mistake(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, stderr = command("train", *TINY, f"folder='{tmp_path}/file/run'")
    assert code == 2 and stderr.startswith("error: ") and "file" in stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_write_permission_is_a_mistake(command, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, stderr = command("train", *TINY, f"folder='{tmp_path}/locked/run'")
    assert code == 2 and stderr.startswith("error: ") and "locked" in stderr


def test_ctrl_c_saves_a_checkpoint_that_resumes(command, tmp_path):
    places = [f"folder='{tmp_path}/run'", f"cache='{tmp_path}/cache'", "name=test", "steps=6"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _ = command("train", *TINY, *places, "+callbacks.stop={_target_: tests.test_cli.CtrlC, after: 3}")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning lets further Ctrl-C do nothing
    assert code == 130
    saved = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert saved and not (tmp_path / "run" / "teacher.safetensors").exists()
    last = max(saved, key=lambda path: path.stat().st_mtime)
    assert torch.load(last, weights_only=True)["global_step"] == 3
    code, stderr = command("train", *TINY, *places, f"resume='{last}'")
    assert code == 0, stderr
    assert (tmp_path / "run" / "teacher.safetensors").exists()


@pytest.mark.slow
def test_a_sweep_leaves_a_folder_that_says_all_of_every_run(command, tmp_path):
    arguments = [*TINY, "steps=2", f"cache='{tmp_path}/cache'", f"hydra.sweep.dir='{tmp_path}/sweep'"]
    code, _ = command("train", "-m", "seed=1,2", *arguments)
    assert code == 0
    for number in ("0", "1"):
        folder = tmp_path / "sweep" / number
        assert f"seed: {int(number) + 1}\n" in (folder / "config.yaml").read_text()
        assert (folder / "revision.txt").read_text().strip()
        assert list(folder.glob("metrics/*/metrics.csv")) and list(folder.glob("checkpoints/*.ckpt"))
    first, second = (checkpoint.read(tmp_path / "sweep" / n / "teacher.safetensors").weights for n in "01")
    assert checkpoint.fingerprint(first) != checkpoint.fingerprint(second)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb, whose own they are
def test_wandb_takes_losses_and_sample_videos_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    fitted("train", tmp_path / "run", "logger=wandb", "callbacks=default", "callbacks.video.every=2", "steps=2")
    assert list((tmp_path / "run" / "samples").glob("*.mp4"))
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb")) and list(offline.rglob("*.mp4"))
