"""Identities: the appearance of a person, a cartoon or an animal, drawn from one seed.

Lengths are in frame units (1 = the side of the square frame). Positions are relative to the centre of the head, y down.
Colours are sRGB, 0 to 255. Neighbouring parts (skin and lips, hair and background, …) have very different colours, so
that they are distinct after strong downsampling.
"""

import colorsys
from dataclasses import dataclass

import numpy as np

from avatar.errors import UserError

Colour = tuple[int, ...]  # red, green, blue

KINDS = {
    "human": ("person",),
    "cartoon": ("alien", "monster", "imp"),
    "animal": ("cat", "dog", "bear", "rabbit", "fox", "pig"),
}
SKINS = {
    "light": (246, 205, 176),
    "fair": (255, 219, 190),
    "tan": (222, 164, 118),
    "brown": (168, 112, 74),
    "dark": (122, 76, 50),
}
HAIRS = {
    "black": (38, 32, 36), "brown": (104, 62, 34), "blond": (236, 196, 92), "red": (190, 70, 32),
    "grey": (176, 178, 186), "pink": (236, 98, 160), "blue": (58, 96, 206), "green": (48, 140, 90),
}  # fmt: skip
FURS = {
    "cat": {"orange": (238, 146, 58), "grey": (146, 152, 168), "black": (66, 64, 76), "cream": (240, 214, 168)},
    "dog": {"brown": (158, 102, 58), "golden": (232, 182, 96), "white": (236, 232, 226), "grey": (138, 142, 152)},
    "bear": {"brown": (132, 86, 52), "white": (238, 238, 240), "black": (72, 62, 66)},
    "rabbit": {"white": (240, 236, 238), "grey": (164, 166, 178), "brown": (186, 146, 110), "pink": (246, 190, 204)},
    "fox": {"red": (222, 98, 40), "orange": (244, 140, 50), "white": (238, 240, 246)},
    "pig": {"pink": (250, 172, 180), "brown": (176, 128, 108), "grey": (172, 164, 174)},
}
CARTOON = {
    "green": (98, 196, 92), "blue": (82, 150, 232), "purple": (162, 104, 216), "yellow": (248, 210, 66),
    "turquoise": (60, 196, 188), "pink": (244, 128, 178), "red": (228, 84, 78),
}  # fmt: skip
SHIRTS = {
    "red": (206, 48, 52), "blue": (46, 92, 198), "green": (38, 142, 78), "yellow": (240, 192, 40),
    "purple": (126, 64, 172), "orange": (238, 122, 36), "white": (240, 240, 236), "black": (48, 50, 60),
}  # fmt: skip
EYES = ((74, 44, 24), (40, 92, 170), (46, 124, 70), (92, 92, 100), (150, 96, 30))
LIPS = ((196, 48, 62), (238, 92, 108), (120, 14, 42))
HAIR_STYLES = ("short", "parted", "long", "bob", "spiky", "curly", "bald")
PARTS = ("background", "disc", "shirt", "skin", "hair", "muzzle")  # large enough to identify a puppet by their colours


@dataclass(frozen=True)
class Identity:
    """The appearance of one puppet, a function of its seed; `palette` has all of its colours by name."""

    seed: int
    species: str  # a key of KINDS
    kind: str
    coat: str  # colour word of the fur or skin; of a person, that of the hair
    shirt: str  # colour word
    hair_style: str  # one of HAIR_STYLES, "none" for animals, "tuft", "horns" or "antennae" for cartoons
    ears: str  # "round", "pointed", "floppy", "bear", "long" or "none"
    nose: str  # "human", "button", "snout" or "none"
    muzzle: bool
    blush: bool
    head_w: float  # half width
    head_h: float  # half height
    taper: float  # share by which the head narrows towards the chin
    eye_x: float
    eye_y: float
    eye_w: float  # half width
    eye_h: float  # half height
    brow: float  # thickness
    nose_y: float
    nose_w: float
    mouth_y: float
    mouth_w: float  # half width of the mouth at rest
    lip: float  # thickness
    shoulders: float  # half width
    disc: float  # radius of the disc on the background
    palette: dict[str, Colour]

    def __hash__(self) -> int:
        return hash(self.seed)

    @property
    def description(self) -> str:
        """Description for captions: "orange cat", "person with red hair"."""
        if self.species != "human":
            return f"{self.coat} {self.kind}"
        return "bald person" if self.hair_style == "bald" else f"person with {self.coat} hair"

    @classmethod
    def from_seed(cls, seed: int) -> "Identity":
        """Draw an identity. Raises UserError for a seed below 0."""
        if seed < 0:
            raise UserError(f"got the identity seed {seed}; expected an integer >= 0: choose another")
        rng = np.random.default_rng([seed, 0x1D])
        species = str(rng.choice(list(KINDS), p=(0.5, 0.2, 0.3)))
        kind = str(rng.choice(KINDS[species]))
        coats = {"human": HAIRS, "cartoon": CARTOON, "animal": FURS.get(kind)}[species]
        coat, shirt = str(rng.choice(list(coats))), str(rng.choice(list(SHIRTS)))
        person = species == "human"
        style = str(rng.choice(HAIR_STYLES, p=(0.16, 0.16, 0.16, 0.16, 0.15, 0.15, 0.06))) if person else "none"
        if species == "cartoon":
            style = {"alien": "antennae", "monster": "tuft", "imp": "horns"}[kind]
        big = {"human": 0.0, "cartoon": 1.0, "animal": 0.5}[species]  # relative size of the eyes
        mouth_y = 0.205 + rng.uniform(-0.012, 0.012)
        return cls(
            seed=seed,
            species=species,
            kind=kind,
            coat=coat,
            shirt=shirt,
            hair_style=style,
            ears={"person": "round", "cat": "pointed", "fox": "pointed", "dog": "floppy", "bear": "bear", "pig": "bear",
                  "rabbit": "long", "imp": "round"}.get(kind, "none"),
            nose={"human": "human", "cartoon": "none"}.get(species, "snout" if kind == "pig" else "button"),
            muzzle=species == "animal" and kind != "pig",
            blush=bool(rng.random() < 0.5),
            head_w=rng.uniform(0.29, 0.335) + 0.03 * (not person),
            head_h=rng.uniform(0.365, 0.385),
            taper=rng.uniform(0.06, 0.2) * (1.0 if person else 0.4),
            eye_x=rng.uniform(0.122, 0.145) + 0.012 * big,
            eye_y=rng.uniform(-0.085, -0.06),
            eye_w=rng.uniform(0.07, 0.08) + 0.012 * big,
            eye_h=rng.uniform(0.05, 0.064) + 0.026 * big,
            brow=rng.uniform(0.022, 0.032),
            nose_y=mouth_y - rng.uniform(0.125, 0.14),
            nose_w=rng.uniform(0.03, 0.042) + 0.01 * (not person),
            mouth_y=mouth_y,
            mouth_w=rng.uniform(0.155, 0.178),
            lip=rng.uniform(0.02, 0.03),
            shoulders=rng.uniform(0.36, 0.46),
            disc=rng.uniform(0.36, 0.48),
            palette=_palette(rng, species, kind, coats[coat], SHIRTS[shirt]),
        )  # fmt: skip


def _palette(rng: np.random.Generator, species: str, kind: str, coat: Colour, shirt: Colour) -> dict[str, Colour]:
    """All colours; the background is drawn again until it differs from skin, hair and shirt."""
    skin = SKINS[str(rng.choice(list(SKINS)))] if species == "human" else coat
    skin, coat, shirt = (_jittered(rng, c) for c in (skin, coat, shirt))
    hair = coat if species == "human" else _shaded(skin, 0.6)
    while True:
        background = _hsv(rng.random(), rng.uniform(0.25, 0.55), rng.uniform(0.75, 0.95))
        if min(_distance(background, c) for c in (skin, hair, shirt)) > 90:
            break
    pale = (252, 240, 224) if sum(skin) < 620 else _shaded(skin, 0.84)
    muzzle = _blend(pale, skin, 0.15) if species == "animal" and kind != "pig" else skin
    lips = max(LIPS, key=lambda lip: min(_distance(lip, muzzle), 110))  # the first with enough contrast
    return {
        "background": background,
        "disc": _blend(background, (255, 255, 255), 0.35),
        "shirt": shirt,
        "collar": _shaded(shirt, 0.75),
        "sleeve": _shaded(shirt, 0.86),
        "trousers": _shaded((shirt[2], shirt[0], shirt[1]), 0.55),
        "shoes": (40, 34, 36),
        "floor": _shaded(background, 0.82),
        "neck": _shaded(skin, 0.84),
        "skin": skin,
        "lid": _shaded(skin, 0.86),
        "hair": hair,
        "inner_ear": _blend(skin, (240, 140, 150), 0.55),
        "muzzle": muzzle,
        "blush": _blend(skin, (240, 90, 100), 0.3),
        "nose": {"human": _shaded(skin, 0.8)}.get(
            species, (58, 40, 44) if kind in ("dog", "bear", "fox") else (226, 110, 130)
        ),
        "nostril": _shaded(skin, 0.45),
        "brow": _shaded(hair, 0.8) if sum(hair) < 600 else _shaded(hair, 0.6),
        "white": (252, 252, 250),
        "iris": _jittered(rng, EYES[rng.integers(len(EYES))]),
        "pupil": (18, 16, 22),
        "lash": (44, 28, 28),
        "lips": _jittered(rng, lips),
        "mouth": (66, 10, 24),
        "teeth": (250, 248, 240),
        "tongue": (224, 96, 108),
    }


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _jittered(rng: np.random.Generator, colour: Colour) -> Colour:
    """A similar colour, so that no two identities have the same palette."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    dh, ds, dv = rng.uniform(-1, 1, 3) * (0.012, 0.05, 0.05)
    return _hsv(hue + dh, min(max(saturation + ds, 0.0), 1.0), min(max(value + dv, 0.0), 1.0))


def _blend(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _shaded(colour: Colour, factor: float) -> Colour:
    return tuple(round(c * factor) for c in colour)


def _distance(a: Colour, b: Colour) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
