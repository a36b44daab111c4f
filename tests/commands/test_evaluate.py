"""An evaluation of any kind of bundle writes a complete report with plots: random networks, a few frames."""

import json
from pathlib import Path

import pytest
from PIL import Image

from avatar.commands.evaluate import evaluate
from avatar.metrics.report import CONTROLS
from tests.stages import composed, random_autoencoder, random_bundle

PIXELS, STATES = ("latent.channels=4",), ("autoencoder=states", "model=states")
SMALL = (
    "clips=2",
    "reference_motion=2",
    "latents=2",
    "stream_frames=12",
    "threads=1",
    "workers=0",
    "teacher_sampler.steps=2",
    "responses=0",
)
MANY = [1.0, 0.8, 0.6, 0.4, 0.2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of the bundles and of the clips, which all evaluations share."""
    folder = tmp_path_factory.mktemp("evaluate")
    random_autoencoder(folder / "autoencoder.safetensors")
    return folder


def evaluated(folder: Path, name: str, *overrides: str) -> dict:
    place = [f"folder='{folder / name}'", f"cache='{folder / 'cache'}'"]
    evaluate(composed("evaluate", *SMALL, *place, *overrides))
    report = json.loads((folder / name / "report.json").read_text())
    assert set(report["controls"]) == set(CONTROLS) and None not in report["controls"].values()
    return report


def pixels(folder: Path, kind: str) -> list[str]:
    bundle = random_bundle(folder / f"{kind}.safetensors", kind, *PIXELS)
    return [f"autoencoder.path='{folder / 'autoencoder.safetensors'}'", f"student='{bundle}'"]


def test_student_and_teacher_are_evaluated_together(folder):
    teacher = random_bundle(folder / "its_teacher.safetensors", "teacher", *PIXELS)
    report = evaluated(folder, "student", *pixels(folder, "student"), f"teacher='{teacher}'")
    assert report["teacher"]["clips"] == report["student"]["clips"] == 2 and report["teacher"] != report["student"]
    assert report["control"] is None and report["student"]["frechet"] is None  # too short, too few
    assert report["stream"]["frames"] == 12 and report["stream"]["evaluations_per_chunk"] == 3
    page = (folder / "student" / "report.md").read_text()
    assert "|  | ground truth | autoencoder | frozen | shuffled audio | teacher | student |" in page
    with Image.open(folder / "student" / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 100
    assert "](contact_sheet.png)" in page


def test_a_bidirectional_teacher_is_evaluated_without_streaming(folder):
    report = evaluated(folder, "teacher", *pixels(folder, "teacher"), "teacher=null")
    assert report["stream"] is None and report["teacher"] is None
    page = (folder / "teacher" / "report.md").read_text()
    assert "## Stream" not in page and "](contact_sheet.png)" in page


def test_motion_and_control_are_scored_if_clips_are_long_enough(folder):
    bundle = random_bundle(folder / "labels.safetensors", "student", *STATES)
    many = (
        "clips=4",
        "latents=12",
        "reference_motion=4",
        "control=2",
        "schedule=mixed",
        "scene=full",
        "autoencoder=states",
    )
    report = evaluated(folder, "control", *many, "autoencoder=states", f"student='{bundle}'", "teacher=null")
    truth = report["controls"]["ground_truth"]
    assert truth["motion_amount"] > 0.5 and report["controls"]["frozen"]["motion_amount"] == 0
    assert truth["emotion_accuracy"] == 1
    assert {"emotion", "emotion_text", "gesture_text", "state"} < set(report["control"])
    assert report["stages"]["control"] > 0
    for found in report["control"].values():
        assert 0 < found["pairs"] <= 2 and 0 <= found["accuracy"] <= 1 and found["truth"] > 0
    page = (folder / "control" / "control.html").read_text()
    assert page.count("data:image/webp;base64,") >= 4 * 4 and "http" not in page
    assert "## Control" in (folder / "control" / "report.md").read_text()


def test_a_causal_teacher_is_sampled_with_the_timesteps_of_its_plan(folder):
    plan = {"times": MANY, "chunk": 2, "first_chunk": 1, "window": 8, "context": "clean"}
    bundle = random_bundle(folder / "many.safetensors", "causal_teacher", *STATES, plan=plan)
    options = ("autoencoder=states", "teacher=null", "responses=1")
    report = evaluated(folder, "causal", *options, f"student='{bundle}'")
    assert report["response"]["gesture"]["streams"] == 1 and 0 <= report["response"]["emotion"]["responded"] <= 1
    assert "## Response" in (folder / "causal" / "report.md").read_text()
    assert report["stream"]["evaluations_per_chunk"] == len(MANY) + 1
