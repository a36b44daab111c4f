"""Polygons of the head, in the puppet's units: x to the right and y down from the centre of the head at rest."""

import numpy as np
from jaxtyping import Float

from avatar.puppet.identity import Identity

APERTURE = 0.16  # between the lips of a fully open mouth
Polygons = Float[np.ndarray, "_ _ 2"]  # frames, points, (x, y)
Parts = list[tuple[str, Float[np.ndarray, "*_ _ 2"]]]  # name of the colour; one polygon, or one per frame

_TURN = np.linspace(0, 2 * np.pi, 32, endpoint=False)
ROUND = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=-1)
SMALL = ROUND[::2]
_ACROSS = np.linspace(-1, 1, 13)
_ARC = np.sqrt(np.clip(1 - _ACROSS**2, 0, 1))


def ellipse(x, y, rx, ry, unit=ROUND) -> np.ndarray:
    """Points of an ellipse: `k 2` for scalar arguments, `f k 2` for columns `f 1`."""
    return np.stack(np.broadcast_arrays(x + rx * unit[:, 0], y + ry * unit[:, 1]), axis=-1)


def outline(p: Identity, s: dict) -> Polygons:
    """Outline of the face: an egg, narrower towards the chin, whose jaw drops when the mouth opens."""
    x, y = ROUND.T
    low = np.clip(y, 0, 1) ** 2
    square = np.sign(x) * np.abs(x) ** 0.85
    return np.stack(
        np.broadcast_arrays(p.head_w * square * (1 - p.taper * low), p.head_h * y + 0.022 * low * s["mouth_open"]),
        axis=-1,
    )


def hair_behind(p: Identity) -> Parts:
    """Hair behind head and shoulders."""
    w, h = p.head_w, p.head_h
    if p.hair_style == "long":
        return [("hair", ellipse(0, 0.06, w * 1.2, h * 1.12))]
    if p.hair_style == "bob":
        return [("hair", ellipse(0, -0.05, w * 1.22, h * 0.98))]
    if p.hair_style == "curly":
        turns = np.linspace(np.pi * 0.95, np.pi * 2.05, 9)
        return [("hair", ellipse(w * np.cos(a), -0.06 + h * 0.86 * np.sin(a), 0.085, 0.085, SMALL)) for a in turns]
    return []


def ears(p: Identity) -> Parts:
    """Ears of the identity's type."""
    w, h, out = p.head_w, p.head_h, []
    for side in (-1, 1):
        if p.ears == "round":
            out.append(("lid", ellipse(side * w * 1.0, 0.0, 0.05, 0.075, SMALL)))
        elif p.ears == "bear":
            out.append(("skin", ellipse(side * w * 0.78, -h * 0.82, 0.12, 0.12, SMALL)))
            out.append(("inner_ear", ellipse(side * w * 0.78, -h * 0.82, 0.07, 0.07, SMALL)))
        elif p.ears == "long":
            out.append(("skin", _rotated(ellipse(0, 0, 0.08, 0.24, SMALL), 18.0 * side, side * w * 0.55, -h * 0.95)))
            out.append(
                ("inner_ear", _rotated(ellipse(0, 0, 0.045, 0.19, SMALL), 18.0 * side, side * w * 0.55, -h * 0.95))
            )
        elif p.ears == "floppy":
            out.append(("hair", _rotated(ellipse(0, 0, 0.085, 0.2, SMALL), -14.0 * side, side * w * 1.02, -0.07)))
        elif p.ears == "pointed":
            tip = np.array([(side * w * 0.98, -0.12), (side * w * 0.98, -h * 1.26), (side * w * 0.18, -h * 0.85)])
            out += [("skin", tip), ("inner_ear", 0.25 * tip.mean(0) + 0.75 * tip + np.array([0, 0.03]))]
    return out


def _rotated(points: np.ndarray, degrees: float, x: float, y: float) -> np.ndarray:
    """Points rotated about the origin, then translated."""
    a = np.deg2rad(degrees)
    return points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + (x, y)


def hair(p: Identity) -> Parts:
    """Hair over the forehead, horns or antennae."""
    w, h = p.head_w, p.head_h
    if p.hair_style in ("none", "bald"):
        return []
    if p.hair_style == "horns":
        horn = np.array([(0.09, -h * 0.88), (0.25, -h * 0.72), (0.25, -h * 1.25)])
        return [("hair", horn), ("hair", horn * (-1, 1))]
    if p.hair_style == "antennae":
        stalk = np.array([(0.1, -h * 0.9), (0.13, -h * 0.9), (0.19, -h * 1.18), (0.17, -h * 1.18)])
        ball = ellipse(0.18, -h * 1.18, 0.045, 0.045, SMALL)
        return [("hair", part * (side, 1)) for side in (-1, 1) for part in (stalk, ball)]
    if p.hair_style == "tuft":
        return [("hair", _rotated(ellipse(0, -0.07, 0.04, 0.09, SMALL), a, 0.0, -h * 0.88)) for a in (-35.0, 0.0, 35.0)]
    outer = np.linspace(np.pi * 1.02, np.pi * 1.98, 18)
    crown = np.stack(
        [w * 1.05 * np.sign(np.cos(outer)) * np.abs(np.cos(outer)) ** 0.85, h * 1.07 * np.sin(outer)], axis=-1
    )
    across = np.linspace(1, -1, 17)
    line = {
        "short": -h * (0.62 - 0.3 * across**4),
        "parted": -h * (0.5 + 0.2 * np.sin(2.2 * across + 1.2) - 0.25 * across**6),
        "long": -h * (0.66 - 0.5 * across**2),
        "bob": -h * (0.52 - 0.3 * across**8),
        "spiky": -h * (0.6 - 0.09 * np.where(np.arange(17) % 2, 1, -1)),
        "curly": -h * (0.6 - 0.05 * np.cos(12 * across)),
    }[p.hair_style]
    return [("hair", np.concatenate([crown, np.stack([w * 1.0 * across, line], axis=-1)]))]


def cheeks(p: Identity) -> Parts:
    """Muzzle and blush."""
    out = []
    if p.blush:
        out += [("blush", ellipse(side * 0.2, 0.08, 0.06, 0.042, SMALL)) for side in (-1, 1)]
    if p.muzzle:
        out.append(("muzzle", ellipse(0, p.mouth_y - 0.01, p.mouth_w * 1.38, 0.168)))
    return out


def eyes(p: Identity, s: dict) -> Parts:
    """Both eyes and brows: white, iris, pupil, highlight, lid and lashes."""
    out = []
    lid = np.clip(s["lid"], 0, 1)
    tall = p.eye_h * (1 - 0.45 * np.clip(s["lid"], -1, 0))  # the eye is wider for a lid below 0
    cover = -(1 - 2 * lid) * _ARC * tall  # y of the lid's edge
    top = -1.12 * _ARC * tall - 0.006
    for side in (-1, 1):
        at = np.array([side * p.eye_x, p.eye_y])
        gx, gy = 0.42 * s["gaze_x"] * p.eye_w, 0.3 * s["gaze_y"] * tall
        iris = _clipped_disc(gx, gy, 0.74 * p.eye_h, p.eye_w, tall)
        pupil = _clipped_disc(gx, gy, 0.4 * p.eye_h, p.eye_w, tall)
        columns = np.broadcast_to(p.eye_w * 1.06 * _ACROSS, cover.shape)
        eyelid = np.concatenate([np.stack([columns, top], -1), np.stack([columns, cover], -1)[:, ::-1]], axis=1)
        lash = np.concatenate(
            [np.stack([columns, cover - 0.012], -1), np.stack([columns, cover + 0.006], -1)[:, ::-1]], axis=1
        )
        out += [
            ("white", ellipse(at[0], at[1], p.eye_w, tall)),
            ("iris", iris + at),
            ("pupil", pupil + at),
            ("white", ellipse(at[0] + gx + 0.014, at[1] + gy - 0.02, 0.012, 0.012, SMALL[::2])),
            ("lid", eyelid + at),
            ("lash", lash + at),
            ("brow", _brow(p, s, side)),
        ]
    return out


def _clipped_disc(x, y, radius: float, wide: float, tall) -> np.ndarray:
    """Points of a disc; those outside the eye are moved to its edge."""
    disc = ellipse(x, y, radius, radius, SMALL)
    outside = np.sqrt((disc[..., 0] / wide) ** 2 + (disc[..., 1] / tall) ** 2)
    return disc / np.maximum(outside, 1)[..., None]


def _brow(p: Identity, s: dict, side: int) -> np.ndarray:
    """Outline of a brow: a curved bar above the eye."""
    along = np.linspace(-1, 1, 7)
    slant = -0.42 * side * s["brow_tilt"]  # the inner end is lower for a tilt above 0
    length = p.eye_w * 1.15
    y = p.eye_y - p.eye_h * 1.25 - 0.035 - 0.038 * s["brow_raise"] + slant * along * length + 0.014 * along**2
    half = p.brow / 2 * (1 - 0.35 * along**2)
    x = np.broadcast_to(side * p.eye_x + length * along, y.shape)
    return np.concatenate([np.stack([x, y - half], -1), np.stack([x, y + half], -1)[:, ::-1]], axis=1)


def nose(p: Identity) -> Parts:
    """Nose of the identity's type."""
    if p.nose == "none":
        return []
    if p.nose == "human":
        return [("nose", ellipse(0, p.nose_y, p.nose_w, 0.024, SMALL))]
    if p.nose == "button":
        return [("nose", ellipse(0, p.nose_y, p.nose_w * 1.25, 0.032, SMALL))]
    holes = [("nostril", ellipse(side * 0.03, p.nose_y, 0.013, 0.02, SMALL[::2])) for side in (-1, 1)]
    return [("inner_ear", ellipse(0, p.nose_y, 0.085, 0.055)), *holes]


def mouth(p: Identity, s: dict) -> Parts:
    """Lips, opening, upper teeth and tongue, both clipped to the opening."""
    wide = s["mouth_wide"]
    half = p.mouth_w * (1 + np.where(wide < 0, 0.42, 0.16) * wide + 0.06 * np.clip(s["smile"], 0, 1))
    gap = APERTURE * s["mouth_open"]
    bend = p.mouth_y + 0.05 * s["smile"] * (0.4 - _ACROSS**2)  # the corners rise in a smile
    x = half * _ACROSS
    upper, lower = bend - 0.3 * gap * _ARC, bend + 0.7 * gap * _ARC
    round_lip = p.lip * (0.25 + 0.75 * _ARC) * (1 - 0.25 * np.clip(wide, 0, 1) + 0.25 * np.clip(-wide, 0, 1))
    lips = _band(x * 1.08, upper - round_lip, lower + 1.15 * round_lip)
    teeth = np.minimum(upper + np.minimum(0.036, 0.4 * gap), lower)
    tongue = np.maximum(lower - 0.3 * gap * _ARC, upper + 0.45 * gap * _ARC)
    inner = 0.92 * x
    return [
        ("lips", lips),
        ("mouth", _band(inner, upper, lower)),
        ("teeth", _band(inner * 0.9, upper, np.maximum(teeth, upper))),
        ("tongue", _band(inner * 0.7, np.minimum(tongue, lower), lower)),
    ]


def _band(x: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Outline of the region between two curves over the same x."""
    return np.concatenate([np.stack([x, above], -1), np.stack([x, below], -1)[:, ::-1]], axis=1)
