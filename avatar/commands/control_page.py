"""Page of an evaluation's controls: short looping clips, truth beside the model, as one HTML file without links."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from avatar.commands.obedience import Shown
from avatar.files import write_text
from avatar.types import FRAME_RATE

Images = UInt8[np.ndarray, "f h w 3"]
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Control</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 60rem; padding: 0 1rem;
       color: light-dark(#222, #ddd); background: light-dark(#fff, #181818); color-scheme: light dark }
h2 { font-size: 1rem; margin: 1.6rem 0 .2rem }
.pairs { display: flex; flex-wrap: wrap; gap: 1rem }
table { border-spacing: 3px; text-align: center; font-size: .8rem }
img { width: 96px; image-rendering: pixelated; display: block }
th { font-weight: normal; text-align: right }
</style>
<h1>Control</h1>
<p>Pairs that differ in one control; reference, audio and noise are equal.</p>
"""


def save(
    path: Path,
    scores: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Sequence[Shown]],
    to_images: Callable[[Tensor], Images],
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        scores, pairs: of `obedience`.
        to_images: frames of the world → RGB images.
    """
    parts = [HEAD]
    for name, found in scores.items():
        share = f"followed in {found['accuracy']:.0%} of {found['pairs']} pairs; true clips: {found['truth']:.0%}"
        parts.append(f"<h2>{html.escape(name.replace('_', ' '))}</h2>\n<p>{share}</p>\n<div class=pairs>")
        parts += [_pair(shown, to_images) for shown in pairs[name]]
        parts.append("</div>")
    write_text(path, "\n".join(parts) + "\n")


def _pair(shown: Shown, to_images: Callable[[Tensor], Images]) -> str:
    rows = [
        f"<tr><th>{system}</th>" + "".join(f"<td>{_clip(to_images(video))}</td>" for video in videos) + "</tr>"
        for system, videos in (("truth", shown.truth), ("model", shown.generated))
    ]
    title = html.escape(shown.title)
    return "\n".join([f"<table><caption>{title}</caption><tr><td><td>without<td>with</tr>", *rows, "</table>"])


def _clip(images: Images) -> str:
    """An image element with a looping animation."""
    frames = [Image.fromarray(image) for image in images]
    data = io.BytesIO()
    frames[0].save(
        data, "WEBP", save_all=True, append_images=frames[1:], duration=1000 // FRAME_RATE, loop=0, quality=85
    )
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}">'
