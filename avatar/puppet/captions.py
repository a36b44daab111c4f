"""Captions: prompts that describe a puppet, its emotion, what it does, and when that changes."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from avatar.puppet.identity import Identity
from avatar.puppet.setting import Thing
from avatar.types import EMOTIONS, GESTURES, STATES

# words of emotions and gestures
MOODS = {
    "neutral": "calm",
    "happy": "happy",
    "sad": "sad",
    "angry": "angry",
    "surprised": "surprised",
}
DOING = {
    "wave": "waving",
    "point": "pointing",
    "nod": "nodding",
    "shake": "shaking the head",
    "shrug": "shrugging",
    "beat": "gesturing",
}


def caption(identity: Identity, emotion: int, states: Sequence[int], gesture: int) -> str:
    """Caption such as "a happy orange cat is speaking and then listening" or "… is speaking and waving".

    Args:
        identity: of the puppet.
        emotion: index into types.EMOTIONS; 0: not mentioned.
        states: indices into types.STATES.
        gesture: index into types.GESTURES.
    """
    who = f"{MOODS.get(EMOTIONS[emotion], '')} {identity.description}".strip()
    article = "an" if who[0] in "aeiou" else "a"
    doing = DOING.get(GESTURES[gesture])
    what = " and then ".join(STATES[i] for i in states) + ("" if doing is None else f" and {doing}")
    return f"{article} {who} is {what}"


def looking_at(thing: Thing) -> str:
    """End of the caption of a puppet that looks at a thing."""
    return f", looking at a {thing.colour} {thing.kind}"


def timed(
    identity: Identity,
    emotions: Int[np.ndarray, " f"],
    states: Int[np.ndarray, " f"],
    commanded: Int[np.ndarray, " f"],
    plain: bool,
    endings: Sequence[str],
) -> tuple[tuple[str, ...], Int[np.ndarray, " f"]]:
    """The captions of a clip and the index of each frame's; a change of emotion, gesture or ending changes the caption.

    Args:
        identity: of the puppet.
        emotions, states, commanded: indices into types.EMOTIONS, STATES and GESTURES.
        plain: whether captions mention neither emotion nor gesture.
        endings: of the caption in each frame: `looking_at`, a transcript, or empty.
    """
    if plain:
        emotions, commanded = np.zeros_like(emotions), np.zeros_like(commanded)
    _, ending = np.unique(endings, return_inverse=True)
    tracks = (emotions, commanded, ending)
    cuts = np.flatnonzero(np.any([np.diff(track, prepend=-1) != 0 for track in tracks], axis=0))
    captions: list[str] = []
    captioned = np.zeros(len(states), int)
    for start, stop in pairwise([*cuts.tolist(), len(states)]):
        part = states[start:stop]
        order = part[np.flatnonzero(np.diff(part, prepend=-1))[: 1 if commanded[start] > 1 or endings[start] else 3]]
        text = caption(identity, int(emotions[start]), order.tolist(), int(commanded[start])) + endings[start]
        if text not in captions:
            captions.append(text)
        captioned[start:stop] = captions.index(text)
    return tuple(captions), captioned
