"""Checkpoints, as files or folders, are inspected without running pickled code."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

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
    with pytest.raises(ValueError, match="not a checkpoint of a training run"):
        run_checkpoint.read_shapes(path)
    assert not code.path.exists()


def disguise(metadata: Metadata, folder: Path) -> None:
    """Give the entry of a pickled value the attribute of a tensor's."""
    metadata.state_dict_metadata["optimizer_0.lr"].size = torch.Size([1])


def move(metadata: Metadata, folder: Path) -> None:
    """Store a pickled value in a subfolder, beside a harmless file of the same name."""
    location = metadata.storage_data[MetadataIndex("optimizer_0.lr")]
    (folder / "sub").mkdir()
    (folder / location.relative_path).rename(folder / "sub" / location.relative_path)
    torch.save(0.1, folder / location.relative_path)
    location.offset, location.length = 0, (folder / location.relative_path).stat().st_size
    location.relative_path = f"sub/{location.relative_path}"


def transform(metadata: Metadata, folder: Path) -> None:
    metadata.storage_data[MetadataIndex("optimizer_0.lr")].transform_descriptors = ["zstd"]


@pytest.mark.parametrize("change", [disguise, move, transform])
def test_values_that_torch_would_read_differently_are_rejected(tmp_path, weights, change):
    code, path = Code(tmp_path / "ran"), tmp_path / "step=3.ckpt"
    dcp.save({"state_dict": weights, "optimizer_0": {"lr": code}}, checkpoint_id=path)
    torch.save({}, path / run_checkpoint.META_FILE)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata, path)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not a checkpoint of a training run"):
        run_checkpoint.read_shapes(path)
    assert not code.path.exists()


def test_metadata_cannot_change_classes(folder):
    name = b"\x8c'torch.distributed.checkpoint.filesystem\x8c\x0c_StorageInfo\x93"
    (folder / ".metadata").write_bytes(b"\x80\x04" + name + b"N}\x8c\x06offset\x8c\x01xs\x86b.")
    with pytest.raises(ValueError, match="attributes of a class"):
        run_checkpoint.read_shapes(folder)
    assert not hasattr(_StorageInfo, "offset")
