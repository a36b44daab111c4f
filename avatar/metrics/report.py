"""Report of an evaluation: `report.json`, `report.md`, a contact sheet and plots.

All files are written atomically. In the JSON, a value that could not be measured is null.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from avatar.errors import UserError
from avatar.files import atomic_path, write_text
from avatar.metrics import drift
from avatar.metrics.scores import measured
from avatar.metrics.state_estimation import EstimatedClip
from avatar.provenance import git_revision, machine, versions
from avatar.types import FRAME_RATE

CONTROLS = ("ground_truth", "autoencoder", "frozen", "shuffled_audio")
# score → title of its row, format
ROWS = {
    "lip_sync_r": ("lip-sync r, lag 0", ".3f"),
    "lip_sync_r_ci": ("– 95 % interval", ".3f"),
    "lip_sync_ratio": ("– ÷ autoencoder's", ".3f"),
    "lip_sync_lag_ms": ("best lag, ms (late > 0)", "+.0f"),
    "lip_sync_r_at_lag": ("– r there", ".3f"),
    "closure_recall": ("p, b, m closed", ".2f"),
    "silence_motion": ("mouth motion in silence", ".4f"),
    "motion": ("motion per frame", ".4f"),
    "motion_amount": ("– amount ÷ reference's", ".2f"),
    "motion_roughness": ("– roughness ÷ reference's", ".2f"),
    "frechet": ("Fréchet distance of motion", ".2f"),
    "frechet_ci": ("– 95 % interval", ".2f"),
    "coverage": ("coverage of motion", ".2f"),
    "emotion_accuracy": ("emotion as labelled", ".2f"),
    "state_accuracy": ("state as labelled", ".2f"),
    "gesture_accuracy": ("gesture as labelled", ".2f"),
    "unprompted_accuracy": ("gesture as words cause it", ".2f"),
    "identity_delta_e": ("identity ΔE", ".2f"),
    "undecodable_rate": ("undecodable frames", ".3f"),
    "clips": ("clips", "d"),
}
SIZE, LABEL, GAP = 13, 112, 10  # of the contact sheet, in pixels: text height, width of the labels, space between clips
COLOURS = ("#d1495b", "#2e6f95", "#6a994e", "#8d6a9f", "#edae49")
Frames = UInt8[np.ndarray, "_ h w 3"]  # of one clip


def assemble(
    controls: Mapping[str, Mapping],
    teacher: Mapping | None,
    student: Mapping | None,
    stream: Mapping | None,
    stages: Mapping[str, float],
    seed: int,
    control: Mapping[str, Mapping] | None = None,
    response: Mapping[str, Mapping] | None = None,
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        controls: scores (`metrics.scores.score`) of some of CONTROLS.
        teacher, student: their scores; None: not evaluated.
        stream: latency and speed of a stream; None: not evaluated.
        stages: seconds per stage.
        seed: of the evaluation.
        control: scores of counterfactual pairs per control (`commands.obedience`); None: not evaluated.
        response: response times per control (`commands.response`); None: not evaluated.

    Raises:
        UserError: a control that is not one of CONTROLS.
    """
    if unknown := set(controls) - set(CONTROLS):
        raise UserError(
            f"got the controls {', '.join(sorted(unknown))}; expected some of {', '.join(CONTROLS)}: rename them"
        )
    report = {
        "controls": {name: controls.get(name) for name in CONTROLS},
        "teacher": teacher,
        "student": student,
        "stream": stream,
        "control": control,
        "response": response,
        "stages": dict(stages),
        "machine": machine(),
        "versions": versions(),
        "git": git_revision(),
        "seed": seed,
    }
    return measured({**report, "lip_sync_ratio": _ratios(report)})


def write(folder: Path, report: Mapping[str, Any], images: Sequence[str] = ()) -> None:
    """Write `report.json` and `report.md` to an existing folder; the page shows the images, named relative to it."""
    text = json.dumps(measured(dict(report)), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(folder / "report.json", text + "\n")
    page = markdown(json.loads(text), images)
    write_text(folder / "report.md", page)


def markdown(report: Mapping[str, Any], images: Sequence[str] = ()) -> str:
    """The report as a page: scores per system, then drift, control, stream, stages, machine and versions."""
    systems = {name: scores for name, scores in _systems(report).items() if scores}
    columns = {name: {**scores, "lip_sync_ratio": report["lip_sync_ratio"][name]} for name, scores in systems.items()}
    table = [
        [title, *(_cell(scores.get(key), form) for scores in columns.values())] for key, (title, form) in ROWS.items()
    ]
    parts = ["# Report", _table(["", *(name.replace("_", " ") for name in systems)], table)]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in images]
    drifts = [
        [f"{name.replace('_', ' ')}: {quantity}", *(_cell(values[key], form) for key, form in _DRIFT.items())]
        for name, scores in systems.items()
        for quantity, values in scores["drift"].items()
        if values["slope_per_1000"] is not None
    ]
    if drifts:
        parts += ["## Drift", _table(["", "slope per 1000 frames", "first tenth", "last tenth", "change"], drifts)]
    if report["control"]:
        effects = [
            [name.replace("_", " "), *(_cell(found.get(key), form) for key, form in _CONTROL.items())]
            for name, found in report["control"].items()
        ]
        head = ["one control changed, all else equal", "followed", "95 % interval", "÷ truth", "truth", "autoencoder"]
        note = "Seen, unseen: combinations with a kind of puppet that training clips of this scene have, or never have."
        parts += [
            "## Control",
            note,
            _table([*head, "unchanged", "intensity, rank r", "pairs", "seen", "unseen", "unseen pairs"], effects),
        ]
    if report["response"]:
        rows = [
            [name, *(_cell(found[key], form) for key, form in _RESPONSE.items())]
            for name, found in report["response"].items()
        ]
        parts += [
            "## Response in a stream",
            _table(["control", "responded", "median, s", "largest, s", "streams"], rows),
        ]
    if report["stream"]:
        parts += [
            "## Stream",
            _table(["", ""], [[key, _cell(value, ".4g")] for key, value in report["stream"].items()]),
        ]
    if report["stages"]:
        stages = [[name, _cell(float(seconds), ".1f")] for name, seconds in report["stages"].items()]
        parts += ["## Stages", _table(["stage", "seconds"], stages)]
    details = {**report["machine"], **report["versions"], "git": report["git"], "seed": report["seed"]}
    return (
        "\n\n".join([*parts, "## Made with", _table(["", ""], [[k, _cell(v, ".4g")] for k, v in details.items()])])
        + "\n"
    )


def contact_sheet(
    rows: Mapping[str, Sequence[Frames]], titles: Sequence[str], columns: int = 10, scale: int = 2
) -> Image.Image:
    """Contact sheet: per clip a title and a row of frames for each system, the same frames in all rows.

    Args:
        rows: system → clips, one per title, with frames of one size.
        titles: of the clips.
        columns: frames per row, equally spaced.
        scale: integer factor of enlargement, without smoothing.

    Raises:
        UserError: a system has more or fewer clips than there are titles.
    """
    if {len(clips) for clips in rows.values()} != {len(titles)}:
        got = ", ".join(f"{name}: {len(clips)}" for name, clips in rows.items())
        raise UserError(f"got clips per row: {got or 'none'}; expected one for each of {len(titles)} titles: add them")
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
    """Write `contact_sheet` as a PNG."""
    sheet = contact_sheet(rows, titles)
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def save_tracks(path: Path, systems: Mapping[str, Sequence[EstimatedClip]], titles: Sequence[str]) -> None:
    """Plot the true aperture and that of each system over the first 10 s, a panel per title, and write it as a PNG.

    Invalid frames are gaps.
    """
    figure, panels = _figure(len(titles), 10.0, 2.0)
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        clips = {name: clips[number].between(0, 10 * FRAME_RATE) for name, clips in systems.items()}
        truth = next(iter(clips.values())).truth_mouth
        panel.fill_between(np.arange(len(truth)) / FRAME_RATE, truth, color="0.82", label="truth")
        for colour, (name, clip) in zip(COLOURS, clips.items(), strict=False):
            aperture = np.where(clip.valid, clip.mouth_open, np.nan)
            panel.plot(np.arange(len(clip)) / FRAME_RATE, aperture, color=colour, linewidth=1.2, label=name)
        panel.set(ylim=(-0.05, 1.05), ylabel="aperture")
        panel.set_title(title, loc="left", fontsize=9)
        panel.margins(x=0)
    panels[-1].set_xlabel("seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    _save_figure(path, figure)


def save_drift(path: Path, streams: Mapping[str, Sequence[EstimatedClip]]) -> None:
    """Plot the quantities of a drift along streams, block by block, and write the plot as a PNG."""
    quantities = {"lip_sync_r": "lip-sync r", "identity_delta_e": "identity ΔE", "motion": "motion per frame"}
    quantities |= {"undecodable_rate": "undecodable", "emotion_as_labelled": "emotion as labelled"}
    figure, panels = _figure(len(quantities), 8.0, 1.7)
    for panel, (quantity, title) in zip(panels, quantities.items(), strict=True):
        for colour, (name, clips) in zip(COLOURS, streams.items(), strict=False):
            frame, values = drift.blocks(clips, quantity)
            panel.plot(frame / FRAME_RATE, values, color=colour, marker=".", linewidth=1.2, label=name)
        panel.set_ylabel(title, fontsize=9)
        panel.grid(axis="y", color="0.9")
        panel.axhline(0, color="0.6", linewidth=0.8)
    panels[-1].set_xlabel("seconds into the stream")
    figure.align_ylabels()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    _save_figure(path, figure)


_DRIFT = {"slope_per_1000": "+.4f", "first_tenth": ".4f", "last_tenth": ".4f", "change": "+.1%"}

_RESPONSE = {"responded": ".2f", "median_s": ".2f", "largest_s": ".2f", "streams": "d"}

_CONTROL = {
    "accuracy": ".2f",
    "accuracy_ci": ".2f",
    "ratio": ".2f",
    "truth": ".2f",
    "autoencoder": ".2f",
    "stayed": ".2f",
    "intensity_rank_correlation": ".2f",
    "pairs": "d",
    "seen_accuracy": ".2f",
    "unseen_accuracy": ".2f",
    "unseen_pairs": "d",
}


def _systems(report: Mapping[str, Any]) -> dict[str, Mapping | None]:
    """The scores of all systems, controls first."""
    return {**report["controls"], "teacher": report["teacher"], "student": report["student"]}


def _ratios(report: Mapping[str, Any]) -> dict[str, float | None]:
    """lip_sync_r of each system ÷ that of the autoencoder on ground truth, the upper bound of a model."""
    r: dict[str, Any] = {name: scores and scores["lip_sync_r"] for name, scores in _systems(report).items()}
    bound = r["autoencoder"]
    return {name: value / bound if value is not None and bound else None for name, value in r.items()}


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
    """A column of panels with a common time axis, `height` inches each, without a window."""
    figure = Figure(figsize=(width, 0.6 + height * panels), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0])


def _save_figure(path: Path, figure: Figure) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
