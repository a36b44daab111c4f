"""Fixtures: speaking puppets, their videos, and estimated clips, true and synthetic."""

import numpy as np
import pytest

from avatar.metrics import statistics
from avatar.metrics.state_estimation import EstimatedClip, PixelReader
from avatar.puppet.clip import make_clip
from avatar.puppet.motion import CHANNELS
from avatar.puppet.worlds import PixelWorld

FRAMES = 120


@pytest.fixture(scope="module")
def few_draws():
    """Intervals from few resamples: they take most of the time of a score."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "DRAWS", 100)
        yield


@pytest.fixture(scope="session")
def clips():
    return [make_clip(seed, "test", FRAMES, "speaking", backend="formant") for seed in (1, 3, 4)]


@pytest.fixture(scope="session")
def videos(clips):
    return [PixelWorld(64).video(clip, 0, FRAMES) for clip in clips]


@pytest.fixture(scope="session")
def true_estimates(clips, videos):
    return [PixelReader(64).read(clip, video) for clip, video in zip(clips, videos, strict=True)]


@pytest.fixture(scope="session")
def estimated():
    """A synthetic clip of a smooth random mouth, late by `shift` frames, with `noise`; other fields as given."""

    def make(seed: int = 0, frames: int = 400, shift: int = 0, noise: float = 0.0, **changes) -> EstimatedClip:
        rng = np.random.default_rng(seed)
        raw = np.convolve(rng.standard_normal(frames + 84), np.hanning(5), "same")[20:-20]
        track = (0.4 + 0.15 * raw).clip(0, 1).astype(np.float32)
        mouth = track[22 - shift : 22 - shift + frames] + rng.normal(0, 1, frames) * noise
        fields = {
            "mouth_open": mouth.astype(np.float32),
            "valid": np.ones(frames, bool),
            "delta_e": np.full(frames, 1, np.float32),
            "motion": np.full(frames, 0.02, np.float32),
            "truth_mouth": track[22 : 22 + frames],
            "truth_motion": np.full(frames, 0.02, np.float32),
            "silent": np.zeros(frames, bool),
            "closures_s": np.zeros(0),
            "states": np.zeros((frames, len(CHANNELS)), np.float32),
            "truth_states": np.zeros((frames, len(CHANNELS)), np.float32),
            **dict.fromkeys(("state", "emotion", "gesture", "doing"), np.zeros(frames, int)),
        }
        return EstimatedClip(**fields | changes)

    return make
