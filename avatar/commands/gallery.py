"""Overview image of the puppet world: `python -m avatar gallery out=outputs/gallery.png`.

Shows identities, emotions, gestures and framings with backdrops and objects, from fixed seeds.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont

from avatar.errors import ExistingFileError, UserError, require_int
from avatar.files import atomic_path, create_folder
from avatar.puppet.gestures import EASE_S, HELD, REST, SECONDS, WITHOUT_ARMS, Event
from avatar.puppet.identity import Identity
from avatar.puppet.motion import CHANNELS, Direction, animate, channel
from avatar.puppet.render import render
from avatar.puppet.setting import BACKDROPS, CAMERAS, PORTRAIT, Setting, Thing
from avatar.types import EMOTIONS, FRAME_RATE, STATES

LABEL, GAP = 16, 6  # pixels


def gallery(cfg: DictConfig) -> None:
    """Draw the overview and write it to `cfg.out`.

    Args:
        cfg: config `gallery`, whose comments describe each setting.

    Raises:
        UserError: an `out` that is not a new PNG file, or sizes that are too small.
    """
    require_int(64, size=cfg.size)
    require_int(1, columns=cfg.columns)
    out = Path(cfg.out)
    if out.suffix != ".png":
        raise UserError(f"out={out}; expected a name that ends in .png")
    if out.exists():
        raise ExistingFileError(f"{out} exists and is not overwritten; give another out=")
    rows = [
        *_rows([("", _portrait(seed, cfg.size)) for seed in range(2 * cfg.columns)], cfg.columns, "identities"),
        *_rows([(name, _emotion(name, cfg.size)) for name in EMOTIONS[1:]], cfg.columns, "emotions"),
        *_rows([(name, _gesture(name, cfg.size)) for name in SECONDS], cfg.columns, "gestures"),
        *_rows([(name, _backdrop(name, cfg.size)) for name in BACKDROPS], cfg.columns, "framings and backdrops"),
    ]
    create_folder(out.parent)
    with atomic_path(out) as path:
        Image.fromarray(np.concatenate(rows)).save(path, format="PNG")
    print(out)


def _rows(images: list[tuple[str, UInt8[np.ndarray, "h h 3"]]], columns: int, title: str) -> list[np.ndarray]:
    """A title, then rows of `columns` images with their names below them."""
    size = len(images[0][1])
    width = columns * (size + GAP) + GAP
    out = [_text(title, width, bold=True)]
    for i in range(0, len(images), columns):
        part = images[i : i + columns]
        row = np.full((size + GAP, width, 3), 255, np.uint8)
        names = np.full((LABEL, width, 3), 255, np.uint8)
        for k, (name, image) in enumerate(part):
            left = GAP + k * (size + GAP)
            row[GAP:, left : left + size] = image
            names[:, left : left + size] = _text(name, size, bold=False)
        out += [row, names] if any(name for name, _ in part) else [row]
    return out


def _text(words: str, width: int, bold: bool) -> UInt8[np.ndarray, "h w 3"]:
    image = Image.new("RGB", (width, LABEL + 8 * bold), "white")
    ImageDraw.Draw(image).text((GAP * bold, 3 + 4 * bold), words, "black", ImageFont.load_default(13 if bold else 10))
    return np.asarray(image)


def _pose(**channels: float) -> np.ndarray:
    state = np.zeros((1, len(CHANNELS)), np.float32)
    for name in HELD:
        state[0, channel(name)] = REST[name.split("_")[0]]
    for name, value in channels.items():
        state[0, channel(name)] = value
    return state


def _portrait(seed: int, size: int) -> UInt8[np.ndarray, "h h 3"]:
    return render(Identity.from_seed(seed), _pose(mouth_open=0.15 * (seed % 3), smile=0.3), size, PORTRAIT)[0]


def _emotion(name: str, size: int) -> UInt8[np.ndarray, "h h 3"]:
    """An emotion of a fixed identity."""
    still = np.zeros(FRAME_RATE)
    emotion = np.full(FRAME_RATE, EMOTIONS.index(name))
    states = animate(still, still, np.full(FRAME_RATE, STATES.index("speaking")), emotion, still + 1, seed=3)
    return render(Identity.from_seed(12), states[-1:], size, PORTRAIT)[0]


def _gesture(name: str, size: int) -> UInt8[np.ndarray, "h h 3"]:
    """A frame in the middle of a gesture."""
    frames = 2 * FRAME_RATE
    still, middle = np.zeros(frames), int((EASE_S + 0.12) * FRAME_RATE)
    speaking, neutral = np.full(frames, STATES.index("speaking")), np.full(frames, EMOTIONS.index("neutral"))
    direction = Direction(events=[Event(name, 0, frames, 1)])
    states = animate(still, still, speaking, neutral, still, seed=3, direction=direction)
    setting = PORTRAIT if name in WITHOUT_ARMS and name != "shrug" else Setting("half")
    return render(Identity.from_seed(23), states[middle : middle + 1], size, setting)[0]


def _backdrop(backdrop: str, size: int) -> UInt8[np.ndarray, "h h 3"]:
    number = BACKDROPS.index(backdrop)
    framing = list(CAMERAS)[(number + 1) % len(CAMERAS)]
    thing = Thing(("ball", "box", "star")[number % 3], ("red", "yellow", "blue")[number % 3], 0.89, 0.25)
    setting = Setting(framing, backdrop, thing if number % 2 else None)
    return render(Identity.from_seed(40 + number), _pose(mouth_open=0.4, smile=0.4), size, setting)[0]
