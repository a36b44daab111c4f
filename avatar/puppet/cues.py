"""Cues: words at the start of a sentence that cause a gesture of its speaker.

In free clips the audio is the only information about such a gesture. The splits share no sentence, so held-out clips
have the same cues in other sentences.
"""

import re

import numpy as np

from avatar.puppet import sentences

CUES = {
    "wave": ("hello", "hi there", "good morning", "goodbye", "hey"),
    "point": ("look", "look over there", "over there", "look at that"),
    "nod": ("yes", "of course", "that is right"),
    "shake": ("no", "no way", "not at all"),
    "shrug": ("maybe", "who knows", "I have no idea"),
}
_GESTURE = {cue.lower(): gesture for gesture, cues in CUES.items() for cue in cues}
_OPENING = re.compile(f"({'|'.join(sorted(_GESTURE, key=len, reverse=True))}),", re.IGNORECASE)


def gesture_of(sentence: str) -> str | None:
    """The gesture of a sentence's cue, or None without a cue."""
    found = _OPENING.match(sentence)
    return _GESTURE[found[1].lower()] if found else None


def draw(rng: np.random.Generator, split: str, share: float) -> str:
    """Draw a sentence of a split; this share of them starts with a cue, all gestures with the same probability."""
    if share == 0 or rng.random() >= share:
        return sentences.draw(rng, split)
    cues = CUES[str(rng.choice(list(CUES)))]
    while True:
        plain = sentences.draw(rng, split)  # the part after the cue belongs to the split too
        if gesture_of(plain) is None:
            opening = str(rng.choice(cues))
            sentence = f"{opening[0].upper()}{opening[1:]}, {plain[0].lower()}{plain[1:]}"
            if sentences.split_of(sentence) == split:
                return sentence
