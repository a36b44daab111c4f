"""The demo starts in an empty folder, and keeps the folder of an earlier one, finished or not."""

import json
from pathlib import Path

import pytest

from avatar.commands import demo
from tests.stages import composed

STAGES = ("teacher", "causal_teacher", "consistency", "dmd", "infer")


@pytest.fixture
def run_demo(tmp_path, monkeypatch):
    """A function that runs a demo in tmp_path / "demo", whose stages only write a note into their folders.

    The demo is interrupted before the stage `interrupted`.
    """
    monkeypatch.setattr(demo, "_write_inputs", lambda folder, seed: (folder / "portrait.png", folder / "speech.wav"))

    def call(note: str, interrupted: str = "never") -> list[list[str]]:
        commands = []

        def run(arguments: list[str]) -> float:
            options = dict(part.split("=", 1) for part in arguments if "=" in part)
            folder = Path(options["folder"])
            if folder.name == interrupted:
                raise KeyboardInterrupt
            commands.append(arguments)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "note").write_text(note)
            if "evaluate" in arguments:
                (folder / "report.json").write_text(json.dumps({"stages": {}}))
            return 1.0

        monkeypatch.setattr(demo, "_run", run)
        demo.demo(composed("demo", f"folder='{tmp_path / 'demo'}'"))
        return commands

    return call


def notes(folder: Path) -> dict[str, str]:
    return {str(path.parent.relative_to(folder)): path.read_text() for path in folder.rglob("note")}


def test_each_stage_starts_from_the_bundle_of_the_previous_one(run_demo, tmp_path):
    commands = run_demo("first")
    assert notes(tmp_path / "demo") == dict.fromkeys([*STAGES, "."], "first")
    assert [command[0] for command in commands] == ["train.py", *["distill.py"] * 3, "infer.py", "-m"]
    folders = [str(tmp_path / "demo" / stage) for stage in ("teacher", "causal_teacher", "consistency", "dmd")]
    for previous, command in zip(folders, commands[1:], strict=False):
        assert any(part.partition("=")[2].startswith(f"{previous}/") for part in command), (previous, command)


@pytest.mark.parametrize("stage", ["causal_teacher", "dmd", "infer"])
def test_an_interrupted_demo_is_set_aside(run_demo, tmp_path, stage):
    with pytest.raises(KeyboardInterrupt):
        run_demo("interrupted", interrupted=stage)
    assert not (tmp_path / "demo" / "report.json").exists()
    run_demo("complete")
    assert set(notes(tmp_path / "demo").values()) == {"complete"}
    assert set(notes(tmp_path / "demo-1").values()) == {"interrupted"} and stage not in notes(tmp_path / "demo-1")


def test_a_folder_with_any_file_is_set_aside(run_demo, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "portrait.png").write_bytes(b"mine")
    run_demo("second")
    assert (tmp_path / "demo-1" / "portrait.png").read_bytes() == b"mine"
    assert not (tmp_path / "demo" / "portrait.png").exists()


def test_an_existing_folder_is_not_overwritten_when_setting_aside(run_demo, tmp_path):
    (tmp_path / "demo-2").mkdir()
    (tmp_path / "demo-2" / "note").write_text("mine")
    for note in ("first", "second", "third"):
        run_demo(note)
    found = {folder: notes(tmp_path / folder)["."] for folder in ("demo", "demo-1", "demo-2", "demo-3")}
    assert found == {"demo": "third", "demo-1": "first", "demo-2": "mine", "demo-3": "second"}


def test_an_empty_folder_is_not_set_aside(run_demo, tmp_path):
    (tmp_path / "demo").mkdir()
    run_demo("first")
    assert not (tmp_path / "demo-1").exists()
