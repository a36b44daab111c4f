"""A run that is resumed makes the losses that it would have made, to the last bit."""

import csv
from pathlib import Path

import pytest

from tests.stages import FILTERS, fitted

MEANT = (
    "ignore:You're resuming from a checkpoint",
    "ignore:The dirpath has changed",
    "ignore:Using ModelCheckpoint with manual",
)
pytestmark = [pytest.mark.filterwarnings(text) for text in (*FILTERS, *MEANT)]
EVERY = ("steps=8", "callbacks.checkpoint.every_n_train_steps=4", "+callbacks.checkpoint.save_top_k=-1")


def losses(folder: Path) -> dict[int, tuple[str, ...]]:
    """By batch, every training loss in the metrics, as written."""
    (path,) = folder.glob("metrics/*/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    told = [(int(row["step"]), tuple(v for k, v in row.items() if "train" in k and "loss" in k)) for row in rows]
    return {step: values for step, values in told if any(values)}


def check_resumed(tmp_path: Path, script: str, *overrides: str) -> None:
    whole = fitted(script, tmp_path / "whole", *EVERY, *overrides)
    (middle,) = (tmp_path / "whole" / "checkpoints").glob("*step=4.ckpt")
    resumed = fitted(script, tmp_path / "resumed", *EVERY, f"resume='{middle}'", *overrides)
    expected = losses(tmp_path / "whole")
    assert list(expected) == list(range(8)) and len(set(expected.values())) == 8
    assert losses(tmp_path / "resumed") == {step: expected[step] for step in range(4, 8)}
    assert resumed.read_bytes() == whole.read_bytes()


def test_flow_matching_resumes_exactly(tmp_path):
    check_resumed(tmp_path, "train")


def test_distribution_matching_resumes_exactly_on_its_way_to_a_students_update(tmp_path):
    teacher = fitted("train", tmp_path / "teacher", "steps=2")
    causal = fitted(
        "distill", tmp_path / "causal", "objective=teacher_forcing", "steps=2", f"init='{teacher}'", "teacher=null"
    )
    check_resumed(tmp_path, "distill", "objective=dmd", f"init='{causal}'", f"teacher='{teacher}'")
