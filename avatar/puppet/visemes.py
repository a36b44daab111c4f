"""Visemes: opening and width of the mouth for phonemes and audio, at 25 frames per second.

    mouth_open in [0, 1]    0: lips closed
    mouth_wide in [-1, 1]   -1: rounded (u, w), 0: at rest, 1: spread (i)

Frame i is the mouth at time (i + 0.5) / 25 s. The lips lead the audio by 20 ms. Each phoneme has a target. Targets are
blended over time (coarticulation), and the opening is scaled by the loudness of the audio. The lips always close for p,
b and m. Without a phoneme the mouth is closed and at rest.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter1d

from avatar.puppet.speech import Phoneme
from avatar.types import FRAME_RATE, SAMPLE_RATE

LEAD_S = 0.02  # of the lips, before the audio
BLEND_S = 0.024  # standard deviation of the blend between targets
CLOSURE_S = 0.05  # shortest closure of p, b and m: longer than a frame, so that at least one frame shows it
RAMP_S = 0.03  # duration of closing and of opening
GAIN = 1.2  # compensates the reduction of the opening by blending and loudness
GRID = 200  # steps per second of the simulation
CLOSED = frozenset("pbm")

# prefix of an eSpeak mnemonic → (open, wide); diphthongs have two targets
TARGETS = {
    "i": ((0.44, 0.9),), "I": ((0.52, 0.55),), "E": ((0.7, 0.45),), "e": ((0.66, 0.5),), "a": ((0.96, 0.25),),
    "A": ((1.0, -0.05),), "V": ((0.8, 0.05),), "0": ((0.88, -0.35),), "O": ((0.76, -0.65),), "o": ((0.68, -0.75),),
    "U": ((0.48, -0.7),), "u": ((0.4, -0.95),), "3": ((0.6, -0.3),), "@": ((0.55, 0.0),), "@L": ((0.5, 0.0),),
    "aI": ((0.96, 0.2), (0.54, 0.7)), "aU": ((0.96, 0.1), (0.5, -0.85)), "eI": ((0.68, 0.5), (0.48, 0.8)),
    "EI": ((0.68, 0.5), (0.48, 0.8)), "OI": ((0.76, -0.7), (0.52, 0.6)), "oU": ((0.7, -0.6), (0.45, -0.9)),
    "@U": ((0.68, -0.5), (0.45, -0.9)), "e@": ((0.7, 0.45), (0.6, 0.1)), "i@": ((0.46, 0.8), (0.6, 0.1)),
    "U@": ((0.48, -0.7), (0.62, -0.3)), "O@": ((0.76, -0.65), (0.6, -0.4)), "o@": ((0.76, -0.65), (0.6, -0.4)),
    "A@": ((1.0, -0.05), (0.68, -0.1)), "aI@": ((0.96, 0.2), (0.6, 0.3)), "aU@": ((0.96, 0.1), (0.6, -0.4)),
    "p": ((0.0, 0.0),), "b": ((0.0, 0.0),), "m": ((0.0, 0.0),), "f": ((0.08, 0.1),), "v": ((0.09, 0.1),),
    "T": ((0.15, 0.15),), "D": ((0.17, 0.15),), "s": ((0.1, 0.45),), "z": ((0.11, 0.45),), "S": ((0.15, -0.6),),
    "Z": ((0.15, -0.6),), "tS": ((0.13, -0.55),), "dZ": ((0.13, -0.55),), "t": ((0.13, 0.2),), "d": ((0.15, 0.2),),
    "n": ((0.16, 0.15),), "N": ((0.2, 0.1),), "l": ((0.24, 0.1),), "L": ((0.24, 0.1),), "r": ((0.24, -0.5),),
    "R": ((0.24, -0.5),), "k": ((0.17, 0.1),), "g": ((0.18, 0.1),), "x": ((0.18, 0.1),), "C": ((0.15, 0.4),),
    "h": ((0.3, 0.1),), "H": ((0.3, 0.1),), "j": ((0.22, 0.75),), "w": ((0.16, -1.0),), "?": ((0.2, 0.0),),
    "*": ((0.18, 0.1),), ";": ((0.25, 0.4),), "a#": ((0.6, 0.05),),
}  # fmt: skip
_LONGEST = max(map(len, TARGETS))
_NEUTRAL = ((0.35, 0.0),)  # for mnemonics of other languages


def target(symbol: str) -> tuple[tuple[float, float], ...]:
    """One or two (open, wide) targets of a phoneme, for equal parts of its duration, by the longest matching prefix."""
    for length in range(_LONGEST, 0, -1):
        if symbol[:length] in TARGETS:
            return TARGETS[symbol[:length]]
    return _NEUTRAL


def mouth_targets(
    phonemes: Sequence[Phoneme], samples: Float[np.ndarray, " n"], frames: int
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]:
    """Trajectories of `mouth_open` and `mouth_wide`.

    Args:
        phonemes: with times relative to the first sample.
        samples: of the audio at 16 kHz; the first one is at the start of frame 0.
        frames: f.
    """
    time = np.arange(-GRID // 2, round(frames / FRAME_RATE * GRID) + GRID // 2) / GRID
    opened, wide, speaking = np.zeros((3, len(time)))
    closed = np.zeros(len(time))
    for phoneme in phonemes:
        start, end = phoneme.start_s - LEAD_S, phoneme.end_s - LEAD_S
        poses = target(phoneme.symbol)
        edges = np.searchsorted(time, np.linspace(start, end, len(poses) + 1))
        for (o, w), first, last in zip(poses, edges[:-1], edges[1:], strict=True):
            opened[first:last], wide[first:last], speaking[first:last] = o, w, 1
        if phoneme.symbol[0] in CLOSED:
            middle, half = (start + end) / 2, max(end - start, CLOSURE_S) / 2
            first, last = np.searchsorted(time, (middle - half - RAMP_S, middle + half + RAMP_S))
            ramp = np.clip(1 + (half - np.abs(time[first:last] - middle)) / RAMP_S, 0, 1)
            closed[first:last] = np.maximum(closed[first:last], ramp * ramp * (3 - 2 * ramp))
    opened *= 0.15 + 0.85 * _loudness(samples, time)
    blend = BLEND_S * GRID
    opened = np.clip(GAIN * gaussian_filter1d(opened, blend), 0, 1) * (1 - closed)
    # The blend is wider, since the width extends over short gaps and consonants without a width of their own.
    wide = gaussian_filter1d(wide, 1.3 * blend) * np.clip(gaussian_filter1d(speaking, blend), 0, 1)
    centres = (np.arange(frames) + 0.5) / FRAME_RATE
    opened, wide = (np.interp(centres, time, values).astype(np.float32) for values in (opened, wide))
    return opened, wide


def _loudness(samples: Float[np.ndarray, " n"], time: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Loudness in [0, 1], smoothed over 20 ms: 1 in the loud parts of the audio, 0 at 20 dB below them and less."""
    hop = SAMPLE_RATE // GRID
    power = (samples[: len(samples) // hop * hop].reshape(-1, hop) ** 2).mean(1)
    if not power.any():
        return np.zeros(len(time))
    power = gaussian_filter1d(power, 2)
    loud = np.percentile(power[power > 1e-3 * power.max()], 80)
    at = np.round((time + LEAD_S) * GRID - 0.5).astype(int)
    within = (at >= 0) & (at < len(power))
    return np.where(within, 1 + np.log10(power[at.clip(0, len(power) - 1)] / loud + 1e-9) / 2, 0).clip(0, 1)
