"""Each rank of a resumed run restores its own RNG state."""

from types import SimpleNamespace

import pytest
import torch

from avatar.training.callbacks import exact_resume


@pytest.mark.parametrize("saved, rank, expected", [(2, 0, 0), (2, 1, 1), (1, 1, 0), (3, 1, 0)])
def test_a_rank_restores_its_rng_state(monkeypatch, saved, rank, expected):
    """With another number of ranks, all restore the first state: draws for the global batch are equal on all ranks."""
    states = [torch.Generator().manual_seed(n).get_state() for n in range(saved)]
    monkeypatch.setattr(exact_resume, "world_size", lambda: 2)
    monkeypatch.setattr(exact_resume.dist, "get_rank", lambda: rank)
    resume = exact_resume.ExactResume()
    resume.data = SimpleNamespace(accumulate=1, start=0)
    resume.load_state_dict({"micro_batches": 5, "random": [{"cpu": state, "cuda": None} for state in states]})
    strategy = SimpleNamespace(reduce_boolean_decision=lambda found, all: found)
    resume.on_train_batch_start(SimpleNamespace(strategy=strategy))
    assert torch.equal(torch.get_rng_state(), states[expected]) and resume.data.start == 5
