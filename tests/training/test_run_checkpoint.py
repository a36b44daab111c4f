"""Checkpoints, as files or folders, are inspected without running pickled code."""

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


class Code:
    """An object whose pickle creates a file when it is loaded."""

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
    torch.save({"global_step": 1}, path / run_checkpoint.META_FILE)
    return path


def test_shapes_are_read_from_files_and_folders(tmp_path, weights, folder):
    expected = {name: weight.shape for name, weight in weights.items()}
    torch.save({"state_dict": weights}, tmp_path / "file.ckpt")
    assert run_checkpoint.read_shapes(tmp_path / "file.ckpt") == expected
    assert run_checkpoint.read_shapes(folder) == expected


def test_newest_is_the_last_complete_checkpoint(tmp_path, weights, folder):
    end = folder / run_checkpoint.META_FILE
    torch.save({"state_dict": weights}, tmp_path / "last.ckpt")
    for newest, other in ((folder, tmp_path / "last.ckpt"), (tmp_path / "last.ckpt", end)):
        os.utime(end if newest == folder else newest, (2, 2))
        os.utime(other, (1, 1))
        assert run_checkpoint.newest(tmp_path) == newest
    os.utime(end, (3, 3))
    end.unlink()  # as after a kill while the checkpoint was saved
    assert run_checkpoint.newest(tmp_path) == tmp_path / "last.ckpt"
    assert run_checkpoint.newest(tmp_path / "none") is None


@pytest.mark.parametrize("where", ["file", "meta file", "metadata", "dotted", "value"])
def test_pickled_code_is_rejected_and_never_run(tmp_path, weights, folder, where):
    code, path = Code(tmp_path / "ran"), folder
    if where == "file":
        path = tmp_path / "file.ckpt"
        torch.save({"state_dict": weights, "more": code}, path)
    elif where == "meta file":
        torch.save({"more": code}, folder / run_checkpoint.META_FILE)
    elif where == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(code))
    elif where == "dotted":  # a function of a module that an allowed module of torch imports
        name = b"\x8c'torch.distributed.checkpoint.filesystem\x8c\tos.system\x93"
        (folder / ".metadata").write_bytes(b"\x80\x04" + name + b"\x8c\x04true\x85R.")
    else:
        path = tmp_path / "step=2.ckpt"
        dcp.save({"state_dict": weights, "optimizer_0": {"lr": code}}, checkpoint_id=path)
        torch.save({}, path / run_checkpoint.META_FILE)
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        run_checkpoint.read_shapes(path)
    assert not code.path.exists()
