"""Polygons of the body below the neck: torso, legs, arms and hands, in the puppet's units.

`upper` rotates an arm about its shoulder, from hanging (0) to sideways and up (1). `fore` bends the elbow, outwards and
up (1) or inwards across the body (-1). `hand` is relaxed (0), open (1) or pointing (-1).
"""

import numpy as np
from jaxtyping import Float

from avatar.puppet.identity import Identity

UPPER, FORE = 0.37, 0.33  # lengths of upper arm and forearm
REST_DEG, UPPER_DEG, FORE_DEG = 8.0, 142.0, 150.0
SIDES = {"l": -1, "r": 1}  # as the viewer sees them
Points = Float[np.ndarray, "_ p 2"]  # one polygon per frame, or one for all frames
Columns = dict[str, Float[np.ndarray, "f 1"]]

_HALF_TURN = np.linspace(-np.pi / 2, np.pi / 2, 7)
_TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_FINGERS = np.clip(np.cos(4 * _TURN), 0, 1) * (np.cos(_TURN) > -0.3)


def sway(s: Columns) -> Float[np.ndarray, "f 1"]:
    """Sideways displacement of the body, which follows the head."""
    return 0.3 * s["head_x"]


def lift(s: Columns) -> Float[np.ndarray, "f 1"]:
    """Upward displacement of the shoulders by breath and by a shrug."""
    return 0.008 * s["breath"] + 0.055 * s["shoulders"]


def torso(p: Identity, s: Columns) -> list[tuple[str, Points]]:
    """Polygons of legs, shoes and trunk, from back to front; all are below the frame of a portrait."""
    parts = []
    for side in (-1, 1):
        foot = side * 0.13
        hip, ankle = 0.5 + side * 0.12, 0.5 + foot
        leg = np.array([(hip - 0.085, 1.7), (hip + 0.085, 1.7), (ankle + 0.07, 2.6), (ankle - 0.07, 2.6)])[None]
        shoe = _capsule(_point(ankle, 2.64), _point(ankle + 0.6 * foot, 2.65), 0.06)
        parts += [("trousers", leg), ("shoes", shoe)]
    x, low = sway(s), 0.8 * p.shoulders
    corners = [(-p.shoulders * 0.97, 1.1), (p.shoulders * 0.97, 1.1), (low, 1.5), (low * 0.95, 1.82),
               (-low * 0.95, 1.82), (-low, 1.5)]  # fmt: skip
    trunk = np.stack([np.stack([0.5 + dx + x[:, 0] * (y < 1.4), np.full(len(x), y)], -1) for dx, y in corners], 1)
    return [*parts, ("shirt", trunk)]


def arms(p: Identity, s: Columns) -> list[tuple[str, Points]]:
    """Polygons of both arms, each from the shoulder to the finger tips."""
    parts = []
    for name, side in SIDES.items():
        shoulder, elbow, wrist, along = _joints(p, s, name)
        open_, point = np.clip(s[f"hand_{name}"], 0, 1), np.clip(-s[f"hand_{name}"], 0, 1)
        palm = wrist + 0.045 * along
        across = side * np.stack([-along[:, 1], along[:, 0]], -1)
        radius = 0.058 + open_ * (0.012 + 0.06 * _FINGERS)
        hand = palm[:, None] + radius[..., None] * (
            np.cos(_TURN)[:, None] * along[:, None] + np.sin(_TURN)[:, None] * across[:, None]
        )
        parts += [
            ("sleeve", _capsule(shoulder, elbow, 0.072)),
            ("sleeve", _capsule(elbow, wrist, 0.058)),
            ("skin", _capsule(palm, palm + (0.005 + 0.13 * point) * along, 0.026)),
            ("skin", hand),
        ]
    return parts


def _joints(p: Identity, s: Columns, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions of shoulder, elbow and wrist, and the unit vector along the forearm, each `f 2`."""
    side = SIDES[name]
    shoulder = np.concatenate([0.5 + side * (p.shoulders - 0.07) + sway(s), 1.085 - lift(s)], axis=1)
    first = np.deg2rad(REST_DEG + UPPER_DEG * s[f"upper_{name}"])
    second = first + np.deg2rad(FORE_DEG * s[f"fore_{name}"])
    elbow = shoulder + UPPER * np.concatenate([side * np.sin(first), np.cos(first)], axis=1)
    along = np.concatenate([side * np.sin(second), np.cos(second)], axis=1)
    return shoulder, elbow, elbow + FORE * along, along


def _capsule(a: Float[np.ndarray, "_ 2"], b: Float[np.ndarray, "_ 2"], radius: float) -> Points:
    """A capsule: a rectangle from a to b with round ends."""
    along = b - a
    along = along / np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-9)
    across = np.stack([-along[:, 1], along[:, 0]], -1)
    cap = np.cos(_HALF_TURN)[:, None] * along[:, None] + np.sin(_HALF_TURN)[:, None] * across[:, None]
    return np.concatenate([b[:, None] + radius * cap, a[:, None] - radius * cap], axis=1)


def _point(x: float, y: float) -> Float[np.ndarray, "1 2"]:
    return np.array([[x, y]])
