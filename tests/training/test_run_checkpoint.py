"""Checkpoints are looked into without running what they carry, be they files or folders."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from avatar.training import run_checkpoint
from tests.conftest import make_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


class Bomb:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return make_net().state_dict()


@pytest.fixture
def folder(tmp_path, weights) -> Path:
    path = tmp_path / "step=1.ckpt"
    dcp.save({"state_dict": weights, "optimizer_0": {"lr": 0.1}}, checkpoint_id=path)
    torch.save({"global_step": 1}, path / run_checkpoint.BESIDE_WEIGHTS)
    return path


def test_files_and_folders_tell_the_shapes_of_weights(tmp_path, weights, folder):
    expected = {name: weight.shape for name, weight in weights.items()}
    torch.save({"state_dict": weights}, tmp_path / "file.ckpt")
    assert run_checkpoint.shapes(tmp_path / "file.ckpt") == expected
    assert run_checkpoint.shapes(folder) == expected


def test_the_newest_is_the_one_that_was_written_to_its_end_last(tmp_path, weights, folder):
    end = folder / run_checkpoint.BESIDE_WEIGHTS
    torch.save({"state_dict": weights}, tmp_path / "last.ckpt")
    for newest, other in ((folder, tmp_path / "last.ckpt"), (tmp_path / "last.ckpt", end)):
        os.utime(end if newest == folder else newest, (2, 2))
        os.utime(other, (1, 1))
        assert run_checkpoint.newest(tmp_path) == newest
    os.utime(end, (3, 3))
    end.unlink()  # as in a run that was killed while it saved
    assert run_checkpoint.newest(tmp_path) == tmp_path / "last.ckpt"
    assert run_checkpoint.newest(tmp_path / "none") is None


@pytest.mark.parametrize("where", ["file", "beside", "description", "dotted", "value"])
def test_what_carries_code_is_refused_before_it_runs(tmp_path, weights, folder, where):
    bomb, path = Bomb(tmp_path / "ran"), folder
    if where == "file":
        path = tmp_path / "file.ckpt"
        torch.save({"state_dict": weights, "more": bomb}, path)
    elif where == "beside":
        torch.save({"more": bomb}, folder / run_checkpoint.BESIDE_WEIGHTS)
    elif where == "description":
        (folder / ".metadata").write_bytes(pickle.dumps(bomb))
    elif where == "dotted":  # a function that one of torch's own modules happens to have imported
        name = b"\x8c'torch.distributed.checkpoint.filesystem\x8c\tos.system\x93"
        (folder / ".metadata").write_bytes(b"\x80\x04" + name + b"\x8c\x04true\x85R.")
    else:
        path = tmp_path / "step=2.ckpt"
        dcp.save({"state_dict": weights, "optimizer_0": {"lr": bomb}}, checkpoint_id=path)
        torch.save({}, path / run_checkpoint.BESIDE_WEIGHTS)
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        run_checkpoint.shapes(path)
    assert not bomb.path.exists()
