"""Commands as users see them: one line and exit code 2 for a user error, and the files in a run's folder."""

import json
import signal
import sys
from pathlib import Path

import av.error
import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from avatar import cli
from avatar.commands import evaluate, infer
from avatar.media import mp4_writer
from avatar.media.decode import read_audio, read_video
from avatar.models import bundle
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.objectives import losses
from avatar.streaming.session import Session
from avatar.streaming.simulation import Emitted
from avatar.training import fit
from avatar.types import SAMPLES_PER_FRAME
from tests.stages import FILTERS, SMALL_NET, TINY, composed, fitted, plain, random_autoencoder, random_bundle

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
ROOT = Path(__file__).parents[1]
QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null")
TASKS = {"train": fit.fit, "distill": fit.fit, "infer": infer.infer, "evaluate": evaluate.evaluate}


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """A function that calls a script in this process: arguments → exit code and stderr."""

    def call(script: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it too; monkeypatch restores it after the test
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *arguments, f"hydra.run.dir='{tmp_path}/run'", *QUIET])
        capsys.readouterr()
        try:
            cli.main(script, TASKS[script])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """Small bundles of random weights: autoencoder, teacher and student of videos."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"autoencoder": random_autoencoder(folder / "autoencoder.safetensors")}
    for kind in ("teacher", "student"):
        made[kind] = random_bundle(folder / f"{kind}.safetensors", kind, "latent.channels=4")
    return made


def small(script: str, bundles: dict[str, Path], tmp_path: Path) -> list[str]:
    """The arguments of a small run of infer or evaluate with these bundles."""
    common = [f"autoencoder.path='{bundles['autoencoder']}'", f"student='{bundles['student']}'"]
    if script == "infer":
        return [*common, f"out='{tmp_path}/a.mp4'"]
    few = ["clips=2", "latents=2", "stream_frames=12", "workers=0"]
    place = [f"folder='{tmp_path}/out'", f"cache='{tmp_path}/cache'"]
    return [*common, f"teacher='{bundles['teacher']}'", *few, *place]


def check_user_error(code: int, stderr: str, message: str) -> None:
    """One line and exit code 2."""
    assert code == 2 and message in stderr, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and "Traceback" not in stderr


class CtrlC(lightning.Callback):
    """Ctrl-C during the batch with this index."""

    def __init__(self, after: int):
        self.after = after

    def on_train_batch_start(self, trainer, module, batch, index: int) -> None:
        if index == self.after:
            signal.raise_signal(signal.SIGINT)


def test_infer_accepts_user_files(command, tmp_path):
    portrait, speech, out = tmp_path / "mein Porträt.png", tmp_path / "hallo.wav", tmp_path / "me.mp4"
    Image.fromarray(np.full((90, 70, 3), 128, np.uint8)).save(portrait)
    wavfile.write(speech, 44_100, np.zeros((44_100, 2), np.int16))
    code, stderr = command("infer", f"image='{portrait}'", f"audio='{speech}'", f"out='{out}'", "plan={chunk: 3}")
    assert code == 0, stderr
    frames, rate = read_video(out)
    assert frames.shape == (25, 64, 64, 3) and rate == 25


def test_infer_conditions_on_the_other_voice(command, tmp_path):
    voices = {
        "own": np.zeros(16_000),
        "other": np.random.default_rng(0).normal(0, 0.1, 16_000),
        "long": np.zeros(20_000),
    }
    for name, samples in voices.items():
        wavfile.write(tmp_path / f"{name}.wav", 16_000, samples.astype(np.float32))
    own, other = f"audio='{tmp_path}/own.wav'", f"other='{tmp_path}/other.wav'"
    for name, arguments in {"alone": [own], "listening": [own, other]}.items():
        code, stderr = command("infer", *arguments, "state=listening", f"out='{tmp_path}/{name}.mp4'")
        assert code == 0, stderr
    alone, listening = (read_video(tmp_path / f"{name}.mp4")[0] for name in ("alone", "listening"))
    assert alone.shape == listening.shape and not np.array_equal(alone, listening)
    code, stderr = command("infer", own, f"other='{tmp_path}/long.wav'", f"out='{tmp_path}/b.mp4'")
    check_user_error(code, stderr, "16000 samples of the avatar's voice with 20000 of the other one")


def test_infer_takes_controls_at_times(command, tmp_path):
    wavfile.write(tmp_path / "own.wav", 16_000, np.zeros(16_000, np.float32))
    entries = {
        "start": [{"at": 0, "emotion": "happy", "prompt": "a cat"}],
        "later": [{"at": 0, "emotion": "happy", "prompt": "a cat"}, {"at": 0.5, "emotion": "sad"}],
        "beyond": [{"at": 0, "prompt": "a cat", "saying": "Hello."}, {"at": 1.5, "saying": "Goodbye."}],
    }
    for name, rows in entries.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))

    def infer(out: str, *arguments: str):
        return command("infer", f"audio='{tmp_path}/own.wav'", f"out='{tmp_path}/{out}.mp4'", *arguments)

    for name, arguments in {
        "set": ["emotion=happy", "prompt='a cat'"],
        "start": [f"controls='{tmp_path}/start.json'"],
        "later": [f"controls='{tmp_path}/later.json'"],
    }.items():
        code, stderr = infer(name, *arguments)
        assert code == 0, stderr
    held, start, later = (read_video(tmp_path / f"{name}.mp4")[0] for name in ("set", "start", "later"))
    assert np.array_equal(held, start)
    assert np.array_equal(held[:12], later[:12]) and not np.array_equal(held[20:], later[20:])
    code, stderr = infer("beyond", f"controls='{tmp_path}/beyond.json'")
    check_user_error(code, stderr, "beyond.json, entry 2: got at=1.5; expected a number from 0 (the time")


@pytest.mark.parametrize(
    "script, mistake, message",
    [
        ("train", "stepz=1", "stepz"),
        ("train", "objective.lip_wait=1", "lip_wait"),
        ("train", "objective=magic", "magic"),
        ("train", "autoencoder=mars", "mars"),
        ("train", "steps=many", "steps=many; expected an integer"),
        ("train", "seed=-1", "seed=-1; expected an integer"),
        ("train", "threads=-1", "threads=-1; expected an integer"),
        ("train", "threads=x", "threads=x; expected an integer"),
        ("distill", "objective=consistency", "teacher"),
        ("infer", "autoencoder=states", "no pixels"),
        ("infer", "gesture=salute", "salute"),
        ("infer", "image=nobody.png", "nobody.png"),
        ("infer", "image=pyproject.toml", "pyproject.toml"),
        ("infer", "image=photo(1).png", "\"image='photo(1).png'\""),  # how to quote it
        ("infer", "prompt=5", "prompt=5"),
        ("infer", "threads=-1", "threads=-1"),
        ("infer", "audio=silence.wav", "silence.wav"),
        ("infer", "audio=pyproject.toml", "pyproject.toml"),
        ("infer", "student=pyproject.toml", "pyproject.toml"),
        ("infer", "student=nothing.safetensors", "nothing.safetensors"),
        ("infer", "student=data/nano/teacher.safetensors", "'teacher'; expected student or causal_teacher"),
        ("infer", "student=data/nano/autoencoder.safetensors", "'autoencoder'; expected student"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(command, tmp_path, script, mistake, message):
    code, stderr = command(script, mistake, *([f"out='{tmp_path}/a.mp4'"] if script == "infer" else []))
    check_user_error(code, stderr, message)
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    "plan, message",
    [
        ("{chunk: two}", "chunk='two'"),
        ("{chunk: 2.5}", "chunk=2.5"),
        ("{chunk: 0}", "at least one latent"),
        ("{window: null}", "window=None"),
        ("{times: 1}", "times=1"),
        ("{times: [1, half]}", "times=[1, 'half']"),
        ("{chunks: 2}", "plan.chunks; expected one of times, chunk"),
    ],
)
@pytest.mark.parametrize("script", ["infer", "evaluate"])
@pytest.mark.usefixtures("unchecked")
def test_an_invalid_plan_is_a_user_error(command, bundles, tmp_path, script, plan, message):
    code, stderr = command(script, *small(script, bundles, tmp_path), f"plan={plan}")
    check_user_error(code, stderr, message)
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("report.json"))


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("teacher_sampler.steps=0", "steps=0"),
        ("teacher_sampler.window=0", "window=0"),
        ("teacher_sampler.solver=magic", "solver='magic'"),
        ("clips=1", "clips=1; expected an integer >= 2"),  # a control uses another clip's audio
        ("latents=0", "latents=0"),
        ("stream_frames=x", "stream_frames=x"),
        ("threads=-1", "threads=-1"),
        ("split=holidays", "holidays"),
        ("student=nothing.safetensors", "nothing.safetensors"),
    ],
)
def test_a_user_error_in_an_evaluation_is_one_line(command, bundles, tmp_path, mistake, message):
    code, stderr = command("evaluate", *small("evaluate", bundles, tmp_path), mistake)
    check_user_error(code, stderr, message)
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_report_is_not_overwritten(command, bundles, tmp_path):
    (tmp_path / "report.json").write_text("mine")
    code, stderr = command("evaluate", *small("evaluate", bundles, tmp_path), f"folder='{tmp_path}'")
    check_user_error(code, stderr, "give another folder=")
    assert (tmp_path / "report.json").read_text() == "mine" and not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    "role, part, change",
    [
        ("init", "audio", {"left_context": 4, "right_context": 1}),  # as many tokens as with 3 and 2
        ("teacher", "audio", {"left_context": 4, "right_context": 1}),
        ("teacher", "text", {"max_bytes": 64}),
    ],
)
def test_a_bundle_of_other_encoders_is_rejected(command, tmp_path, role, part, change):
    usual = plain(composed("train")[part])
    made = {}
    for name in ("init", "teacher"):
        changed = {part: usual | change} if name == role else {}
        world = ("autoencoder=states", "model=states")
        made[name] = random_bundle(tmp_path / f"{name}.safetensors", "causal_teacher", *world, **changed)
    bundles = [f"init='{made['init']}'", f"teacher='{made['teacher']}'"]
    place = [f"folder='{tmp_path}/a'", f"cache='{tmp_path}/cache'", "steps=1"]
    code, stderr = command("distill", *TINY, "objective=consistency", *bundles, *place)
    check_user_error(code, stderr, f"for {part} from")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_contains_a_run_is_rejected(command, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("seed: 7")
    code, stderr = command("train", *TINY, f"folder='{tmp_path}/a'", f"cache='{tmp_path}/cache'", "steps=1")
    check_user_error(code, stderr, f"{tmp_path}/a")
    assert "another folder=" in stderr and "resume=" in stderr
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {"config.yaml": "seed: 7"}


def state_of(config: str, *overrides: str) -> dict[str, torch.Tensor]:
    """The weights of a run's objective, as its checkpoints name them."""
    net = bundle.new(composed(config, *TINY, *SMALL_NET, *overrides).model.network)
    return {f"net.{name}": weight for name, weight in net.state_dict().items()}


@pytest.mark.parametrize("what", ["bundle", "text", "missing", "folder", "weights", "objective", "shape"])
def test_an_invalid_checkpoint_is_rejected(command, tmp_path, what):
    path = tmp_path / "last.ckpt"
    own = state_of("train")
    if what == "bundle":
        random_bundle(path, "teacher", "autoencoder=states", "model=states")
    elif what == "text":
        path.write_text("not a checkpoint\n" * 9)
    elif what == "folder":
        path.mkdir()
    elif what == "weights":
        torch.save(own, path)
    elif what == "objective":  # a checkpoint of a distillation, which contains a teacher too
        torch.save({"state_dict": own | {name.replace("net.", "teacher."): w for name, w in own.items()}}, path)
    elif what == "shape":
        torch.save({"state_dict": own | {"net.out.bias": torch.zeros(3)}}, path)
    place = [f"folder='{tmp_path}/a'", f"cache='{tmp_path}/cache'", "steps=1", f"resume='{path}'"]
    code, stderr = command("train", *TINY, *SMALL_NET, *place)
    check_user_error(code, stderr, str(path))
    assert not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_user_error_in_a_data_loaders_worker_is_one_line(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    few = ["data.workers=1", "data.train.count=1", "data.dev.count=1", "steps=1"]
    code, stderr = command("train", *TINY, *SMALL_NET, *few, f"folder='{tmp_path}/a'", f"cache='{tmp_path}/file/cache'")
    check_user_error(code, stderr, f"{tmp_path}/file")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_loss_ends_the_run_before_weights_change(command, tmp_path, monkeypatch, bad):
    flow_matching, calls = losses.flow_matching, []

    def corrupted(*arguments):
        calls.append(1)
        return flow_matching(*arguments) * (bad if len(calls) == 3 else 1)

    monkeypatch.setattr(losses, "flow_matching", corrupted)
    place = [f"folder='{tmp_path}/a'", f"cache='{tmp_path}/cache'", "steps=6", "data.workers=0"]
    code, stderr = command("train", *TINY, *SMALL_NET, *place, "callbacks.checkpoint.every_n_train_steps=2")
    check_user_error(code, stderr, f"a loss is {bad} after 2 updates")
    assert not (tmp_path / "a" / "teacher.safetensors").exists()
    saved = [torch.load(path, weights_only=True) for path in (tmp_path / "a" / "checkpoints").glob("*.ckpt")]
    assert saved and all(weight.isfinite().all() for state in saved for weight in state["state_dict"].values())


def test_batches_without_frame_crops_are_rejected(command, tmp_path):
    place = [f"folder='{tmp_path}/a'", f"cache='{tmp_path}/cache'", "threads=1", "steps=1"]
    code, stderr = command("train", "objective=autoencoder", "data.batch=0", *place)
    check_user_error(code, stderr, "batch=0")


def test_an_invalid_constructor_argument_is_one_line(command, tmp_path):
    code, stderr = command("train", *TINY, "callbacks.ema.decay=2.0", f"folder='{tmp_path}/a'", f"cache='{tmp_path}/c'")
    assert code == 2 and stderr.splitlines() == [
        "error: decay=2.0; expected a number in [0, 1): set callbacks.ema.decay"
    ]


def test_a_folder_that_cannot_be_created_is_a_user_error(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, stderr = command("train", *TINY, f"folder='{tmp_path}/file/run'")
    assert code == 2 and stderr.startswith("error: ") and "file" in stderr


@pytest.mark.parametrize("script", ["train", "infer"])
def test_a_folder_without_write_permission_is_a_user_error(command, tmp_path, monkeypatch, script):
    """Simulated, since root has all permissions."""

    def forbidden(path: Path, ordinary, *arguments, **options):
        if path.is_relative_to(tmp_path / "locked") and (options or {"x", "w", "a"} & set("".join(arguments))):
            raise PermissionError(13, "Permission denied", str(path))
        return ordinary(path, *arguments, **options)

    mkdir, opened = Path.mkdir, Path.open
    monkeypatch.setattr(Path, "mkdir", lambda path, *args, **options: forbidden(path, mkdir, *args, **options))
    monkeypatch.setattr(Path, "open", lambda path, *args, **options: forbidden(path, opened, *args, **options))
    monkeypatch.setattr(infer, "open_session", lambda *_: Faces(0))
    place = {"train": [*TINY, f"folder='{tmp_path}/locked/run'"], "infer": [f"out='{tmp_path}/locked/a.mp4'"]}
    code, stderr = command(script, *place[script])
    check_user_error(code, stderr, f"{tmp_path}/locked")
    assert "Permission denied" in stderr and not (tmp_path / "locked").exists()


class Faces(Session):
    """A stub of a session without a network, and a stream of this many chunks."""

    frames = 0

    def __init__(self, chunks: int):
        self.chunks, self.text = chunks, ByteTokenizer(8)

    def gesture(self, name: str | None, seconds: float = 1.0) -> None:
        pass

    def stream(self, session, speech, other, control):
        for number in range(self.chunks):
            frames, samples = torch.full((3, 8, 64, 64), number / 9), torch.zeros(8 * SAMPLES_PER_FRAME)
            yield Emitted(frames, samples, 0.1, number + 0.1, 2)


def test_ctrl_c_during_streaming_keeps_the_written_part(command, tmp_path, monkeypatch):
    faces, out = Faces(3), tmp_path / "me.mp4"

    def stopped(*arguments, **keywords):
        yield from faces.stream(*arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "open_session", lambda *_: faces)
    monkeypatch.setattr(infer, "stream", stopped)
    code, stderr = command("infer", f"out='{out}'")
    assert code == 130 and "Traceback" not in stderr
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["me.mp4"]
    assert read_video(out)[0].shape == (24, 64, 64, 3) and len(read_audio(out)) >= 23 * SAMPLES_PER_FRAME


def test_a_disk_that_fills_up_during_streaming_keeps_the_written_part(command, tmp_path, monkeypatch):
    faces, written = Faces(5), []
    mux = mp4_writer.Mp4Writer._mux

    def full(self, stream, frame):
        written.append(1)
        if len(written) > 2 * 24:  # two packets per frame: video and audio
            raise av.error.OSError(28, "No space left on device")
        mux(self, stream, frame)

    monkeypatch.setattr(infer, "open_session", lambda *_: faces)
    monkeypatch.setattr(infer, "stream", faces.stream)
    monkeypatch.setattr(mp4_writer.Mp4Writer, "_mux", full)
    code, stderr = command("infer", f"out='{tmp_path}/me.mp4'")
    (message,) = [line for line in stderr.splitlines() if line.startswith("error: ")]  # among log lines
    assert code == 2 and "No space left" in message and "after 24 frames" in message
    (partial,) = tmp_path.glob("*.mp4")
    assert partial.name == "me.partial.mp4" and len(read_video(partial)[0]) == 24


def test_ctrl_c_saves_a_checkpoint_that_resumes(command, tmp_path):
    places = [f"folder='{tmp_path}/run'", f"cache='{tmp_path}/cache'", "name=test", "steps=6"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _ = command("train", *TINY, *places, "+callbacks.stop={_target_: tests.test_cli.CtrlC, after: 3}")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further Ctrl-C
    assert code == 130
    saved = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert saved and not (tmp_path / "run" / "teacher.safetensors").exists()
    last = max(saved, key=lambda path: path.stat().st_mtime)
    assert torch.load(last, weights_only=True)["global_step"] == 4  # the current batch was finished
    code, stderr = command("train", *TINY, *places, f"resume='{last}'")
    assert code == 0, stderr
    assert (tmp_path / "run" / "teacher.safetensors").exists()


def test_a_sweep_leaves_a_complete_folder_per_run(command, tmp_path):
    arguments = [*TINY, "steps=2", f"cache='{tmp_path}/cache'", f"hydra.sweep.dir='{tmp_path}/sweep'"]
    code, _ = command("train", "-m", "seed=1,2", *arguments)
    assert code == 0
    for number in ("0", "1"):
        folder = tmp_path / "sweep" / number
        assert f"seed: {int(number) + 1}\n" in (folder / "config.yaml").read_text()
        assert (folder / "revision.txt").read_text().strip()
        assert list(folder.glob("metrics/*/metrics.csv")) and list(folder.glob("checkpoints/*.ckpt"))
    first, second = (bundle.read(tmp_path / "sweep" / n / "teacher.safetensors").weights for n in "01")
    assert bundle.fingerprint(first) != bundle.fingerprint(second)


@pytest.mark.filterwarnings("ignore")  # wandb's own warnings
def test_wandb_logs_losses_and_sample_videos_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    fitted("train", tmp_path / "run", "logger=wandb", "callbacks=default", "callbacks.video.every=2", "steps=2")
    assert list((tmp_path / "run" / "samples").glob("*.mp4"))
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb")) and list(offline.rglob("*.mp4"))
