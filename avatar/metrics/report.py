"""What a run leaves for its reader: `report.json`, `report.md`, a contact sheet and plots.

Every file is written under a temporary name and then renamed, so none is ever half-written. In the JSON, what
couldn't be measured is null.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from avatar.errors import UserError
from avatar.files import atomic_path, writing
from avatar.metrics import drift
from avatar.metrics.scores import measured
from avatar.metrics.state_estimation import EstimatedClip
from avatar.provenance import git_revision, machine, versions
from avatar.types import FRAME_RATE

CONTROLS = ("ground_truth", "autoencoder", "frozen", "shuffled_audio")
# metric → its row's title and how it is printed
ROWS = {
    "lip_sync_r": ("lip-sync r, lag 0", ".3f"),
    "lip_sync_r_ci": ("– 95 % interval", ".3f"),
    "lip_sync_ratio": ("– ÷ autoencoder's", ".3f"),
    "lip_sync_lag_ms": ("best lag, ms (late > 0)", "+.0f"),
    "lip_sync_r_at_lag": ("– r there", ".3f"),
    "closure_recall": ("p, b, m closed", ".2f"),
    "silence_motion": ("mouth motion in silence", ".4f"),
    "motion": ("motion per frame", ".4f"),
    "motion_amount": ("– amount ÷ others'", ".2f"),
    "motion_roughness": ("– roughness ÷ others'", ".2f"),
    "frechet": ("Fréchet distance of motion", ".2f"),
    "frechet_ci": ("– 95 % interval", ".2f"),
    "coverage": ("coverage of motion", ".2f"),
    "emotion_accuracy": ("emotion as asked for", ".2f"),
    "state_accuracy": ("state as asked for", ".2f"),
    "gesture_accuracy": ("gesture as asked for", ".2f"),
    "unprompted_accuracy": ("gesture as words cause it", ".2f"),
    "identity_delta_e": ("identity ΔE", ".2f"),
    "undecodable_rate": ("undecodable frames", ".3f"),
    "clips": ("clips", "d"),
}
SIZE, LABEL, GAP = 13, 112, 10  # of the contact sheet, in pixels: text, the column of labels, and between clips
COLOURS = ("#d1495b", "#2e6f95", "#6a994e", "#8d6a9f", "#edae49")
Frames = UInt8[np.ndarray, "_ h w 3"]  # clips may differ in their number of frames


def assemble(
    controls: Mapping[str, Mapping],
    teacher: Mapping | None,
    student: Mapping | None,
    stream: Mapping | None,
    stages: Mapping[str, float],
    seed: int,
    control: Mapping[str, Mapping] | None = None,
) -> dict[str, Any]:
    """The content of report.json, from scores (`metrics.scores.score`) and what the stream measured of itself.

    `control` has for each attribute what `metrics.control.counterfactual` says of the student. What wasn't run is
    None. `stages` gives seconds. Raises UserError for a control that isn't one of CONTROLS.
    """
    if unknown := set(controls) - set(CONTROLS):
        raise UserError(f"unknown controls {', '.join(sorted(unknown))}; the report has {', '.join(CONTROLS)}")
    report = {
        "controls": {name: controls.get(name) for name in CONTROLS},
        "teacher": teacher,
        "student": student,
        "stream": stream,
        "control": control,
        "stages": dict(stages),
        "machine": machine(),
        "versions": versions(),
        "git": git_revision(),
        "seed": seed,
    }
    return measured({**report, "lip_sync_ratio": _ratios(report)})


def write(folder: Path, report: Mapping[str, Any], pictures: Sequence[str] = ()) -> None:
    """`report.json` and `report.md` in an existing folder; the page shows the pictures, named relative to it."""
    text = json.dumps(measured(dict(report)), indent=2, allow_nan=False, ensure_ascii=False)
    _write(folder / "report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    page = markdown(json.loads(text), pictures)
    _write(folder / "report.md", lambda path: path.write_text(page, encoding="utf-8"))


def markdown(report: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report as a page: controls beside models, then drift, control, stream, stages, and where it was made."""
    systems = {name: scores for name, scores in _systems(report).items() if scores}
    columns = {name: {**scores, "lip_sync_ratio": report["lip_sync_ratio"][name]} for name, scores in systems.items()}
    table = [
        [title, *(_cell(scores.get(key), form) for scores in columns.values())] for key, (title, form) in ROWS.items()
    ]
    parts = ["# Report", _table(["", *(name.replace("_", " ") for name in systems)], table)]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures]
    moving = [
        [f"{name.replace('_', ' ')}: {quantity}", *(_cell(values[key], form) for key, form in _DRIFT.items())]
        for name, scores in systems.items()
        for quantity, values in scores["drift"].items()
        if values["slope_per_1000"] is not None
    ]
    if moving:
        parts += ["## Drift", _table(["", "slope per 1000 frames", "first tenth", "last tenth", "change"], moving)]
    if report["control"]:
        obeyed = [
            [attribute, *(_cell(found[key], form) for key, form in _CONTROL.items())]
            for attribute, found in report["control"].items()
        ]
        head = ["another label, all else equal", "becomes so", "95 % interval", "stays the same", "pairs"]
        parts += ["## Control", _table([*head, "ground truth read as labelled"], obeyed)]
    if report["stream"]:
        parts += [
            "## Stream",
            _table(["", ""], [[key, _cell(value, ".4g")] for key, value in report["stream"].items()]),
        ]
    if report["stages"]:
        stages = [[name, _cell(float(seconds), ".1f")] for name, seconds in report["stages"].items()]
        parts += ["## Stages", _table(["stage", "seconds"], stages)]
    made = {**report["machine"], **report["versions"], "git": report["git"], "seed": report["seed"]}
    return (
        "\n\n".join([*parts, "## Made with", _table(["", ""], [[k, _cell(v, ".4g")] for k, v in made.items()])]) + "\n"
    )


def contact_sheet(
    rows: Mapping[str, Sequence[Frames]], titles: Sequence[str], columns: int = 10, scale: int = 2
) -> Image.Image:
    """For each clip a block: its title, then a row per system with `columns` frames at equal spacing.

    `rows` holds the clips of each system (all as many as `titles`, frames of one size), which a block shows at the same
    frames. Frames are enlarged `scale` times without smoothing. Raises UserError if the clips don't match.
    """
    if {len(clips) for clips in rows.values()} != {len(titles)}:
        got = ", ".join(f"{name}: {len(clips)}" for name, clips in rows.items())
        raise UserError(f"clips per row: {got or 'none'}; {len(titles)} titles: give every row one clip per title")
    h, w = (scale * side for side in next(iter(rows.values()))[0].shape[1:3])
    block = 2 * SIZE + len(rows) * h + GAP
    sheet = Image.new("RGB", (LABEL + columns * w, len(titles) * block), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(SIZE)
    for number, title in enumerate(titles):
        top = number * block
        draw.text((LABEL, top + SIZE // 2), title, "black", font)
        shown = min(len(clips[number]) for clips in rows.values())
        picked = np.linspace(0, shown - 1, columns).round().astype(int)
        for row, (name, clips) in enumerate(rows.items()):
            y = top + 2 * SIZE + row * h
            draw.text((LABEL - 8, y + h // 2), name, "black", font, anchor="rm")
            strip = Image.fromarray(np.concatenate(clips[number][picked], axis=1))
            sheet.paste(strip.resize((columns * w, h), Image.Resampling.NEAREST), (LABEL, y))
    return sheet


def save_contact_sheet(path: Path, rows: Mapping[str, Sequence[Frames]], titles: Sequence[str]) -> None:
    """`contact_sheet` as a PNG."""
    sheet = contact_sheet(rows, titles)
    _write(path, lambda temporary: sheet.save(temporary, "PNG"))


def save_tracks(path: Path, readings: Mapping[str, Sequence[EstimatedClip]], titles: Sequence[str]) -> None:
    """A PNG with a panel per title: the true aperture of that clip, and what was read of each system.

    Frames that couldn't be read are gaps. A clip shows its first 10 s.
    """
    figure, panels = _figure(len(titles), 10.0, 2.0)
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        clips = {name: clips[number].between(0, 10 * FRAME_RATE) for name, clips in readings.items()}
        truth = next(iter(clips.values())).truth_mouth
        panel.fill_between(np.arange(len(truth)) / FRAME_RATE, truth, color="0.82", label="truth")
        for colour, (name, clip) in zip(COLOURS, clips.items(), strict=False):
            seen = np.where(clip.valid, clip.mouth_open, np.nan)
            panel.plot(np.arange(len(clip)) / FRAME_RATE, seen, color=colour, linewidth=1.2, label=name)
        panel.set(ylim=(-0.05, 1.05), ylabel="aperture")
        panel.set_title(title, loc="left", fontsize=9)
        panel.margins(x=0)
    panels[-1].set_xlabel("seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    _save(path, figure)


def save_drift(path: Path, streams: Mapping[str, Sequence[EstimatedClip]]) -> None:
    """A PNG with a panel each for lip-sync r, ΔE, motion and undecodable frames, block by block along the stream."""
    quantities = {"lip_sync_r": "lip-sync r", "identity_delta_e": "identity ΔE", "motion": "motion per frame"}
    quantities |= {"undecodable_rate": "undecodable"}
    figure, panels = _figure(len(quantities), 8.0, 1.7)
    for panel, (quantity, title) in zip(panels, quantities.items(), strict=True):
        for colour, (name, readings) in zip(COLOURS, streams.items(), strict=False):
            frame, values = drift.blocks(readings, quantity)
            panel.plot(frame / FRAME_RATE, values, color=colour, marker=".", linewidth=1.2, label=name)
        panel.set_ylabel(title, fontsize=9)
        panel.grid(axis="y", color="0.9")
        panel.axhline(0, color="0.6", linewidth=0.8)
    panels[-1].set_xlabel("seconds into the stream")
    figure.align_ylabels()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    _save(path, figure)


_DRIFT = {"slope_per_1000": "+.4f", "first_tenth": ".4f", "last_tenth": ".4f", "change": "+.1%"}

_CONTROL = {"accuracy": ".2f", "accuracy_ci": ".2f", "stayed": ".2f", "pairs": "d", "ground_truth": ".2f"}


def _systems(report: Mapping[str, Any]) -> dict[str, Mapping | None]:
    """The columns, controls first."""
    return {**report["controls"], "teacher": report["teacher"], "student": report["student"]}


def _ratios(report: Mapping[str, Any]) -> dict[str, float | None]:
    """lip_sync_r of each system ÷ that of ground truth through the autoencoder, the most that a model can reach."""
    r: dict[str, Any] = {name: scores and scores["lip_sync_r"] for name, scores in _systems(report).items()}
    whole = r["autoencoder"]
    return {name: value / whole if value is not None and whole else None for name, value in r.items()}


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " … ".join(_cell(part, form) for part in value)
    return format(value, form) if isinstance(value, float) or form == "d" else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list]:
    """A column of panels over one axis of time, `height` inches each, that opens no window."""
    figure = Figure(figsize=(width, 0.6 + height * panels), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0])


def _save(path: Path, figure: Figure) -> None:
    _write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    with writing(path), atomic_path(path) as temporary:
        save(temporary)
