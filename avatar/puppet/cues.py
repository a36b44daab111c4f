"""Words that cause gestures: a sentence that opens with one of these makes its speaker wave, point, nod, ...

Nothing else tells of such a gesture, so a model has to hear it. The splits share no sentence, so held-out ones have the
same words in other company.
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
    """The gesture that a sentence's opening causes, if any."""
    found = _OPENING.match(sentence)
    return _GESTURE[found[1].lower()] if found else None


def draw(rng: np.random.Generator, split: str, share: float) -> str:
    """A random sentence of a split, of which this share is made to open with a cue; each gesture is as likely."""
    if share == 0 or rng.random() >= share:
        return sentences.draw(rng, split)
    cues = CUES[str(rng.choice(list(CUES)))]
    while True:
        plain = sentences.draw(rng, split)  # neither the whole nor what follows the cue is another split's
        if gesture_of(plain) is None:
            opening = str(rng.choice(cues))
            sentence = f"{opening[0].upper()}{opening[1:]}, {plain[0].lower()}{plain[1:]}"
            if sentences.split_of(sentence) == split:
                return sentence
