"""Classifier-free guidance (arXiv:2207.12598) with one scale for audio and one for text.

One convention: `u + w (c - u)`, so that w = 1 is the plain conditional network and w = 0 the unconditional one.
The text branch comes first, the audio branch is added to it (after InstructPix2Pix, arXiv:2211.09800, Eq. 3):

    v = v(none) + w_text (v(text) - v(none)) + w_audio (v(text, audio) - v(text))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from avatar.types import Conditioning, Latents, join

Velocity = Callable[[Latents, Conditioning], Latents]  # both can be batches of several branches


@dataclass(frozen=True)
class Guidance:
    """Guidance scales: 1 is the conditional network; labels (state, emotion, gesture) follow the scale of text."""

    audio: float = 1.0
    text: float = 1.0

    def _terms(self) -> list[tuple[float, bool, bool]]:
        """(coefficient, drop audio, drop text) of every branch whose coefficient is not 0."""
        terms = [(1 - self.text, True, True), (self.text - self.audio, True, False), (self.audio, False, False)]
        return [term for term in terms if term[0] != 0.0]


def guided(velocity: Velocity, x: Latents, cond: Conditioning, guidance: Guidance) -> Latents:
    """The guided velocity, from one forward pass over a batch of all branches with a coefficient."""
    terms = guidance._terms()
    batch = len(x)

    def flag(value: bool) -> torch.Tensor:
        return torch.full((batch,), value, device=x.device)

    conds = [cond.without(audio=flag(audio), text=flag(text), labels=flag(text)) for _, audio, text in terms]
    parts = velocity(x.repeat(len(terms), 1, 1, 1, 1), join(conds, "b")).chunk(len(terms))
    return sum((coefficient * v for (coefficient, _, _), v in zip(terms, parts, strict=True)), torch.zeros_like(x))
