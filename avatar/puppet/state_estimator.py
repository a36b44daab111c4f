"""State estimation from pixels, by analysis through synthesis: the state whose render is closest to the frame.

Identity and setting are known. Frame and render are compared by features x on coarse, slightly blurred grids: one over
the frame, and for half and full framings another over the head, as in a portrait. Arms are estimated from a bank of
renders (`avatar.puppet.arms`), since an image is not a linear function of their angles. For all other channels a linear
map gives a first guess q0, and each step corrects it by the difference to its render:

    q0 = mean + A (x - mean x),    q <- q + B (x - x(render(q)))

A and B are ridge regressions, fitted once per estimator on renders of random states of this identity, half of them
blurred and tinted. A fixed point is a render that is equal to the frame. The residual, the remaining difference in the
head, decides whether an estimate is valid.
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

FACE_CHANNELS = (
    "mouth_open",
    "mouth_wide",
    "smile",
    "brow_raise",
    "brow_tilt",
    "lid",
    "gaze_x",
    "head_x",
    "head_y",
    "head_roll",
    "head_yaw",
    "head_pitch",
)
BODY_CHANNELS = (*FACE_CHANNELS, "shoulders", *ARMS)  # visible in half and full framings
CELLS = 32  # features per side of a grid
SAMPLES = 800  # random states that the maps are fitted on
STEPS = 2
NOISE = 3.0  # assumed standard deviation of a feature's noise, in grey levels
MAX_FACE_RESIDUAL, MAX_MOUTH_RESIDUAL = 0.2, 0.45  # of a valid estimate, at most
MAX_RENDER = 128  # larger frames are compared with renders of this size

_CENTRE, _HALF = (HIGH + LOW) / 2, (HIGH - LOW) / 2
_ARMS = [channel(name) for name in ARMS]
FULL_FRAME = (0.0, 0.0, 1.0)  # a box: left, top and side in frame units
Frames = UInt8[np.ndarray, "f h w 3"]


@dataclass(frozen=True)
class StateEstimate:
    """Estimated states of f frames."""

    states: Float[np.ndarray, "f s"]  # columns of motion.CHANNELS; only `visible_channels` have a meaning
    residual: Float[np.ndarray, " f"]  # 1 - correlation with the last render, of the face or the mouth: the larger one
    valid: Bool[np.ndarray, " f"]  # False: the frame does not show this puppet, or not its mouth

    def column(self, name: str) -> Float[np.ndarray, " f"]:
        """The trajectory of one channel."""
        return self.states[:, channel(name)]


class StateEstimator:
    """Estimator of the states of one identity in one setting; construction takes 1 s, with visible arms 3 s.

    Args:
        identity: of the puppet.
        size: height and width of the frames in pixels, 64 to 256.
        setting: of the frames.

    Raises:
        UserError: a size that puppets are not drawn at.
    """

    def __init__(self, identity: Identity, size: int, setting: Setting = PORTRAIT):
        if not SIZES[0] <= size <= SIZES[1]:
            raise UserError(f"got frames of {size} pixels; expected {SIZES[0]} to {SIZES[1]}: choose another size")
        self.identity, self.size, self.setting = identity, size, setting
        self._render_size = min(size, MAX_RENDER)
        head = setting.camera.box()
        self._boxes = (FULL_FRAME,) if setting.framing == "portrait" else (FULL_FRAME, head)
        rng = np.random.default_rng(0)
        self._arms = None
        if setting.framing != "portrait":
            self._arms = ArmBank(rng, lambda states: features(self._render(states)), CELLS, head)
        truth = self._random_states(rng, SAMPLES)
        clean = self._render_features(truth)
        augmented = _augmented(rng, clean)
        self._mean, self._mean_state = augmented.mean(0), truth.mean(0)
        self._guess_map = _ridge(augmented - self._mean, (truth - self._mean_state) / _HALF)
        guess = self._first_guess(augmented) + rng.normal(0, 0.1, truth.shape) * _HALF
        guess[:, _ARMS] = truth[:, _ARMS]
        guess = guess.clip(LOW, HIGH).astype(np.float32)
        self._correction_map = _ridge(augmented - self._render_features(guess), (truth - guess) / _HALF)
        rest = np.zeros((1, len(CHANNELS)), np.float32)
        region = mouth_region(identity, rest, 2 * CELLS).reshape(CELLS, 2, CELLS, 2).mean((1, 3))
        self._mouth = np.repeat(region.ravel() > 0.95, 3)  # features of the head's grid

    def estimate(self, frames: Frames) -> StateEstimate:
        """Estimate the state of every frame. Raises UserError for frames of another size or type."""
        if frames.shape[1:] != (self.size, self.size, 3) or frames.dtype != np.uint8:
            raise UserError(
                f"got frames of shape {frames.shape} and type {frames.dtype}; expected uint8 of "
                f"[f, {self.size}, {self.size}, 3]: resize them or create a StateEstimator of their size"
            )
        parts = [self._estimate(frames[i : i + 256]) for i in range(0, len(frames), 256)]
        states, face, mouth = (np.concatenate(column) for column in zip(*parts, strict=True))
        return StateEstimate(states, np.maximum(face, mouth), (face < MAX_FACE_RESIDUAL) & (mouth < MAX_MOUTH_RESIDUAL))

    def _estimate(self, frames: Frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = features(frames, self._boxes)
        states = self._first_guess(x)
        states[:, _ARMS] = resting(len(frames)) if self._arms is None else self._arms.estimate(x[:, : 3 * CELLS**2])
        states = states.clip(LOW, HIGH).astype(np.float32)
        for _ in range(STEPS):
            rendered = self._render_features(states)
            states = states + (_with_contrast_of(rendered, x) - rendered) @ self._correction_map * _HALF
            states = states.clip(LOW, HIGH).astype(np.float32)
        x, rendered = (grids[:, -3 * CELLS**2 :] for grids in (x, rendered))  # of the head
        return states, _residual(x, rendered), _residual(x[:, self._mouth], rendered[:, self._mouth])

    def _render_features(self, states: Float[np.ndarray, "f s"]) -> Float[np.ndarray, "f n"]:
        return features(self._render(states), self._boxes)

    def _render(self, states: Float[np.ndarray, "f s"]) -> Frames:
        return render(self.identity, states, self._render_size, self.setting)

    def _first_guess(self, x: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f s"]:
        return self._mean_state + (x - self._mean) @ self._guess_map * _HALF

    def _random_states(self, rng: np.random.Generator, count: int) -> Float[np.ndarray, "f s"]:
        """States over the full ranges, with closed mouths, closed eyes and resting arms as frequent as in clips."""
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


def visible_channels(setting: Setting) -> tuple[str, ...]:
    """The channels that can be estimated in a setting."""
    return (*FACE_CHANNELS, "shoulders") if setting.framing == "portrait" else BODY_CHANNELS


def features(frames: Frames, boxes: tuple[tuple[float, float, float], ...] = (FULL_FRAME,)) -> Float[np.ndarray, "f n"]:
    """Features of frames: blurred, sampled on a grid of CELLS × CELLS per box, minus the mean of each colour and grid.

    Args:
        frames: of any size.
        boxes: left, top and side of each grid, in shares of the frame.
    """
    grids = []
    for box in boxes:
        down, across = _sampling_matrices(frames.shape[1], box)
        rows = down @ frames.reshape(*frames.shape[:2], -1).astype(np.float32)
        cells = (rows.reshape(-1, across.shape[0]) @ across).reshape(len(frames), -1, 3)
        grids.append((cells - cells.mean(1, keepdims=True)).reshape(len(frames), -1))
    return np.concatenate(grids, axis=1) if len(grids) > 1 else grids[0]


@functools.cache
def _sampling_matrices(
    size: int, box: tuple[float, float, float]
) -> tuple[Float[np.ndarray, "cells size"], Float[np.ndarray, "rgb cells_rgb"]]:
    """Weights of rows and of pixels in each cell: a Gaussian around its centre, with σ of half a cell."""
    left, top, side = box
    down, across = (_gaussian_weights(size, start, side) for start in (top, left))
    return down, np.kron(across.T, np.eye(3, dtype=np.float32))


def _gaussian_weights(size: int, start: float, side: float) -> Float[np.ndarray, "cells size"]:
    middles = start + side * (np.arange(CELLS) + 0.5) / CELLS
    pixels = (np.arange(size) + 0.5) / size
    width = max(0.5 * side / CELLS, 0.5 / size)  # at least half a pixel
    weights = np.exp(-0.5 * ((pixels - middles[:, None]) / width) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _augmented(rng: np.random.Generator, clean: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f n"]:
    """Features with random blur in half of the frames, and a random contrast of each colour."""
    grid = clean.reshape(len(clean), -1, CELLS, CELLS, 3)
    padded = np.pad(grid, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = 0.5 * padded[:, :, 1:-1] + 0.25 * (padded[:, :, :-2] + padded[:, :, 2:])
    blurred = 0.5 * rows[:, :, :, 1:-1] + 0.25 * (rows[:, :, :, :-2] + rows[:, :, :, 2:])
    amount = np.clip(rng.uniform(-1, 1, (len(grid), 1, 1, 1, 1)), 0, 1)
    tint = 1 + rng.normal(0, 0.04, (len(grid), 1, 1, 1, 3))
    return ((grid + amount * (blurred - grid)) * tint).reshape(clean.shape).astype(np.float32)


def _ridge(x: Float[np.ndarray, "m n"], y: Float[np.ndarray, "m s"]) -> Float[np.ndarray, "n s"]:
    """Ridge regression from x to y for noise of NOISE on x, in its dual form: m samples are fewer than n features."""
    gram = x @ x.T
    gram[np.diag_indices(len(x))] += len(x) * NOISE**2
    return (x.T @ np.linalg.solve(gram, y)).astype(np.float32)


def _with_contrast_of(rendered: Float[np.ndarray, "f n"], x: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f n"]:
    """x with the contrast of each colour fitted to the render, so that a tint does not change the state."""
    a, b = (v.reshape(len(v), -1, 3) for v in (x, rendered))
    gain = (a * b).sum(1, keepdims=True) / np.maximum((a * a).sum(1, keepdims=True), 1e-6)
    return (a * gain.clip(0.7, 1.4)).reshape(x.shape)


def _residual(x: Float[np.ndarray, "f n"], rendered: Float[np.ndarray, "f n"]) -> Float[np.ndarray, " f"]:
    """1 - correlation over cells and colours, with each colour centred."""
    a, b = (v.reshape(len(v), -1, 3) - v.reshape(len(v), -1, 3).mean(1, keepdims=True) for v in (x, rendered))
    scale = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return 1 - (a * b).sum((1, 2)) / np.maximum(scale, 1e-6)


def palette_error(
    identity: Identity, frames: Frames, states: Float[np.ndarray, "f s"], setting: Setting = PORTRAIT
) -> Float[np.ndarray, " f"]:
    """Colour error of the puppet's parts against its palette: mean CIE76 difference over PARTS, in CIE Lab (D65).

    The colour of a part is the mean over the pixels that the render fills with it, without those at its edge. A
    difference of 2 is barely visible, 10 is another shade, 50 another colour.

    Args:
        frames: of any size from 64 to 256.
        states: of the frames, estimated or true.
    """
    rendered = render(identity, states, frames.shape[1], setting)
    erosion = 1 + 2 * (frames.shape[1] // 64)
    errors = np.full((len(PARTS), len(frames)), np.nan)
    for row, name in enumerate(PARTS):
        colour = np.array(identity.palette[name])
        inside = (np.abs(rendered.astype(np.int16) - colour) <= 2).all(-1)
        inside = minimum_filter(inside, (1, erosion, erosion))
        count = inside.sum((1, 2))
        mean = np.einsum("fhwc,fhw->fc", frames, inside, dtype=np.float64) / np.maximum(count, 1)[:, None]
        errors[row] = np.where(count >= 4, np.linalg.norm(lab(mean) - lab(colour.astype(np.float64)), axis=-1), np.nan)
    return np.nanmean(errors, axis=0).astype(np.float32)


def lab(colours: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """CIE Lab (D65) of sRGB colours in 0 to 255."""
    c = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.072175), (0.0193339, 0.119192, 0.9503041)]
    )
    t = linear @ to_xyz.T / (0.95047, 1.0, 1.08883)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
