"""HTML report of a data set: accepted and rejected sources with reasons, histograms, a contact sheet.

Images are embedded, so that the page is a single file.
"""

import base64
import io
import math
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

CONTACTS, THUMBNAIL = 24, 128  # images on the contact sheet, and their height in pixels
MAX_HISTOGRAMS = 12  # scores that the most clips have come first
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .15rem 1rem .15rem 0; text-align: left }
td.n { text-align: right } img.sheet { height: 128px; margin: 2px } img { max-width: 100% } code { color: #2e6f95 }
"""


def html(title: str, lines: Sequence[Line], index: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """Render the report.

    Args:
        lines: status lines of the sources.
        index: content of `index.json`.
        samples: accepted clips, whose staged files still exist.
    """
    seconds = sum(split["seconds"] for split in index["splits"].values())
    repairs = Counter(code for line in lines for code in {repair["code"] for repair in line["repairs"]})
    rejected = [line for line in lines if line["status"] == "rejected"]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(samples)} clips, {seconds / 60:.1f} minutes, of {len(lines)} sources, {len(rejected)} rejected.</p>",
        _table("Splits", ["", "clips", "minutes", "groups"], _splits(index)),
        _table("Sources", ["", "sources", "meaning"], _counts(index["sources"], REJECTS)),
        _table("Clips", ["", "clips", "meaning"], _counts(index["clips"], REJECTS)),
        _table("Repairs", ["", "sources", "meaning"], _counts(dict(sorted(repairs.items())), REPAIRS)),
    ]
    if samples:
        parts += [
            "<h2>Histograms of clips</h2>",
            _image(_histograms(samples)),
            "<h2>Contact sheet</h2>",
            _contact_sheet(samples),
        ]
    if rejected:
        rows = [[line["source"], line["reason"], line["detail"]] for line in rejected]
        parts.append(_table("Rejected sources", ["source", "reason", "detail"], rows))
    return "\n".join(parts) + "</html>\n"


def _splits(index: Mapping[str, Any]) -> list[list[Any]]:
    return [[name, s["samples"], f"{s['seconds'] / 60:.1f}", s["groups"]] for name, s in index["splits"].items()]


def _counts(counts: Mapping[str, int], meaning: Mapping[str, str]) -> list[list[Any]]:
    return [[code, count, meaning.get(code, "")] for code, count in counts.items()]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    cells = [
        "".join(f"<td{' class=n' if isinstance(cell, int) else ''}>{escape(str(cell))}</td>" for cell in row)
        for row in rows
    ]
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<h2>{title}</h2><table><tr>{top}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _histograms(samples: Sequence[Sample]) -> bytes:
    """Histograms of the length and of the scores, as PNG; titles give the number of clips without the score."""
    values = {"length, s": [sample.clip["frames"] / FRAME_RATE for sample in samples]}
    for name in dict.fromkeys(name for sample in samples for name in sample.clip["scores"]):
        values[name] = [s for sample in samples if (s := sample.clip["scores"].get(name)) is not None]
    chosen = sorted(values.items(), key=lambda item: -len(item[1]))[:MAX_HISTOGRAMS]
    rows = math.ceil(len(chosen) / 4)
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
        without = len(samples) - len(known)
        panel.set_title(f"{name}{f' ({without} without)' if without else ''}", loc="left", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.locator_params(nbins=4)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def _contact_sheet(samples: Sequence[Sample]) -> str:
    """References of clips, evenly spaced over the data set."""
    chosen = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, CONTACTS).astype(int))]
    images = []
    for sample in chosen:
        with Image.open(sample.folder / f"{sample.clip['stem']}.ref.png") as image:
            small = image.convert("RGB")
            small.thumbnail((4 * THUMBNAIL, THUMBNAIL))
        data = io.BytesIO()
        small.save(data, format="jpeg", quality=85)
        images.append(_image(data.getvalue(), "jpeg", f"{sample.key} ({sample.split})"))
    return "".join(images)


def _image(data: bytes, kind: str = "png", title: str = "") -> str:
    attributes = f" class='sheet' title='{escape(title)}' alt='{escape(title)}'" if title else " alt='histograms'"
    return f"<img{attributes} src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
