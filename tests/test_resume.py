"""A resumed run has bit-exactly the losses and weights of an uninterrupted one."""

import csv
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import hydra
import pytest
import torch
from safetensors.torch import load_file

from avatar.objectives.flow_matching import FlowMatching
from tests import ranks
from tests.data.shard_sets import sample, write_set
from tests.stages import ANY_DATA, FILTERS, SMALL_NET, TINY, composed, fitted, random_bundle

INTENDED = (
    "ignore:You're resuming from a checkpoint",
    "ignore:The dirpath has changed",
    "ignore:Using ModelCheckpoint with manual",
)
pytestmark = [pytest.mark.filterwarnings(text) for text in (*FILTERS, *INTENDED)]


def losses(folder: Path) -> dict[int, tuple[str, ...]]:
    """The training losses of each batch, as written to the metrics file."""
    (path,) = folder.glob("metrics/*/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    by_step = [(int(row["step"]), tuple(v for k, v in row.items() if "train" in k and "loss" in k)) for row in rows]
    return {step: values for step, values in by_step if any(values)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """The override for a cache of encoded clips, shared by the runs of all tests."""
    folder = tmp_path_factory.mktemp("shared")
    fitted("train", folder / "first", "steps=1", *SMALL_NET)
    return f"cache='{folder / 'cache'}'"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """Random bundles to distil from, by kind."""
    folder, states = tmp_path_factory.mktemp("bundles"), ("autoencoder=states", "model=states")
    return {
        kind: random_bundle(folder / f"{kind}.safetensors", kind, *states) for kind in ("teacher", "causal_teacher")
    }


def check_resumed(
    tmp_path: Path,
    script: str,
    *overrides: str,
    micro_batches: int = 4,
    updates: int = 4,
    accumulate: int = 1,
    tiny: Sequence[str] = TINY,
) -> None:
    """Compare a run of 8 micro-batches with one resumed after `micro_batches` micro-batches, or `updates` updates."""
    often = ["+callbacks.checkpoint.save_top_k=-1", f"callbacks.checkpoint.every_n_train_steps={updates}"]
    shared = [f"steps={8 // accumulate}", f"accumulate={accumulate}", f"data.buckets.batch_multiple_of={accumulate}"]
    overrides = (*shared, *often, *SMALL_NET, *overrides)
    full = fitted(script, tmp_path / "full", *overrides, tiny=tiny)
    (middle,) = (tmp_path / "full" / "checkpoints").glob(f"*step={updates}.ckpt")
    resumed = fitted(script, tmp_path / "resumed", f"resume='{middle}'", *overrides, tiny=tiny)
    expected = losses(tmp_path / "full")
    assert list(expected) == list(range(8)) and len(set(expected.values())) == 8
    assert losses(tmp_path / "resumed") == {step: expected[step] for step in range(micro_batches, 8)}
    assert resumed.read_bytes() == full.read_bytes()


def test_flow_matching_resumes_exactly(tmp_path, cache):
    check_resumed(tmp_path, "train", cache)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_shards_resumes_exactly(tmp_path, workers):
    """Some of the samples are damaged."""
    cfg = composed("train", *ANY_DATA)
    made = {name: hydra.utils.instantiate(cfg[name]) for name in ("audio",)}
    net = hydra.utils.instantiate(cfg.autoencoder)

    def make(key, *size):
        files = sample(key, *size, net=net, **made)
        return files | {"latent.npy": b"damaged"} if key.endswith("3") else files

    folder = write_set(tmp_path / "set", {"train": 7, "dev": 2}, make=make)
    shards = ["data=shards", f"data.urls='{folder}'", "data.on_error=skip", f"data.workers={workers}"]
    shards.append("objective.region_weights.lips=0.0")
    shards += [
        "data.buckets.lengths=[1,4,8]",
        "data.buckets.weights=[1.0,1.0,1.0]",
        "data.buckets.max_latents_per_batch=16",
    ]
    check_resumed(tmp_path, "train", *shards, tiny=ANY_DATA)


@pytest.mark.parametrize("objective", ["teacher_forcing", "consistency"])
def test_causal_training_resumes_exactly(tmp_path, cache, bundles, objective):
    check_resumed(tmp_path, "distill", cache, f"objective={objective}", f"teacher='{bundles['causal_teacher']}'")


@pytest.mark.parametrize(
    "critic_steps, rhythm",
    [(5, {"micro_batches": 4, "updates": 4}), (2, {"micro_batches": 2, "updates": 1, "accumulate": 2})],
    ids=["every micro-batch", "every other micro-batch"],
)
def test_distribution_matching_resumes_exactly_between_student_updates(tmp_path, cache, bundles, critic_steps, rhythm):
    arguments = ["objective=dmd", f"init='{bundles['causal_teacher']}'", f"teacher='{bundles['teacher']}'"]
    arguments += [
        "data.buckets.lengths=[2,3]",
        "data.buckets.max_latents_per_batch=6",
    ]  # the cost of a rollout grows with its chunks
    arguments.append(f"objective.critic_steps={critic_steps}")
    check_resumed(tmp_path, "distill", cache, *arguments, **rhythm)


def test_losses_do_not_depend_on_whether_clips_were_already_encoded(tmp_path):
    """Encoding draws from a random generator of its own, not from that of training."""
    first, second = (fitted("train", tmp_path / name, "steps=2", *SMALL_NET) for name in ("cold", "warm"))
    assert losses(tmp_path / "cold") == losses(tmp_path / "warm")
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def _ctrl_c():
    """Restore Python's SIGINT handler; Lightning ignores the signal after the first one."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def signalled(at: int, *numbers: int):
    """A training step of flow matching that raises signals in micro-batch `at`."""
    training_step = FlowMatching.training_step

    def step(self, batch, index):
        loss = training_step(self, batch, index)  # its random numbers are drawn by now
        for number in numbers if index == at else ():
            signal.raise_signal(number)
        return loss

    return step


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize(
    "numbers, remaining",
    [((signal.SIGINT,), 3), ((signal.SIGINT,) * 2, 4), ((signal.SIGTERM,), 3), ((signal.SIGUSR1,), 3)],
    ids=["Ctrl-C", "Ctrl-C twice", "SIGTERM", "SIGUSR1"],
)
def test_a_signal_in_the_middle_of_a_batch_loses_nothing(tmp_path, cache, monkeypatch, capsys, numbers, remaining):
    """After one signal the current batch is finished; after two it is dropped and repeated by the resumed run."""
    full = fitted("train", tmp_path / "full", "steps=6", *SMALL_NET, cache)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        patch.setattr(FlowMatching, "training_step", signalled(2, *numbers))
        fitted("train", tmp_path / "cut", "steps=6", *SMALL_NET, cache)
    saved = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    message = capsys.readouterr().err
    assert stop.value.args == (numbers[0],) and f"continue with resume={saved}" in message
    # Handled by ExactResume, not by Lightning.
    assert f"{signal.Signals(numbers[0]).name}: stopping after this batch" in message
    assert not (tmp_path / "cut" / "teacher.safetensors").exists()
    resumed = fitted("train", tmp_path / "resumed", "steps=6", *SMALL_NET, cache, f"resume='{saved}'")
    expected = list(losses(tmp_path / "full").values())
    assert list(losses(tmp_path / "resumed").values()) == expected[-remaining:]
    assert resumed.read_bytes() == full.read_bytes()


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_a_signal_between_micro_batches_loses_nothing(tmp_path, cache, monkeypatch, times):
    """Accumulated gradients are lost when a run stops at once, so their micro-batches are repeated."""
    shared = ("steps=3", "accumulate=2", "data.buckets.batch_multiple_of=2", *SMALL_NET, cache)
    full = fitted("train", tmp_path / "full", *shared)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FlowMatching, "training_step", signalled(3, *[signal.SIGINT] * times))
        fitted("train", tmp_path / "cut", *shared)
    resumed = fitted("train", tmp_path / "resumed", *shared, f"resume='{newest(tmp_path / 'cut')}'")
    assert resumed.read_bytes() == full.read_bytes()


def fit_and_be_killed(script: str, folder: str, *overrides: str) -> None:
    """Train a run that gets SIGKILL in its sixth micro-batch."""
    FlowMatching.training_step = signalled(5, signal.SIGKILL)
    fitted(script, Path(folder), *overrides)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path, cache):
    often = ("steps=8", "callbacks.checkpoint.every_n_train_steps=2", *SMALL_NET, cache)
    full = fitted("train", tmp_path / "full", *often)
    if not (child := os.fork()):
        try:
            fit_and_be_killed("train", str(tmp_path / "run"), *often)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    resumed = fitted("train", tmp_path / "run", *often, "resume=last")
    assert resumed.read_bytes() == full.read_bytes()


def test_resume_last_without_a_checkpoint_starts_from_scratch(tmp_path, cache):
    few = ("steps=1", "callbacks.checkpoint.every_n_train_steps=9", "callbacks.checkpoint.save_last=false")
    first, second = (fitted("train", tmp_path / "run", *few, "resume=last", *SMALL_NET, cache) for _ in range(2))
    assert first.exists() and first == second and not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_run_of_two_processes_resumes_exactly(tmp_path, cache, strategy):
    """A run in which only the second process gets SIGTERM resumes exactly too."""
    often = [
        "steps=8",
        "data.buckets.batch_multiple_of=2",
        "callbacks.checkpoint.every_n_train_steps=2",
        *SMALL_NET,
        cache,
    ]
    often += [f"trainer={strategy}", "trainer.devices=2"]
    full, killed, stopped = (str(tmp_path / name) for name in ("full", "killed", "stopped"))
    ranks.run(2, ("tests.test_resume:fit_and_be_killed", ["train", killed, *often]), exit_code=-signal.SIGKILL)
    ranks.run(2, ("tests.test_resume:fit_with_second_stopped", ["train", stopped, *often]))
    resumed = [("tests.ranks:fit", ["train", folder, *often, "resume=last"]) for folder in (killed, stopped)]
    ranks.run(2, ("tests.ranks:fit", ["train", full, *often]), *resumed)
    expected, *got = (Path(folder, "teacher.safetensors").read_bytes() for folder in (full, killed, stopped))
    assert got == [expected] * 2


def fit_with_second_stopped(script: str, folder: str, *overrides: str) -> None:
    """Train with two processes: only the second gets SIGTERM, and both stop before their next batch."""
    if os.environ["RANK"] == "1":
        FlowMatching.training_step = signalled(3, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        fitted(script, Path(folder), *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_a_sharded_run_resumes_with_another_number_of_processes(tmp_path, cache, first, second):
    """The averaged weights, which are exported, are restored too."""
    sgd = ["objective.optimizer._target_=torch.optim.SGD", "~objective.optimizer.betas", "objective.optimizer.lr=0.3"]
    run = ["steps=6", "data.buckets.batch_multiple_of=2", "trainer=fsdp", *sgd, *SMALL_NET, cache]
    often = ["callbacks.checkpoint.every_n_train_steps=3", "+callbacks.checkpoint.save_top_k=-1"]
    started, resumed = str(tmp_path / "started"), str(tmp_path / "resumed")
    ranks.run(first, ("tests.ranks:fit", ["train", started, *run, *often, f"trainer.devices={first}"]))
    (middle,) = Path(started, "checkpoints").glob("step=3.ckpt")
    continued = [*run, f"trainer.devices={second}", f"resume='{middle}'"]
    ranks.run(second, ("tests.ranks:fit", ["train", resumed, *continued]))
    expected, got = (load_file(Path(folder, "teacher.safetensors")) for folder in (started, resumed))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_error_on_one_rank_ends_all_ranks(tmp_path, cache, strategy):
    """No checkpoint is saved: it needs all ranks, and they would wait for the failed one."""
    run = ["steps=4", "data.buckets.batch_multiple_of=2", *SMALL_NET, cache, f"trainer={strategy}", "trainer.devices=2"]
    ranks.run(
        2,
        ("tests.test_resume:fit_with_second_failing", ["train", str(tmp_path / "run"), *run]),
        exit_code=1,
        timeout=90,
    )
    assert not list(tmp_path.glob("run/checkpoints/*"))


def fit_with_second_failing(script: str, folder: str, *overrides: str) -> None:
    """Train with two processes: only the second raises an error."""
    if os.environ["RANK"] == "1":
        FlowMatching.training_step = failing(2)
    fitted(script, Path(folder), *overrides)


def failing(at: int):
    """A training step of flow matching that raises an error in micro-batch `at`."""
    training_step = FlowMatching.training_step

    def step(self, batch, index):
        if index == at:
            raise ValueError("a damaged sample; leave it out")
        return training_step(self, batch, index)

    return step
