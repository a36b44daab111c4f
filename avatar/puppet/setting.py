"""Where a puppet is seen: the camera's framing, the backdrop, and a thing beside it that it may look at.

A camera maps the puppet's units (1 = the side of a portrait, y down) to the frame's. Backdrop and thing stand in frame
units, behind the puppet.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from avatar.errors import UserError

Colour = tuple[int, ...]
Points = Float[np.ndarray, "*_ 2"]


@dataclass(frozen=True)
class Camera:
    """Shows the puppet's units from `top` down, `zoom` times as large as a portrait does."""

    zoom: float
    top: float

    def __call__(self, points: Points) -> Points:
        return (points - (0.5, self.top)) * self.zoom + (0.5, 0.0)

    def box(self) -> tuple[float, float, float]:
        """Left, top and side of the portrait's square in this frame."""
        left, top = self(np.zeros(2))
        return float(left), float(top), self.zoom


CAMERAS = {"portrait": Camera(1.0, 0.0), "half": Camera(0.52, -0.1), "full": Camera(0.345, -0.1)}
BACKDROPS = ("disc", "plain", "room", "window", "stripes")
THINGS = ("ball", "box", "star")
THING_COLOURS: dict[str, Colour] = {"red": (220, 40, 44), "yellow": (250, 214, 40), "blue": (40, 80, 220)}
REACH = 0.075  # half the size of a thing


@dataclass(frozen=True)
class Thing:
    """An object beside the puppet, its middle in frame units."""

    kind: str  # one of THINGS
    colour: str  # one of THING_COLOURS
    x: float
    y: float

    @property
    def gaze(self) -> tuple[float, float]:
        """Where a puppet in the middle of the frame looks to see it, as gaze_x and gaze_y."""
        return float(np.clip(2.1 * (self.x - 0.5), -0.9, 0.9)), float(np.clip(1.2 * (self.y - 0.42), -0.6, 0.6))

    def outline(self) -> Points:
        turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        radius = {
            "ball": np.full(20, REACH),
            "box": REACH * 0.85 / np.maximum(np.abs(np.cos(turn)), np.abs(np.sin(turn))),
            "star": REACH * np.where(np.arange(20) % 4 == 1, 1.2, np.where(np.arange(20) % 4 == 3, 0.5, 0.85)),
        }[self.kind]
        return np.stack([self.x + radius * np.cos(turn), self.y + radius * np.sin(turn)], axis=-1)


@dataclass(frozen=True)
class Setting:
    """What a clip's frames share beside the puppet. Raises UserError for a framing or a backdrop there isn't."""

    framing: str = "portrait"
    backdrop: str = "disc"
    thing: Thing | None = None

    def __post_init__(self):
        for name, value, known in (("framing", self.framing, CAMERAS), ("backdrop", self.backdrop, BACKDROPS)):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")

    @property
    def camera(self) -> Camera:
        return CAMERAS[self.framing]

    @property
    def colours(self) -> dict[str, Colour]:
        """What it adds to a puppet's palette."""
        return {} if self.thing is None else {"thing": THING_COLOURS[self.thing.colour]}

    def layers(self) -> list[tuple[str, Points]]:
        """Polygons behind the puppet, but for the disc, which is the identity's."""
        parts = {
            "room": [("floor", _box(0.0, 0.78, 1.0, 1.0))],
            "window": [("disc", _box(0.06, 0.08, 0.3, 0.42)), ("disc", _box(0.34, 0.08, 0.58, 0.42))],
            "stripes": [("disc", _box(left, 0.0, left + 0.09, 1.0)) for left in (0.05, 0.275, 0.5, 0.725, 0.95)],
        }.get(self.backdrop, [])
        return parts if self.thing is None else [*parts, ("thing", self.thing.outline())]


PORTRAIT = Setting()


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=np.float64)
