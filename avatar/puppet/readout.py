"""Pixels → a puppet's state, by analysis through synthesis: find the state whose render explains the frame.

The identity and its setting are known. Frame and render are compared on coarse, slightly blurred grids of features x:
one over the frame, and where the camera stands farther off, another over the head, as a portrait would show it. The
parts are read in turn. Arms, whose pictures are no linear function of their angles, are those of the renders in a bank
that together explain that side of the frame best (`avatar.puppet.arms`). For all else a linear map gives a first
guess, then each step renders the current guess q and corrects it by what the render doesn't explain:

    q0 = mean + A (x - mean x),    q <- q + B (x - x(render(q)))

A and B are ridge regressions, fitted when the read-out is built, on renders of random states of this identity, half
of them blurred and tinted. Nothing else is learned, and a fixed point is a render that fits. What remains
unexplained of the head is the residual, which says when not to believe a reading.
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import minimum_filter

from avatar.errors import UserError
from avatar.puppet.arms import ARMS, ArmBank, resting
from avatar.puppet.identity import PARTS, Identity
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel
from avatar.puppet.render import SIZES, mouth_region, render
from avatar.puppet.setting import PORTRAIT, Setting

READABLE = (
    "mouth_open",
    "mouth_wide",
    "smile",
    "brow_raise",
    "brow_tilt",
    "lid",
    "head_x",
    "head_y",
    "head_roll",
    "head_yaw",
    "head_pitch",
)
WITH_ARMS = (*READABLE, "shoulders", *ARMS)  # what can be read where the camera shows them
CELLS = 32  # features per side of a grid
BANK = 800  # random states that the maps are fitted on
STEPS = 2
NOISE = 3.0  # standard deviation that the maps expect of a feature, in grey levels
FACE_RESIDUAL, MOUTH_RESIDUAL = 0.2, 0.45  # a reading with more than this is not valid
WORK = 128  # larger frames are compared with renders of this size

_CENTRE, _HALF = (HIGH + LOW) / 2, (HIGH - LOW) / 2
_ARMS = [channel(name) for name in ARMS]
WHOLE_BATCH = (0.0, 0.0, 1.0)  # a box: left, top and side in frame units
Frames = UInt8[np.ndarray, "f h w 3"]


@dataclass(frozen=True)
class Reading:
    """What was read of f frames."""

    states: Float[np.ndarray, "f s"]  # columns as motion.CHANNELS; trust those of `readable`
    residual: Float[np.ndarray, " f"]  # 1 - correlation with the last render: of face or mouth, the worse one
    valid: Bool[np.ndarray, " f"]  # False where the frame doesn't show this puppet, or not its mouth

    def column(self, name: str) -> Float[np.ndarray, " f"]:
        """The trajectory of one channel."""
        return self.states[:, channel(name)]


class Readout:
    """Reads the frames of one identity in one setting, `size` pixels square (64 to 256).

    Building it takes about a second, three where there are arms to see.
    """

    def __init__(self, identity: Identity, size: int, setting: Setting = PORTRAIT):
        if not SIZES[0] <= size <= SIZES[1]:
            raise UserError(
                f"frames of {size} pixels; puppets are drawn at {SIZES[0]} to {SIZES[1]}, choose a size there"
            )
        self.identity, self.size, self.setting = identity, size, setting
        self._work = min(size, WORK)
        head = setting.camera.box()
        self._boxes = (WHOLE_BATCH,) if setting.framing == "portrait" else (WHOLE_BATCH, head)
        rng = np.random.default_rng(0)
        self._arms = None
        if setting.framing != "portrait":
            self._arms = ArmBank(rng, lambda states: features(self._drawn(states)), CELLS, head)
        truth = self._random_states(rng, BANK)
        clean = self._rendered(truth)
        seen = _spoilt(rng, clean)
        self._mean, self._mean_state = seen.mean(0), truth.mean(0)
        self._guess = _ridge(seen - self._mean, (truth - self._mean_state) / _HALF)
        guess = self._first_guess(seen) + rng.normal(0, 0.1, truth.shape) * _HALF
        guess[:, _ARMS] = truth[:, _ARMS]
        guess = guess.clip(LOW, HIGH).astype(np.float32)
        self._correct = _ridge(seen - self._rendered(guess), (truth - guess) / _HALF)
        rest = np.zeros((1, len(CHANNELS)), np.float32)
        region = mouth_region(identity, rest, 2 * CELLS).reshape(CELLS, 2, CELLS, 2).mean((1, 3))
        self._mouth = np.repeat(region.ravel() > 0.95, 3)  # of the head's grid

    def read(self, frames: Frames) -> Reading:
        """The state of every frame; raises UserError for frames of another size."""
        if frames.shape[1:] != (self.size, self.size, 3) or frames.dtype != np.uint8:
            raise UserError(
                f"frames of shape {frames.shape} and type {frames.dtype}; this read-out was built for uint8 "
                f"[f, {self.size}, {self.size}, 3], resize the frames or build another"
            )
        parts = [self._read(frames[i : i + 256]) for i in range(0, len(frames), 256)]
        states, face, mouth = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Reading(states, np.maximum(face, mouth), (face < FACE_RESIDUAL) & (mouth < MOUTH_RESIDUAL))

    def _read(self, frames: Frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen = features(frames, self._boxes)
        states = self._first_guess(seen)
        states[:, _ARMS] = resting(len(frames)) if self._arms is None else self._arms.read(seen[:, : 3 * CELLS**2])
        states = states.clip(LOW, HIGH).astype(np.float32)
        for _ in range(STEPS):
            rendered = self._rendered(states)
            states = states + (_matched(seen, rendered) - rendered) @ self._correct * _HALF
            states = states.clip(LOW, HIGH).astype(np.float32)
        seen, rendered = (x[:, -3 * CELLS**2 :] for x in (seen, rendered))  # the head's
        return states, _mismatch(seen, rendered), _mismatch(seen[:, self._mouth], rendered[:, self._mouth])

    def _rendered(self, states: Float[np.ndarray, "f s"]) -> Float[np.ndarray, "f n"]:
        return features(self._drawn(states), self._boxes)

    def _drawn(self, states: Float[np.ndarray, "f s"]) -> Frames:
        return render(self.identity, states, self._work, self.setting)

    def _first_guess(self, seen: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f s"]:
        return self._mean_state + (seen - self._mean) @ self._guess * _HALF

    def _random_states(self, rng: np.random.Generator, count: int) -> Float[np.ndarray, "f s"]:
        """States all over the ranges, with closed mouths, closed eyes and resting arms as common as they are."""
        states = _CENTRE + _HALF * rng.uniform(-1, 1, (count, len(CHANNELS)))
        states[:, channel("mouth_open")] *= rng.random(count) > 0.2
        states[:, channel("shoulders")] *= rng.random(count) < 0.3
        lid = channel("lid")
        states[:, lid] = np.where(
            rng.random(count) < 0.3, rng.uniform(0.3, 1, count), rng.uniform(LOW[lid], 0.3, count)
        )
        still = resting(count)
        if self._arms is not None:
            still = np.where(rng.random((count, 1)) < 0.5, still, self._arms.poses[:count])
        states[:, _ARMS] = still
        return states.astype(np.float32)


def readable(setting: Setting) -> tuple[str, ...]:
    """The channels that frames of a setting show."""
    return (*READABLE, "shoulders") if setting.framing == "portrait" else WITH_ARMS


def features(
    frames: Frames, boxes: tuple[tuple[float, float, float], ...] = (WHOLE_BATCH,)
) -> Float[np.ndarray, "f n"]:
    """Frames blurred and sampled on a grid of CELLS x CELLS in each box; each colour less its mean over the grid."""
    grids = []
    for box in boxes:
        down, across = _sampling(frames.shape[1], box)
        rows = down @ frames.reshape(*frames.shape[:2], -1).astype(np.float32)
        cells = (rows.reshape(-1, across.shape[0]) @ across).reshape(len(frames), -1, 3)
        grids.append((cells - cells.mean(1, keepdims=True)).reshape(len(frames), -1))
    return np.concatenate(grids, axis=1) if len(grids) > 1 else grids[0]


@functools.cache
def _sampling(
    size: int, box: tuple[float, float, float]
) -> tuple[Float[np.ndarray, "cells size"], Float[np.ndarray, "rgb cells_rgb"]]:
    """A Gaussian of standard deviation half a cell around the middle of each cell: down the rows, across pixels."""
    left, top, side = box
    down, across = (_weights(size, start, side) for start in (top, left))
    return down, np.kron(across.T, np.eye(3, dtype=np.float32))


def _weights(size: int, start: float, side: float) -> Float[np.ndarray, "cells size"]:
    middles = start + side * (np.arange(CELLS) + 0.5) / CELLS
    pixels = (np.arange(size) + 0.5) / size
    width = max(0.5 * side / CELLS, 0.5 / size)  # no cell is narrower than a pixel
    weights = np.exp(-0.5 * ((pixels - middles[:, None]) / width) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _spoilt(rng: np.random.Generator, clean: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f n"]:
    """Features of which half are more blurred and every colour has more or less contrast."""
    grid = clean.reshape(len(clean), -1, CELLS, CELLS, 3)
    padded = np.pad(grid, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = 0.5 * padded[:, :, 1:-1] + 0.25 * (padded[:, :, :-2] + padded[:, :, 2:])
    blurred = 0.5 * rows[:, :, :, 1:-1] + 0.25 * (rows[:, :, :, :-2] + rows[:, :, :, 2:])
    amount = np.clip(rng.uniform(-1, 1, (len(grid), 1, 1, 1, 1)), 0, 1)
    tint = 1 + rng.normal(0, 0.04, (len(grid), 1, 1, 1, 3))
    return ((grid + amount * (blurred - grid)) * tint).reshape(clean.shape).astype(np.float32)


def _ridge(x: Float[np.ndarray, "m n"], y: Float[np.ndarray, "m s"]) -> Float[np.ndarray, "n s"]:
    """The linear map from x to y that is best under noise of NOISE on x; solved in samples, which are fewer."""
    gram = x @ x.T
    gram[np.diag_indices(len(x))] += len(x) * NOISE**2
    return (x.T @ np.linalg.solve(gram, y)).astype(np.float32)


def _matched(seen: Float[np.ndarray, "f n"], rendered: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f n"]:
    """The frames with the contrast of each colour scaled to fit the render: a tint is not a motion."""
    a, b = (v.reshape(len(v), -1, 3) for v in (seen, rendered))
    gain = (a * b).sum(1, keepdims=True) / np.maximum((a * a).sum(1, keepdims=True), 1e-6)
    return (a * gain.clip(0.7, 1.4)).reshape(seen.shape)


def _mismatch(seen: Float[np.ndarray, "f n"], rendered: Float[np.ndarray, "f n"]) -> Float[np.ndarray, " f"]:
    """1 - correlation, over cells and colours, each colour less its mean."""
    a, b = (v.reshape(len(v), -1, 3) - v.reshape(len(v), -1, 3).mean(1, keepdims=True) for v in (seen, rendered))
    scale = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return 1 - (a * b).sum((1, 2)) / np.maximum(scale, 1e-6)


def palette_error(
    identity: Identity, frames: Frames, states: Float[np.ndarray, "f s"], setting: Setting = PORTRAIT
) -> Float[np.ndarray, " f"]:
    """How far the colours of the frames' parts are from the identity's: the mean CIE76 difference over PARTS.

    A part's pixels are those that the render of `states` fills with its colour, and whose neighbours it does too. Their
    mean colour in the frame is compared with the palette in CIE Lab (D65): 2 is barely visible, 10 another shade, 50
    another colour.
    """
    rendered = render(identity, states, frames.shape[1], setting)
    reach = 1 + 2 * (frames.shape[1] // 64)
    errors = np.full((len(PARTS), len(frames)), np.nan)
    for row, name in enumerate(PARTS):
        colour = np.array(identity.palette[name])
        inside = (np.abs(rendered.astype(np.int16) - colour) <= 2).all(-1)
        inside = minimum_filter(inside, (1, reach, reach))
        count = inside.sum((1, 2))
        mean = np.einsum("fhwc,fhw->fc", frames, inside, dtype=np.float64) / np.maximum(count, 1)[:, None]
        errors[row] = np.where(count >= 4, np.linalg.norm(lab(mean) - lab(colour.astype(np.float64)), axis=-1), np.nan)
    return np.nanmean(errors, axis=0).astype(np.float32)


def lab(colours: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """sRGB in 0 to 255 → CIE Lab under D65."""
    c = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.072175), (0.0193339, 0.119192, 0.9503041)]
    )
    t = linear @ to_xyz.T / (0.95047, 1.0, 1.08883)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
