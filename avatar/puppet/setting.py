"""Settings: the framing of the camera, the backdrop, and a thing that the puppet may look at.

A camera maps the puppet's units (1 = the side of a portrait, y down) to frame units. Backdrop and thing are in frame
units, behind the puppet.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from avatar.errors import UserError
from avatar.puppet.identity import Colour

Points = Float[np.ndarray, "*_ 2"]


@dataclass(frozen=True)
class Camera:
    """Camera that maps `top` to the upper edge of the frame, and enlarges by `zoom` relative to a portrait."""

    zoom: float
    top: float

    def __call__(self, points: Points) -> Points:
        return (points - (0.5, self.top)) * self.zoom + (0.5, 0.0)

    def box(self) -> tuple[float, float, float]:
        """Left, top and side of a portrait's square in the frame."""
        left, top = self(np.zeros(2))
        return float(left), float(top), self.zoom


CAMERAS = {"portrait": Camera(1.0, 0.0), "half": Camera(0.52, -0.1), "full": Camera(0.345, -0.1)}
BACKDROPS = ("disc", "plain", "room", "window", "stripes")
THINGS = ("ball", "box", "star")
THING_COLOURS: dict[str, Colour] = {"red": (220, 40, 44), "yellow": (250, 214, 40), "blue": (40, 80, 220)}
RADIUS = 0.075  # half the size of a thing


@dataclass(frozen=True)
class Thing:
    """An object next to the puppet; x and y of its centre are in frame units."""

    kind: str  # one of THINGS
    colour: str  # one of THING_COLOURS
    x: float
    y: float

    @property
    def gaze(self) -> tuple[float, float]:
        """gaze_x and gaze_y of a puppet in the middle of the frame that looks at the thing."""
        return float(np.clip(2.1 * (self.x - 0.5), -0.9, 0.9)), float(np.clip(1.2 * (self.y - 0.42), -0.6, 0.6))

    def outline(self) -> Points:
        """Polygon of the thing, in frame units."""
        turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        radius = {
            "ball": np.full(20, RADIUS),
            "box": RADIUS * 0.85 / np.maximum(np.abs(np.cos(turn)), np.abs(np.sin(turn))),
            "star": RADIUS * np.where(np.arange(20) % 4 == 1, 1.2, np.where(np.arange(20) % 4 == 3, 0.5, 0.85)),
        }[self.kind]
        return np.stack([self.x + radius * np.cos(turn), self.y + radius * np.sin(turn)], axis=-1)


@dataclass(frozen=True)
class Setting:
    """The setting of a clip. Raises UserError for an unknown framing or backdrop."""

    framing: str = "portrait"  # one of CAMERAS
    backdrop: str = "disc"  # one of BACKDROPS
    thing: Thing | None = None

    def __post_init__(self):
        for name, value, known in (("framing", self.framing, CAMERAS), ("backdrop", self.backdrop, BACKDROPS)):
            if value not in known:
                raise UserError(f"got the {name} {value!r}; expected one of {', '.join(known)}: choose another")

    @property
    def camera(self) -> Camera:
        return CAMERAS[self.framing]

    @property
    def colours(self) -> dict[str, Colour]:
        """Colours in addition to a puppet's palette."""
        return {} if self.thing is None else {"thing": THING_COLOURS[self.thing.colour]}

    def layers(self) -> list[tuple[str, Points]]:
        """Polygons behind the puppet, without the disc, which belongs to the identity."""
        parts = {
            "room": [("floor", _box(0.0, 0.78, 1.0, 1.0))],
            "window": [("disc", _box(0.06, 0.08, 0.3, 0.42)), ("disc", _box(0.34, 0.08, 0.58, 0.42))],
            "stripes": [("disc", _box(left, 0.0, left + 0.09, 1.0)) for left in (0.05, 0.275, 0.5, 0.725, 0.95)],
        }.get(self.backdrop, [])
        return parts if self.thing is None else [*parts, ("thing", self.thing.outline())]


PORTRAIT = Setting()


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=np.float64)
