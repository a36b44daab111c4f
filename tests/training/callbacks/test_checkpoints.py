"""A failed run saves a checkpoint, unless it has several ranks and only one of them failed."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from avatar.training.callbacks import checkpoints


@pytest.mark.parametrize(
    "ranks, error, saves",
    [(1, ValueError(), True), (2, KeyboardInterrupt(), True), (2, ValueError(), False), (2, RuntimeError(), False)],
)
def test_several_ranks_save_only_when_they_stop_together(tmp_path, monkeypatch, ranks, error, saves):
    saved = []
    monkeypatch.setattr(checkpoints, "world_size", lambda: ranks)
    monkeypatch.setattr(ModelCheckpoint, "on_exception", lambda self, *arguments: saved.append(arguments))
    checkpoints.Checkpoints(tmp_path, save_on_exception=True).on_exception(None, None, error)
    assert bool(saved) == saves
