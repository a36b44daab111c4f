"""A run that is resumed makes the losses that it would have made, to the last bit."""

import csv
import signal
from collections.abc import Sequence
from pathlib import Path

import hydra
import pytest

from avatar.objectives.flow_matching import FlowMatching
from tests.data.shard_sets import sample, write_set
from tests.stages import ANY_DATA, FILTERS, SMALL_NET, TINY, composed, fitted, random_bundle

MEANT = (
    "ignore:You're resuming from a checkpoint",
    "ignore:The dirpath has changed",
    "ignore:Using ModelCheckpoint with manual",
)
pytestmark = [pytest.mark.filterwarnings(text) for text in (*FILTERS, *MEANT)]


def losses(folder: Path) -> dict[int, tuple[str, ...]]:
    """By batch, every training loss in the metrics, as written."""
    (path,) = folder.glob("metrics/*/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    told = [(int(row["step"]), tuple(v for k, v in row.items() if "train" in k and "loss" in k)) for row in rows]
    return {step: values for step, values in told if any(values)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Encoded clips that the runs of all these tests share, as an argument."""
    folder = tmp_path_factory.mktemp("shared")
    fitted("train", folder / "first", "steps=1", *SMALL_NET)
    return f"cache='{folder / 'cache'}'"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """What distillations start from."""
    folder, states = tmp_path_factory.mktemp("bundles"), ("world=states", "model=states")
    return {
        kind: random_bundle(folder / f"{kind}.safetensors", kind, *states) for kind in ("teacher", "causal_teacher")
    }


def check_resumed(
    tmp_path: Path,
    script: str,
    *overrides: str,
    batches: int = 4,
    updates: int = 4,
    tiny: Sequence[str] = TINY,
) -> None:
    """Compare a run of 8 batches with one that goes on after so many, which are so many updates."""
    often = ["+callbacks.checkpoint.save_top_k=-1", f"callbacks.checkpoint.every_n_train_steps={updates}"]
    overrides = ("steps=8", *often, *SMALL_NET, *overrides)
    whole = fitted(script, tmp_path / "whole", *overrides, tiny=tiny)
    (middle,) = (tmp_path / "whole" / "checkpoints").glob(f"*step={updates}.ckpt")
    resumed = fitted(script, tmp_path / "resumed", f"resume='{middle}'", *overrides, tiny=tiny)
    expected = losses(tmp_path / "whole")
    assert list(expected) == list(range(8)) and len(set(expected.values())) == 8
    assert losses(tmp_path / "resumed") == {step: expected[step] for step in range(batches, 8)}
    assert resumed.read_bytes() == whole.read_bytes()


def test_flow_matching_resumes_exactly(tmp_path, cache):
    check_resumed(tmp_path, "train", cache)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_shards_resumes_exactly(tmp_path, workers):
    """With samples that can't be read, too."""
    cfg = composed("train", *ANY_DATA)
    made = {name: hydra.utils.instantiate(cfg[name]) for name in ("audio",)}
    net = hydra.utils.instantiate(cfg.world.autoencoder)

    def make(key, *size):
        files = sample(key, *size, net=net, **made)
        return files | {"latent.npy": b"damaged"} if key.endswith("3") else files

    folder = write_set(tmp_path / "set", {"train": 7, "dev": 2}, make=make)
    shards = ["data=shards", f"data.urls='{folder}'", "data.on_error=skip", f"data.workers={workers}"]
    shards += ["data.buckets.lengths=[1,4,8]", "data.buckets.weights=[1.0,1.0,1.0]", "data.buckets.budget=16"]
    check_resumed(tmp_path, "train", *shards, tiny=ANY_DATA)


@pytest.mark.parametrize("objective", ["teacher_forcing", "consistency"])
def test_causal_training_resumes_exactly(tmp_path, cache, bundles, objective):
    check_resumed(tmp_path, "distill", cache, f"objective={objective}", f"teacher='{bundles['causal_teacher']}'")


@pytest.mark.parametrize(
    "rhythm",
    [{"batches": 4, "updates": 4}, {"batches": 2, "updates": 1, "accumulate": 2, "critic_steps": 2}],
    ids=["every batch", "every other batch"],
)
def test_distribution_matching_resumes_exactly_on_its_way_to_a_students_update(tmp_path, cache, bundles, rhythm):
    arguments = ["objective=dmd", f"init='{bundles['causal_teacher']}'", f"teacher='{bundles['teacher']}'"]
    arguments += ["data.buckets.lengths=[2,3]", "data.buckets.budget=6"]  # rollouts cost by the chunk
    arguments += [f"objective.{name}={value}" for name, value in rhythm.items() if name not in ("batches", "updates")]
    check_resumed(tmp_path, "distill", cache, *arguments, batches=rhythm["batches"], updates=rhythm["updates"])


def test_a_seed_gives_the_same_losses_whether_clips_were_encoded_before_or_now(tmp_path):
    """Encoding may draw numbers; it must not be from the training's."""
    first, second = (fitted("train", tmp_path / name, "steps=2", *SMALL_NET) for name in ("cold", "warm"))
    assert losses(tmp_path / "cold") == losses(tmp_path / "warm")
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def _ctrl_c():
    """Ctrl-C as it is when a program starts; Lightning lets it do nothing when it was heard once."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_ctrl_c_in_the_middle_of_a_batch_loses_nothing(tmp_path, cache, monkeypatch, times):
    """Once, the batch under way is finished; twice, it is given up and made again as it was."""
    whole = fitted("train", tmp_path / "whole", "steps=6", *SMALL_NET, cache)
    training_step = FlowMatching.training_step

    def interrupted(self, batch, index):
        loss = training_step(self, batch, index)  # has drawn its numbers
        if index == 2:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FlowMatching, "training_step", interrupted)
        fitted("train", tmp_path / "cut", "steps=6", *SMALL_NET, cache)
    assert not (tmp_path / "cut" / "teacher.safetensors").exists()
    saved = max((tmp_path / "cut" / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed = fitted("train", tmp_path / "resumed", "steps=6", *SMALL_NET, cache, f"resume='{saved}'")
    expected = list(losses(tmp_path / "whole").values())
    assert list(losses(tmp_path / "resumed").values()) == expected[3 if times == 1 else 2 :]
    assert resumed.read_bytes() == whole.read_bytes()
