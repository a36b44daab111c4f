"""The demo: teacher → causal teacher → student → stream → report at nano scale, each stage run by its command."""

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from omegaconf import DictConfig
from PIL import Image
from scipy.io import wavfile

from avatar.files import atomic_path, create_folder
from avatar.puppet.clip import make_clip
from avatar.types import SAMPLE_RATE


def demo(cfg: DictConfig) -> None:
    """Run all stages into `cfg.folder`; an earlier demo's folder is renamed to the same name with a number.

        python -m avatar demo seed=2

    Args:
        cfg: config `demo`, whose comments describe each setting.
    """
    folder = Path(cfg.folder)
    _set_aside(folder)
    teacher = folder / "teacher" / "teacher.safetensors"
    causal = folder / "causal_teacher" / "causal_teacher.safetensors"
    jumps = folder / "consistency" / "student.safetensors"
    student = folder / "dmd" / "student.safetensors"
    objectives = {
        "teacher": ["train.py", "objective=flow_matching"],
        "causal_teacher": ["distill.py", "objective=teacher_forcing", f"teacher={teacher}"],
        "consistency": ["distill.py", "objective=consistency", f"teacher={causal}"],
        "dmd": ["distill.py", "objective=dmd", f"init={jumps}", f"teacher={teacher}"],
    }
    seconds = {}
    for number, (stage, command) in enumerate(objectives.items(), 1):
        print(f"\n── {number} of 6: {stage} ──", flush=True)
        common = [f"seed={cfg.seed}", f"device={cfg.device}", f"folder={folder / stage}"]
        seconds[stage] = _run([command[0], "experiment=demo", *command[1:], *cfg.stages[stage], *common])
    print("\n── 5 of 6: a stream ──", flush=True)
    portrait, speech = _write_inputs(folder, cfg.seed)
    files = [f"image={portrait}", f"audio={speech}", f"student={student}", f"out={folder / 'avatar.mp4'}"]
    seconds["infer"] = _run(["infer.py", *files, f"device={cfg.device}", f"folder={folder / 'infer'}"])
    print("\n── 6 of 6: scores on held-out puppets ──", flush=True)
    overrides = [f"{name}={value}" for name, value in cfg.evaluate.items()]
    stages = "stages={" + ",".join(f"{name}:{value:.1f}" for name, value in seconds.items()) + "}"
    _run(
        [
            "-m",
            "avatar",
            "evaluate",
            f"student={student}",
            f"teacher={teacher}",
            "split=test",
            *overrides,
            stages,
            f"seed={cfg.seed}",
            f"device={cfg.device}",
            f"folder={folder}",
        ]
    )
    report = json.loads((folder / "report.json").read_text())
    print(f"\n{folder / 'report.md'}, contact_sheet.png, avatar.mp4; {sum(report['stages'].values()) / 60:.1f} minutes")


def _run(arguments: list[str]) -> float:
    """Run a command and return its duration in seconds; exit with its exit code if it fails."""
    print("python " + " ".join(arguments), flush=True)
    start = perf_counter()
    result = subprocess.run([sys.executable, *arguments], check=False)
    if result.returncode:
        sys.exit(result.returncode)
    return perf_counter() - start


def _write_inputs(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write a portrait and speech of the test split as files, and return their paths."""
    clip = make_clip(1000 + seed, "test", 150, "speaking")
    portrait, speech = folder / "portrait.png", folder / "speech.wav"
    with atomic_path(portrait) as path:
        Image.fromarray(clip.frames(256, 0, 1)[0]).save(path, format="PNG")
    wavfile.write(speech, SAMPLE_RATE, clip.own)
    return portrait, speech


def _set_aside(folder: Path) -> None:
    """Rename a folder that isn't empty, and create it again."""
    if folder.exists() and any(folder.iterdir()):
        number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}-{number}"))
    create_folder(folder)
