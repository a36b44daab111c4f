"""Classifier-free guidance (arXiv:2207.12598) with one scale each for text, labels and audio.

One convention: `u + w (c - u)`, so that w = 1 is the plain conditional network and w = 0 the unconditional one.
Branches are added one after the other (after InstructPix2Pix, arXiv:2211.09800, Eq. 3): text, then labels (state,
emotion, gesture), then audio:

    v = v(none) + w_text (v(text) - v(none)) + w_labels (v(text, labels) - v(text)) + w_audio (v(all) - v(text, labels))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from avatar.types import Conditioning, Latents, join

Velocity = Callable[[Latents, Conditioning], Latents]  # both can be batches of several branches


@dataclass(frozen=True)
class Guidance:
    """Guidance scales of audio, text and labels; 1 is the conditional network.

    A branch costs a forward pass unless its coefficient is 0: with text = labels = 1, there is one for audio.
    The scale of labels may be one per sample, in the shape `b 1 1 1 1`.
    """

    audio: float = 1.0
    text: float = 1.0
    labels: int | float | Tensor = 1.0

    def branches(self) -> list[tuple[float | Tensor, dict[str, bool]]]:
        """The branches with a coefficient other than 0: (coefficient, modality → whether it is dropped)."""
        coefficients = (1 - self.text, self.text - self.labels, self.labels - self.audio, self.audio)
        kept = ((), ("text",), ("text", "labels"), ("text", "labels", "audio"))
        return [
            (coefficient, {name: name not in names for name in ("audio", "text", "labels")})
            for coefficient, names in zip(coefficients, kept, strict=True)
            if isinstance(coefficient, Tensor) or coefficient != 0.0
        ]


def guided(velocity: Velocity, x: Latents, cond: Conditioning, guidance: Guidance) -> Latents:
    """The guided velocity, from one forward pass over a batch of all branches with a coefficient."""
    branches, batch = guidance.branches(), len(x)
    conds = [
        cond.without(**{name: torch.full((batch,), drop, device=x.device) for name, drop in dropped.items()})
        for _, dropped in branches
    ]
    parts = velocity(x.repeat(len(branches), 1, 1, 1, 1), join(conds, "b")).chunk(len(branches))
    return sum((coefficient * v for (coefficient, _), v in zip(branches, parts, strict=True)), torch.zeros_like(x))
