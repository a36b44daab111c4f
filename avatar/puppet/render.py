"""Rendering: a puppet's state → pixels.

Everything is a filled polygon. `layers` computes the polygons of all frames at once, back to front: of the puppet in
its own units (1 = the side of a portrait, y down), which the setting's camera maps to the frame. `paint` fills them
with anti-aliasing, so that motion of a fraction of a pixel is visible. State estimation (`state_estimator`) inverts
rendering, so the appearance of a puppet is defined only here, in `head` and in `body`.
"""

import aggdraw
import numpy as np
from jaxtyping import Float, UInt8

from avatar.errors import UserError
from avatar.puppet import body, head
from avatar.puppet.head import Parts, Polygons
from avatar.puppet.identity import Identity
from avatar.puppet.motion import CHANNELS
from avatar.puppet.setting import PORTRAIT, Setting
from avatar.types import REGIONS

SIZES = (64, 256)  # the smallest and the largest frame, in pixels
CENTRE = (0.5, 0.49)  # centre of the head at rest
PIVOT = 0.2  # of the roll, below the centre of the head


def render(
    identity: Identity, states: Float[np.ndarray, "f s"], size: int, setting: Setting = PORTRAIT
) -> UInt8[np.ndarray, "f h w 3"]:
    """Render a trajectory.

    Args:
        identity: of the puppet.
        states: rows of motion.CHANNELS, at least one.
        size: height and width of the frames in pixels, 64 to 256.
        setting: framing, backdrop and thing.

    Raises:
        UserError: another size, or states of another shape.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"got frames of {size} pixels; expected {SIZES[0]} to {SIZES[1]}: choose another size")
    if states.ndim != 2 or states.shape[1] != len(CHANNELS) or not len(states):
        raise UserError(
            f"got states of shape {states.shape}; expected [f, {len(CHANNELS)}], f >= 1: pass rows of motion.CHANNELS"
        )
    return paint(layers(identity, states, setting), identity.palette | setting.colours, size)


def paint(polygons: Parts, palette: dict, size: int) -> UInt8[np.ndarray, "f h w 3"]:
    """Fill polygons with anti-aliasing, from back to front.

    Args:
        polygons: name of the colour, and one polygon per frame or one for all frames, in frame units.
        palette: name → sRGB colour; "background" fills the frame.
        size: height and width in pixels.
    """
    frames = max(len(points) for _, points in polygons)
    flat = [
        ((points * size).reshape(len(points), -1).tolist(), aggdraw.Brush(palette[name]))
        for name, points in polygons
        if points.min() < 1 and points.max() > 0 and points[..., 1].min() < 1  # the others are outside the frame
    ]
    flat = [(points * frames if len(points) == 1 else points, brush) for points, brush in flat]
    out = np.empty((frames, size, size, 3), np.uint8)
    for i in range(frames):
        canvas = aggdraw.Draw("RGB", (size, size), palette["background"])
        for points, brush in flat:
            canvas.polygon(points[i], brush)
        out[i] = np.frombuffer(canvas.tobytes(), np.uint8).reshape(size, size, 3)
    return out


def regions(
    identity: Identity, states: Float[np.ndarray, "f s"], size: int, setting: Setting = PORTRAIT
) -> Float[np.ndarray, "m f h w"]:
    """Masks of each of types.REGIONS: the share of each pixel that is inside, in [0, 1]."""
    functions = {"face": face_region, "lips": mouth_region, "eyes": eyes_region}
    return np.stack([functions[name](identity, states, size, setting) for name in REGIONS])


def face_region(
    identity: Identity, states: Float[np.ndarray, "f s"], size: int, setting: Setting = PORTRAIT
) -> Float[np.ndarray, "f h w"]:
    """Mask of the head's outline, in [0, 1], with hair, eyes and mouth but without ears."""
    s = _columns(states)
    outline = setting.camera(_posed(s, head.outline(identity, s), depth=0.0))
    palette = {"background": (0, 0, 0), "face": (255, 255, 255)}
    return paint([("face", outline)], palette, size)[..., 0] / np.float32(255)


def mouth_region(
    identity: Identity, states: Float[np.ndarray, "f s"], size: int, setting: Setting = PORTRAIT
) -> Float[np.ndarray, "f h w"]:
    """Mask of the mouth's surroundings, in [0, 1], with a soft edge.

    It is an ellipse that contains the mouth at its widest and fully open. It follows the head, not the lips.
    """
    middle, wide = identity.mouth_y + 0.03, 1.35 * identity.mouth_w
    return _region_of_head(states, size, setting, middle, wide, 0.145, depth=1.1, power=2)


def eyes_region(
    identity: Identity, states: Float[np.ndarray, "f s"], size: int, setting: Setting = PORTRAIT
) -> Float[np.ndarray, "f h w"]:
    """Mask of eyes and brows, in [0, 1], with a soft edge: a rounded box that contains them in every expression."""
    wide, above, below = (
        identity.eye_x + 1.25 * identity.eye_w,
        1.25 * identity.eye_h + 0.13,
        1.2 * identity.eye_h + 0.02,
    )
    middle, tall = identity.eye_y + (below - above) / 2, (above + below) / 2
    return _region_of_head(states, size, setting, middle, wide, tall, depth=1.0, power=6)


def _region_of_head(
    states: Float[np.ndarray, "f s"],
    size: int,
    setting: Setting,
    y: float,
    wide: float,
    tall: float,
    depth: float,
    power: int,
) -> Float[np.ndarray, "f h w"]:
    """Mask of a part of the head, with half axes `wide` and `tall` in the puppet's units.

    A superellipse: an ellipse for a power of 2, ever more like a box for higher ones.
    """
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    centre = setting.camera(_posed(_columns(states), np.array([[[0.0, y]]]), depth)[:, 0])
    centre_x, centre_y = np.moveaxis(centre.astype(np.float32), -1, 0)
    zoom = setting.camera.zoom
    dx = np.abs((pixels - centre_x[:, None]) / (zoom * wide)) ** power
    dy = np.abs((pixels - centre_y[:, None]) / (zoom * tall)) ** power
    return np.clip((1.3 - (dy[:, :, None] + dx[:, None, :]) ** (1 / power)) / 0.5, 0, 1)


def layers(identity: Identity, states: Float[np.ndarray, "f s"], setting: Setting) -> Parts:
    """The polygons of every frame, back to front, each with the name of its colour in the palette."""
    s = _columns(states)
    disc = [("disc", head.ellipse(0.5, 0.45, identity.disc, identity.disc)[None])] if setting.backdrop == "disc" else []
    puppet = [
        *disc,
        *_posed_all(s, head.hair_behind(identity), depth=-0.35),
        *body.torso(identity, s),
        *_shoulders(identity, s),
        *_posed_all(s, head.ears(identity), depth=-0.35),
        *_posed_all(s, [("skin", head.outline(identity, s))], depth=0.0),
        *_posed_all(s, head.hair(identity), depth=0.3),
        *_posed_all(s, head.cheeks(identity), depth=0.9),
        *_posed_all(s, head.eyes(identity, s), depth=1.0),
        *_posed_all(s, head.nose(identity), depth=1.35),
        *_posed_all(s, head.mouth(identity, s), depth=1.1),
        *body.arms(identity, s),
    ]
    behind = [(name, points[None]) for name, points in setting.layers()]
    return [*behind, *((name, setting.camera(points)) for name, points in puppet)]


def _columns(states: Float[np.ndarray, "f s"]) -> dict[str, Float[np.ndarray, "f 1"]]:
    return {name: states[:, i, None].astype(np.float64) for i, name in enumerate(CHANNELS)}


def _posed(s: dict, points: Polygons, depth: float) -> Polygons:
    """Points of the head in the puppet's units: displaced by yaw and pitch times depth, rolled and translated."""
    x = points[..., 0] + 0.035 * depth * s["head_yaw"]
    y = points[..., 1] + 0.028 * depth * s["head_pitch"] - PIVOT
    roll = np.deg2rad(s["head_roll"])
    cos, sin = np.cos(roll), np.sin(roll)
    moved_x = cos * x - sin * y + CENTRE[0] + s["head_x"]
    return np.stack([moved_x, sin * x + cos * y + PIVOT + CENTRE[1] + s["head_y"]], axis=-1)


def _posed_all(s: dict, parts: Parts, depth: float) -> Parts:
    return [(name, _posed(s, points if points.ndim == 3 else points[None], depth)) for name, points in parts]


def _shoulders(p: Identity, s: dict) -> Parts:
    """Shoulders, collar and neck, between head and torso."""
    shoulders = head.ellipse(0.5 + body.sway(s), 1.06 - body.lift(s), p.shoulders, 0.2)
    collar = head.ellipse(
        0.5 + body.sway(s), 0.89 - 0.008 * s["breath"] - 0.03 * s["shoulders"], 0.17, 0.055, head.SMALL
    )
    neck = np.array([(0.39, 0.7), (0.61, 0.7), (0.62, 0.91), (0.38, 0.91)])[None]
    return [
        ("shirt", shoulders),
        ("collar", collar),
        ("neck", neck + np.stack([0.5 * s["head_x"], 0 * s["head_x"]], axis=-1)),
    ]
