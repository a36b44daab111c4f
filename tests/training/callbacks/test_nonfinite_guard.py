"""Updates with NaN or infinite losses or gradients are skipped or end the run, and their batches are saved."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from avatar.objectives import losses
from avatar.training.callbacks.nonfinite_guard import NonFiniteGuard
from tests.stages import FILTERS, SMALL_NET, fitted

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


@pytest.fixture
def corrupt(monkeypatch):
    """A function that makes the losses of these calls, or only their gradients, NaN."""
    flow_matching, calls = losses.flow_matching, []

    def corrupt_at(*which: int, gradients: bool = False) -> None:
        def corrupted(*arguments):
            calls.append(1)
            loss = flow_matching(*arguments)
            if len(calls) - 1 not in which:
                return loss
            return loss + (loss - loss.detach()).sqrt() if gradients else loss * float("nan")

        monkeypatch.setattr(losses, "flow_matching", corrupted)

    return corrupt_at


def weights_after(folder: Path, *overrides: str) -> list[dict]:
    """Train for four updates, and return the network's weights after each."""
    often = ["callbacks.checkpoint.every_n_train_steps=1", "+callbacks.checkpoint.save_top_k=-1"]
    fitted("train", folder, *SMALL_NET, *often, "steps=4", "+trainer.limit_val_batches=0", *overrides)
    paths = [folder / "checkpoints" / f"step={n}.ckpt" for n in range(1, 5)]
    return [torch.load(path, weights_only=True)["state_dict"] for path in paths]


@pytest.mark.parametrize("gradients", [False, True], ids=["loss", "gradients"])
def test_a_nonfinite_update_is_skipped_and_its_batch_saved(tmp_path, corrupt, caplog, gradients):
    corrupt(1, gradients=gradients)
    states = weights_after(tmp_path / "run", "callbacks.nonfinite_guard.skips=1")
    (path,) = (tmp_path / "run" / "nonfinite").iterdir()
    batch = torch.load(path, weights_only=True)
    assert batch["latents"].shape[0] == len(batch["keys"]) and batch["conditioning"]["audio"].isfinite().all()
    assert all(key in caplog.text for key in batch["keys"]) and "after 1 updates" in caplog.text
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(states)]
    assert same == [True, False, False] and all(w.isfinite().all() for w in states[-1].values())


def test_more_consecutive_updates_than_may_be_skipped_end_the_run(tmp_path, corrupt):
    corrupt(1, 2)
    with pytest.raises(ValueError, match=r"a loss is nan after 2 updates.*nonfinite"):
        weights_after(tmp_path / "run", "callbacks.nonfinite_guard.skips=1")
    assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 2


def is_skipped(guard: NonFiniteGuard, gradient: float, elsewhere: bool = False) -> bool:
    """Whether the guard skips an update with this gradient; `elsewhere`: another rank found NaN or infinity."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.full((2,), gradient)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda found, all: found or elsewhere, barrier=lambda: None)
    trainer = SimpleNamespace(strategy=strategy, global_step=7, global_rank=0)
    guard.on_train_batch_start(trainer, None, Keyed(["a"]), 0)
    guard.on_before_optimizer_step(trainer, None, optimizer)
    return weight.grad is None


@dataclass
class Keyed:
    keys: list[str]


def test_all_ranks_skip_an_update_if_one_of_them_does(tmp_path):
    guard = NonFiniteGuard(str(tmp_path), skips=1)
    assert is_skipped(guard, 1.0, elsewhere=True) and guard.skipped == 1
    with pytest.raises(ValueError, match="loss of another rank"):
        is_skipped(guard, 1.0, elsewhere=True)


def test_consecutive_skips_are_counted_across_checkpoints(tmp_path):
    nan, guard = float("nan"), NonFiniteGuard(str(tmp_path), skips=1)
    assert [is_skipped(guard, gradient) for gradient in (nan, 1.0, nan)] == [True, False, True]
    resumed = NonFiniteGuard(str(tmp_path), skips=1)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(ValueError, match="norm of gradients is nan"):
        is_skipped(resumed, nan)
