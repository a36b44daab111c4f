"""The demo keeps what an earlier one left, finished or not, and starts in a folder of its own."""

import json
from pathlib import Path

import pytest

from avatar.commands import demo
from tests.stages import composed

STAGES = ("teacher", "causal_teacher", "consistency", "dmd", "infer")


@pytest.fixture
def run_demo(tmp_path, monkeypatch):
    """A demo into tmp_path / "demo" whose stages only leave a note in their folders; it may break off before one."""
    monkeypatch.setattr(demo, "_held_out", lambda folder, seed: (folder / "portrait.png", folder / "speech.wav"))

    def call(note: str, breaks_off: str = "never") -> list[list[str]]:
        commands = []

        def run(arguments: list[str]) -> float:
            options = dict(part.split("=", 1) for part in arguments if "=" in part)
            folder = Path(options["folder"])
            if folder.name == breaks_off:
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


def test_each_stage_starts_from_what_the_one_before_wrote(run_demo, tmp_path):
    commands = run_demo("first")
    assert notes(tmp_path / "demo") == dict.fromkeys([*STAGES, "."], "first")
    assert [command[0] for command in commands] == ["train.py", *["distill.py"] * 3, "infer.py", "-m"]
    made = [str(tmp_path / "demo" / stage) for stage in ("teacher", "causal_teacher", "consistency", "dmd")]
    for before, command in zip(made, commands[1:], strict=False):
        assert any(part.partition("=")[2].startswith(f"{before}/") for part in command), (before, command)


@pytest.mark.parametrize("stage", ["causal_teacher", "dmd", "infer"])
def test_a_demo_that_broke_off_is_set_aside_and_the_next_starts_clean(run_demo, tmp_path, stage):
    with pytest.raises(KeyboardInterrupt):
        run_demo("broken", breaks_off=stage)
    assert not (tmp_path / "demo" / "report.json").exists()
    run_demo("whole")
    assert set(notes(tmp_path / "demo").values()) == {"whole"}
    assert set(notes(tmp_path / "demo-1").values()) == {"broken"} and stage not in notes(tmp_path / "demo-1")


def test_a_lonely_portrait_is_an_earlier_demo_too(run_demo, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "portrait.png").write_bytes(b"mine")
    run_demo("second")
    assert (tmp_path / "demo-1" / "portrait.png").read_bytes() == b"mine"
    assert not (tmp_path / "demo" / "portrait.png").exists()


def test_no_number_is_used_twice(run_demo, tmp_path):
    (tmp_path / "demo-2").mkdir()
    (tmp_path / "demo-2" / "note").write_text("mine")
    for note in ("first", "second", "third"):
        run_demo(note)
    found = {folder: notes(tmp_path / folder)["."] for folder in ("demo", "demo-1", "demo-2", "demo-3")}
    assert found == {"demo": "third", "demo-1": "first", "demo-2": "mine", "demo-3": "second"}


def test_an_empty_folder_is_no_earlier_demo(run_demo, tmp_path):
    (tmp_path / "demo").mkdir()
    run_demo("first")
    assert not (tmp_path / "demo-1").exists()
