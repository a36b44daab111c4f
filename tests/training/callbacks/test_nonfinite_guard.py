"""Updates whose losses or gradients are no numbers are left out or end the run, and their batches are kept."""

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
def spoil(monkeypatch):
    """Let the loss of these calls be NaN, or have gradients that are."""
    flow_matching, calls = losses.flow_matching, []

    def spoilt_at(*which: int, gradients: bool = False) -> None:
        def spoilt(*arguments):
            calls.append(1)
            loss = flow_matching(*arguments)
            if len(calls) - 1 not in which:
                return loss
            return loss + (loss - loss.detach()).sqrt() if gradients else loss * float("nan")

        monkeypatch.setattr(losses, "flow_matching", spoilt)

    return spoilt_at


def weights_after(folder: Path, *overrides: str) -> list[dict]:
    """The network's weights after each update."""
    often = ["callbacks.checkpoint.every_n_train_steps=1", "+callbacks.checkpoint.save_top_k=-1"]
    fitted("train", folder, *SMALL_NET, *often, "steps=4", "+trainer.limit_val_batches=0", *overrides)
    paths = [folder / "checkpoints" / f"step={n}.ckpt" for n in range(1, 5)]
    return [torch.load(path, weights_only=True)["state_dict"] for path in paths]


@pytest.mark.parametrize("gradients", [False, True], ids=["loss", "gradients"])
def test_an_update_that_is_no_number_is_left_out_and_its_batch_kept(tmp_path, spoil, caplog, gradients):
    spoil(1, gradients=gradients)
    states = weights_after(tmp_path / "run", "callbacks.nonfinite_guard.skips=1")
    (path,) = (tmp_path / "run" / "nonfinite").iterdir()
    batch = torch.load(path, weights_only=True)
    assert batch["latents"].shape[0] == len(batch["keys"]) and batch["conditioning"]["audio"].isfinite().all()
    assert all(key in caplog.text for key in batch["keys"]) and "after 1 updates" in caplog.text
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(states)]
    assert same == [True, False, False] and all(w.isfinite().all() for w in states[-1].values())


def test_more_in_a_row_than_may_be_left_out_end_the_run(tmp_path, spoil):
    spoil(1, 2)
    with pytest.raises(ValueError, match=r"a loss is nan after 2 updates.*nonfinite"):
        weights_after(tmp_path / "run", "callbacks.nonfinite_guard.skips=1")
    assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 2


def update(finite: NonFiniteGuard, gradient: float, elsewhere: bool = False) -> bool:
    """Whether an update with this gradient is left out, when another rank found something or didn't."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.full((2,), gradient)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda found, all: found or elsewhere, barrier=lambda: None)
    trainer = SimpleNamespace(strategy=strategy, global_step=7, global_rank=0)
    finite.on_train_batch_start(trainer, None, Keyed(["a"]), 0)
    finite.on_before_optimizer_step(trainer, None, optimizer)
    return weight.grad is None


@dataclass
class Keyed:
    keys: list[str]


def test_what_another_rank_found_leaves_the_update_out_here_too(tmp_path):
    finite = NonFiniteGuard(str(tmp_path), skips=1)
    assert update(finite, 1.0, elsewhere=True) and finite.skipped == 1
    with pytest.raises(ValueError, match="loss of another rank"):
        update(finite, 1.0, elsewhere=True)


def test_updates_left_out_are_counted_in_a_row_and_across_checkpoints(tmp_path):
    nan, finite = float("nan"), NonFiniteGuard(str(tmp_path), skips=1)
    assert [update(finite, gradient) for gradient in (nan, 1.0, nan)] == [True, False, True]
    resumed = NonFiniteGuard(str(tmp_path), skips=1)
    resumed.load_state_dict(finite.state_dict())
    with pytest.raises(ValueError, match="norm of gradients is nan"):
        update(resumed, nan)
