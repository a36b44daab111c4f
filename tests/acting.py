"""Motion of the puppet world's own making, but for its speech: quick, and as many seeds as a distribution needs."""

import numpy as np

from avatar.puppet.gestures import Event
from avatar.puppet.motion import Direction, animate
from avatar.types import EMOTIONS, STATES


def acted(seed: int, emotion: str = "neutral", state: str = "speaking", gesture: str = "none", frames: int = 60):
    """A trajectory `f s`, with a gesture that begins and ends with it."""
    rng = np.random.default_rng(seed)
    syllables = np.sin(np.cumsum(rng.uniform(0.2, 0.9, frames))) ** 2 * (state == "speaking")
    labels = [np.full(frames, names.index(name)) for names, name in ((STATES, state), (EMOTIONS, emotion))]
    event = Event(gesture, 0, frames, side=1 if seed % 2 else -1)
    direction = Direction(events=[] if gesture == "none" else [event])
    return animate(syllables, 0.5 * syllables, *labels, np.full(frames, rng.uniform(0.5, 1)), seed, direction)
