"""One page about a data set, to look at: what was accepted and rejected and why, histograms, a contact sheet.

Pictures are inside the file, so that it can be sent as it is.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from avatar.data.preprocess.reasons import REJECTS, REPAIRS
from avatar.data.preprocess.shards import Line, Sample
from avatar.types import FRAME_RATE

SHOWN, THUMB = 24, 128  # pictures on the contact sheet, and their height in pixels
PANELS = 12  # histograms at most: those that few clips have come last
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .15rem 1rem .15rem 0; text-align: left }
td.n { text-align: right } img.sheet { height: 128px; margin: 2px } img { max-width: 100% } code { color: #2e6f95 }
"""


def html(title: str, lines: Sequence[Line], index: Mapping[str, Any], found: Sequence[Sample]) -> str:
    """The page, from the sources' lines, the index and the samples, whose files must still be staged."""
    seconds = sum(split["seconds"] for split in index["splits"].values())
    repairs = Counter(made["code"] for line in lines for made in {m["code"]: m for m in line["repairs"]}.values())
    rejected = [line for line in lines if line["status"] == "rejected"]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(found)} clips, {seconds / 60:.1f} minutes, of {len(lines)} sources, {len(rejected)} rejected.</p>",
        _table("Splits", ["", "clips", "minutes", "groups"], _splits(index)),
        _table("Sources", ["", "sources", "what it means"], _reasons(index["sources"], REJECTS)),
        _table("Clips", ["", "clips", "what it means"], _reasons(index["clips"], REJECTS)),
        _table("Mended", ["", "sources", "how"], _reasons(dict(sorted(repairs.items())), REPAIRS)),
    ]
    if found:
        parts += ["<h2>Histograms of clips</h2>", _image(_histograms(found)), "<h2>Contact sheet</h2>", _sheet(found)]
    if rejected:
        rows = [[line["source"], line["reason"], line["detail"]] for line in rejected]
        parts.append(_table("Rejected sources", ["source", "reason", "what was found"], rows))
    return "\n".join(parts) + "</html>\n"


def _splits(index: Mapping[str, Any]) -> list[list[Any]]:
    return [[name, s["samples"], f"{s['seconds'] / 60:.1f}", s["groups"]] for name, s in index["splits"].items()]


def _reasons(counted: Mapping[str, int], meaning: Mapping[str, str]) -> list[list[Any]]:
    return [[code, count, meaning.get(code, "")] for code, count in counted.items()]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    cells = [
        "".join(f"<td{' class=n' if isinstance(cell, int) else ''}>{escape(str(cell))}</td>" for cell in row)
        for row in rows
    ]
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<h2>{title}</h2><table><tr>{top}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _histograms(found: Sequence[Sample]) -> bytes:
    """A PNG: the length, and every score with the share of clips that have it."""
    values = {"length, s": [sample.clip["frames"] / FRAME_RATE for sample in found]}
    for name in dict.fromkeys(name for sample in found for name in sample.clip["scores"]):
        values[name] = [s for sample in found if (s := sample.clip["scores"].get(name)) is not None]
    chosen = sorted(values.items(), key=lambda item: -len(item[1]))[:PANELS]
    rows = -(-len(chosen) // 4)
    height = 2.1 * rows
    figure = Figure(figsize=(10, height))
    figure.subplots_adjust(0.04, 0.3 / height, 0.99, 1 - 0.3 / height, hspace=0.4)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 4, squeeze=False).ravel()
    for panel in panels[len(chosen) :]:
        panel.set_axis_off()
    for panel, (name, known) in zip(panels, chosen, strict=False):
        if known:
            panel.hist(np.array(known), bins=24, color="#2e6f95")
        without = len(found) - len(known)
        panel.set_title(f"{name}{f' ({without} without)' if without else ''}", loc="left", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.locator_params(nbins=4)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def _sheet(found: Sequence[Sample]) -> str:
    """References of clips from all over the set."""
    chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, SHOWN).astype(int))]
    images = []
    for sample in chosen:
        with Image.open(sample.folder / f"{sample.clip['stem']}.ref.png") as image:
            small = image.convert("RGB")
            small.thumbnail((4 * THUMB, THUMB))
        data = io.BytesIO()
        small.save(data, format="jpeg", quality=85)
        images.append(_image(data.getvalue(), "jpeg", f"{sample.key} ({sample.split})"))
    return "".join(images)


def _image(data: bytes, kind: str = "png", title: str = "") -> str:
    shown = f" class='sheet' title='{escape(title)}' alt='{escape(title)}'" if title else " alt='histograms'"
    return f"<img{shown} src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
