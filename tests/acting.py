"""Synthetic puppet trajectories without speech synthesis: fast enough for the samples of a distribution."""

import numpy as np

from avatar.puppet.gestures import Event
from avatar.puppet.motion import Direction, animate
from avatar.types import EMOTIONS, STATES


def acted(seed: int, emotion: str = "neutral", state: str = "speaking", gesture: str = "none", frames: int = 60):
    """A trajectory `f s`; the gesture lasts as long as the trajectory."""
    rng = np.random.default_rng(seed)
    syllables = np.sin(np.cumsum(rng.uniform(0.2, 0.9, frames))) ** 2 * (state == "speaking")
    labels = [np.full(frames, names.index(name)) for names, name in ((STATES, state), (EMOTIONS, emotion))]
    event = Event(gesture, 0, frames, side=1 if seed % 2 else -1)
    direction = Direction(events=[] if gesture == "none" else [event])
    return animate(syllables, 0.5 * syllables, *labels, np.full(frames, rng.uniform(0.5, 1)), seed, direction)
