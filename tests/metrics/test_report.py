"""Reports: content, missing values, tables, plots and atomic writes."""

import json

import numpy as np
import pytest
from PIL import Image

from avatar import files
from avatar.metrics import report
from avatar.metrics.scores import score
from avatar.metrics.state_estimation import EstimatedClip
from avatar.puppet.motion import CHANNELS

STREAM = {
    "first_frame_s": 0.21,
    "chunk_p50_s": 0.05,
    "real_time_factor": 0.4,
    "frames": 2000,
    "evaluations_per_chunk": 4,
}


def estimated(seed: int, frames: int = 120, noise: float = 0.1) -> EstimatedClip:
    rng = np.random.default_rng(seed)
    truth = (0.5 + 0.4 * np.sin(np.cumsum(rng.uniform(0.2, 0.9, frames)))).astype(np.float32)
    return EstimatedClip(
        mouth_open=(truth + rng.normal(0, noise, frames)).clip(0, 1).astype(np.float32),
        valid=np.arange(frames) != 17,
        delta_e=rng.uniform(1, 2, frames).astype(np.float32),
        motion=rng.uniform(0.01, 0.03, frames).astype(np.float32),
        truth_mouth=truth,
        truth_motion=np.full(frames, 0.02, np.float32),
        silent=np.zeros(frames, bool),
        closures_s=np.zeros(0),
        states=np.zeros((frames, len(CHANNELS)), np.float32),
        truth_states=np.zeros((frames, len(CHANNELS)), np.float32),
        **dict.fromkeys(("state", "emotion", "gesture", "doing"), np.zeros(frames, int)),
    )


def clips(noise: float, frames: int = 120) -> list[EstimatedClip]:
    return [estimated(seed, frames, noise) for seed in range(3)]


@pytest.fixture(scope="module")
def content():
    controls = {
        "ground_truth": score(clips(0.01)),
        "autoencoder": score(clips(0.05)),
        "shuffled_audio": score(clips(3.0)),
    }
    student = score(clips(0.2)) | {"drift": score(clips(0.2, 1200))["drift"]}
    return report.assemble(controls, score(clips(0.1)), student, STREAM, {"teacher": 12.5, "student": 3.0}, seed=7)


def video(colour: int, frames: int, size: int = 16) -> np.ndarray:
    """Frames with the row as their red and the number of the frame as their green."""
    out = np.zeros((frames, size, size, 3), np.uint8)
    out[..., 0], out[..., 1] = colour, np.arange(frames)[:, None, None]
    return out


def test_a_report_is_the_same_after_writing_and_reading(tmp_path, content):
    report.write(tmp_path, content, ["contact_sheet.png"])
    assert json.loads((tmp_path / "report.json").read_text()) == content
    keys = {"controls", "teacher", "student", "stream", "stages", "machine", "versions", "git", "seed"}
    assert keys <= set(content) and set(content["controls"]) == set(report.CONTROLS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_nan_and_infinity_become_null(tmp_path, content):
    changed = {**content, "stream": {"first_frame_s": float("nan"), "chunks": [float("inf"), 1.0]}}
    report.write(tmp_path, changed)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["stream"] == {"first_frame_s": None, "chunks": [None, 1.0]}


def test_ratios_are_relative_to_the_autoencoder_and_null_without_it(content):
    ratio = content["lip_sync_ratio"]
    bound = content["controls"]["autoencoder"]["lip_sync_r"]
    assert ratio["autoencoder"] == 1 and ratio["student"] == content["student"]["lip_sync_r"] / bound
    assert ratio["ground_truth"] > 1 > ratio["teacher"] > ratio["student"] > ratio["shuffled_audio"]
    assert ratio["frozen"] is None
    alone = report.assemble({}, None, content["student"], None, {}, seed=0)
    assert set(alone["lip_sync_ratio"].values()) == {None}
    assert "| student |" in report.markdown(alone)


def test_the_page_has_a_column_for_each_system_and_the_versions(tmp_path, content):
    report.write(tmp_path, content, ["contact_sheet.png"])
    page = (tmp_path / "report.md").read_text()
    assert "|  | ground truth | autoencoder | shuffled audio | teacher | student |" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| lip-sync r, lag 0")]
    assert f"{content['student']['lip_sync_r']:.3f} |" in row and row.count("|") == 7
    for words in (
        "![contact sheet](contact_sheet.png)",
        "student: identity_delta_e",
        "real",
        "12.5",
        "torch",
        "| seed | 7 |",
    ):
        assert words in page, words
    tables = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert set(tables) <= {3, 6, 7}


def test_the_effects_of_labels_are_compared_with_the_ground_truth(content):
    found = {"accuracy": 0.25, "accuracy_ci": [0.0, 0.5], "stayed": 0.75, "pairs": 8, "truth": 0.5, "ratio": 0.5}
    found["autoencoder"] = 0.4
    made = report.assemble({}, None, content["student"], None, {}, 0, control={"emotion": found})
    assert made["control"] == {"emotion": found} and content["control"] is None
    assert "| emotion | 0.25 | 0.00 … 0.50 | 0.50 | 0.50 | 0.40 | 0.75 | – | 8 |" in report.markdown(made)
    assert "## Control" not in report.markdown(content)


def test_every_score_has_a_row(content):
    without_row = {"drift"} | {key for key in content["student"] if key.endswith("_ci")} - set(report.ROWS)
    assert set(report.ROWS) == set(content["student"]) - without_row | {"lip_sync_ratio"}


def test_an_unknown_control_is_rejected():
    with pytest.raises(ValueError, match="the controls groundtruth; expected some of ground_truth"):
        report.assemble({"groundtruth": score([])}, None, None, None, {}, 0)


def test_the_contact_sheet_shows_equally_spaced_frames_per_system():
    rows = {
        name: [video(k, 50), video(k, 30)] for k, name in ((60, "ground truth"), (120, "teacher"), (180, "student"))
    }
    sheet = report.contact_sheet(rows, ["first", "second"], columns=5, scale=2)
    block = 2 * report.SIZE + 3 * 32 + report.GAP
    assert sheet.size == (report.LABEL + 5 * 32, 2 * block)
    pixels = np.asarray(sheet)
    for clip, frames in enumerate((50, 30)):
        for row, red in enumerate((60, 120, 180)):
            found = pixels[clip * block + 2 * report.SIZE + row * 32 + 16, report.LABEL + 16 :: 32]
            np.testing.assert_array_equal(found[:, 0], red)
            np.testing.assert_array_equal(found[:, 1], np.linspace(0, frames - 1, 5).round())


def test_labels_fit_in_their_column():
    """The column is white at its left, so the longest name is not cut."""
    rows = {name: [video(0, 9, 64)] for name in ("ground truth", "shuffled audio", "autoencoder")}
    column = np.asarray(report.contact_sheet(rows, ["a clip"]))[:, : report.LABEL]
    assert (column[:, :2] == 255).all() and (column < 128).any()


def test_rows_with_different_numbers_of_clips_are_rejected():
    with pytest.raises(ValueError, match="teacher: 1; expected one for each of 2 titles"):
        report.contact_sheet({"truth": [video(0, 9)] * 2, "teacher": [video(0, 9)]}, ["a", "b"])


def test_plots_and_contact_sheets_are_png_files(tmp_path):
    report.save_tracks(tmp_path / "tracks.png", {"teacher": clips(0.1), "student": clips(0.2)}, ["a", "b", "c"])
    report.save_drift(tmp_path / "drift.png", {"student": [estimated(0, 900)]})
    report.save_drift(tmp_path / "short.png", {"student": [estimated(0, 50)]})
    report.save_contact_sheet(tmp_path / "sheet.png", {"truth": [video(0, 9)]}, ["a"])
    assert len(list(tmp_path.iterdir())) == 4
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and np.asarray(image).std() > 1


def test_a_failed_write_keeps_the_old_file_only(tmp_path, content, monkeypatch):
    report.write(tmp_path, content)
    before = (tmp_path / "report.json").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write(tmp_path, {**content, "seed": 8})
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]
