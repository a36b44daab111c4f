"""The full chain of stages learns: teacher → causal teacher → consistency → student, scored on held-out puppets.

It runs in the state world, whose frames are the puppet's state vectors: that takes seconds instead of minutes, and all
components but the pixels are the shipped ones.
"""

import json

import pytest

from avatar.commands.evaluate import evaluate
from tests.stages import FILTERS, composed, fitted

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
DATA = (
    "data.train.count=64",
    "data.train.latents=16",
    "data.train.schedule=speaking",
    "data.buckets.max_latents_per_batch=96",
    "+trainer.limit_val_batches=0",
)
JUMPS = ("objective=consistency", "objective.discretisation=8")
NET = ("model.network.layers=3", "objective.optimizer.lr=2e-3")


def test_a_student_of_all_stages_follows_the_audio(tmp_path):
    teacher = fitted("train", tmp_path / "teacher", *DATA, *NET, "steps=400")
    causal = fitted(
        "distill", tmp_path / "causal", *DATA, "objective=teacher_forcing", "steps=50", f"teacher='{teacher}'"
    )
    jumps = fitted("distill", tmp_path / "jumps", *DATA, *JUMPS, "steps=40", f"teacher='{causal}'")
    student = fitted(
        "distill", tmp_path / "student", *DATA, "objective=dmd", "steps=12", f"init='{jumps}'", f"teacher='{teacher}'"
    )
    evaluate(
        composed(
            "evaluate",
            "autoencoder=states",
            f"student='{student}'",
            f"teacher='{teacher}'",
            f"folder='{tmp_path / 'scores'}'",
            f"cache='{tmp_path / 'cache'}'",
            "clips=12",
            "latents=12",
            "stream_frames=80",
            "reference_motion=0",
            "control=0",
            "responses=0",
            "threads=1",
            "workers=0",
        )
    )
    report = json.loads((tmp_path / "scores" / "report.json").read_text())
    lip_sync = {name: report["controls"][name]["lip_sync_r"] for name in ("autoencoder", "shuffled_audio")}
    lip_sync |= {name: report[name]["lip_sync_r"] for name in ("teacher", "student")}
    assert lip_sync["autoencoder"] > 0.99
    assert lip_sync["teacher"] > 0.55 and lip_sync["student"] > 0.55 and lip_sync["shuffled_audio"] < 0.2, lip_sync
    assert report["student"]["undecodable_rate"] < 0.1
    assert report["stream"]["frames"] == 80 and report["stream"]["evaluations_per_chunk"] <= 4
