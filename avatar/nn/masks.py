"""Who may attend to whom: one frozen spec, and the view that training uses.

A clip is cut into *chunks*, denoised together. A latent of a chunk that ends at e attends to

    the sink, and the latents p of its own and earlier chunks with  e - window <= p < e

so the bidirectional teacher is the case of one chunk. The sink attends only to itself. With `clean_noisy` packing
(teacher forcing) the sequence is [sink | clean | noisy]: the noisy latents of a chunk attend to the *clean* latents of
earlier chunks and to the noisy ones of their own.

Seen from a chunk that ends at e, the sink stands just before the window, at max(-1, e - window - 1): its distance never
exceeds what a training clip as long as the window has shown.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from avatar.nn.rope import Rotation, rotate

SINK = -1  # the sink's place on the timeline


def sink_position(end: int, window: int | None) -> int:
    """Where the sink stands, seen from a chunk that ends before latent `end`."""
    return SINK if window is None else max(SINK, end - window - 1)


@dataclass(frozen=True)
class MaskSpec:
    """The attention pattern of a clip: lengths of its chunks, its window in latents (None: all), its packing."""

    chunks: tuple[int, ...]
    window: int | None = None
    packing: Literal["noisy", "clean_noisy"] = "noisy"

    def __post_init__(self):
        if not self.chunks or min(self.chunks) < 1:
            raise ValueError(f"chunks of {self.chunks} latents; every chunk needs at least one")
        if self.window is not None and self.window < max(self.chunks):
            raise ValueError(f"a window of {self.window} latents can't hold a chunk of {max(self.chunks)}; widen it")

    @property
    def latents(self) -> int:
        return sum(self.chunks)

    @property
    def ends(self) -> list[int]:
        """For each latent of the timeline, where its chunk ends."""
        return [end for end, length in zip(accumulate(self.chunks), self.chunks, strict=True) for _ in range(length)]


@dataclass(frozen=True)
class MaskView:
    """A view of a whole packed clip: nothing is cached, the mask does it all. Tokens: sink first, then the clip."""

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...]
    mask: Bool[Tensor, "q k"]
    tokens: int  # per latent

    def update(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys [sink at each place it is seen from | clip] and their values."""
        n, copies = self.tokens, len(self.sink_positions)
        sinks = [rotate(k[:, :, :n], table) for table in rotation.sink]
        return (
            torch.cat([*sinks, rotate(k, rotation.own)[:, :, n:]], dim=2),
            torch.cat([v[:, :, :n]] * copies + [v[:, :, n:]], dim=2),
        )


@lru_cache(maxsize=64)
def mask_view(spec: MaskSpec, tokens: int, device: torch.device) -> MaskView:
    """The view of [sink | clip] or [sink | clean | noisy] with `tokens` tokens per latent."""
    timeline, ends = list(range(spec.latents)), spec.ends
    seen_from = [sink_position(end, spec.window) for end in ends]
    places = tuple(sorted({SINK, *seen_from}))
    copies = 2 if spec.packing == "clean_noisy" else 1

    query_end = torch.tensor(ends)[:, None]
    key = torch.tensor(timeline)[None, :]
    inside = key < query_end
    if spec.window is not None:
        inside = inside & (key >= query_end - spec.window)
    own = query_end == torch.tensor(ends)[None, :]
    to_sink = torch.tensor(seen_from)[:, None] == torch.tensor(places)[None, :]
    nothing = torch.zeros_like(inside)
    rows = (
        [torch.cat([to_sink, inside], 1)]
        if copies == 1
        else [torch.cat([to_sink, inside, nothing], 1), torch.cat([to_sink, inside & ~own, own], 1)]
    )
    sink_row = torch.zeros(1, rows[0].shape[1], dtype=torch.bool)
    sink_row[0, places.index(SINK)] = True
    mask = torch.cat([sink_row, *rows]).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return MaskView(torch.tensor([SINK] + timeline * copies, device=device), places, mask.to(device), tokens)
