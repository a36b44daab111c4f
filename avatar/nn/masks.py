"""Attention masks: one frozen spec of the pattern, and the views of full clips for training.

A clip is cut into *chunks*, denoised together. A latent of a chunk that ends at e attends to

    the sink, and the latents p of its own and earlier chunks with  e - window <= p < e

A bidirectional teacher is the case of one chunk. The sink attends only to itself. With `clean_noisy` packing
(teacher forcing) the sequence is [sink | clean | noisy]: the noisy latents of a chunk attend to the *clean* latents of
earlier chunks and to the noisy ones of their own.

For a chunk that ends at e, the sink's position is just before the window, at max(-1, e - window - 1): its distance
never exceeds that of training clips as long as the window.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from avatar.errors import UserError
from avatar.nn.dot_product import attention
from avatar.nn.rope import Rotation, rotate

SINK = -1  # the sink's position on the timeline


def sink_position(end: int, window: int | None) -> int:
    """The sink's position for the queries of a chunk that ends before latent `end`."""
    return SINK if window is None else max(SINK, end - window - 1)


@dataclass(frozen=True)
class MaskSpec:
    """The attention pattern of a clip.

        MaskSpec((21,))                           # bidirectional
        MaskSpec((1, 2, 2), 4, "clean_noisy")     # teacher forcing by chunks, in a window of 4 latents

    Args:
        chunks: latents per chunk.
        window: latents that a chunk attends to, its own included; None: all.
        packing: "noisy": [sink | clip], "clean_noisy": [sink | clean | noisy].

    Raises:
        UserError: no chunks, an empty chunk, or a window shorter than a chunk.
    """

    chunks: tuple[int, ...]
    window: int | None = None
    packing: Literal["noisy", "clean_noisy"] = "noisy"

    def __post_init__(self):
        if not self.chunks or min(self.chunks) < 1:
            raise UserError(f"got chunks={self.chunks}; expected at least one chunk of at least one latent: change it")
        if self.window is not None and self.window < max(self.chunks):
            raise UserError(
                f"got window={self.window} for chunks of up to {max(self.chunks)} latents; expected a window of at "
                "least a chunk: raise it"
            )

    @property
    def latents(self) -> int:
        """Latents of the timeline, without the sink."""
        return sum(self.chunks)

    @property
    def ends(self) -> list[int]:
        """For each latent of the timeline, the latent before which its chunk ends."""
        return [end for end, length in zip(accumulate(self.chunks), self.chunks, strict=True) for _ in range(length)]


@dataclass(frozen=True)
class QueryGroup:
    """Query tokens that attend to the same spans of key tokens: one call of attention without a mask."""

    queries: slice
    keys: tuple[slice, ...]


@dataclass(frozen=True)
class MaskView:
    """View of a full packed clip, sink first and without a cache; made by `mask_view`.

    A dense mask of a 480p clip has 10⁹ entries and excludes the fast kernels. Groups of queries with the same keys are
    exact, need no special kernel, and cost only what is attended to.

    Args:
        positions: of the l latents of the sequence, on the timeline; the sink's is -1.
        sink_positions: all positions at which the sink is attended to, ascending.
        groups: cover all queries in order. Their keys are tokens of [sink at each position | rest of the sequence].
        tokens: tokens per latent.
    """

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...]
    groups: tuple[QueryGroup, ...]
    tokens: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """Attention over the keys [sink at each position | clip], one call per group.

        Args:
            layer: unused, since nothing is cached.
            q, k, v: `b a n d` with a heads, before rotation; n = l · tokens.
        """
        n, copies = self.tokens, len(self.sink_positions)
        q, sinks = rotate(q, rotation.own), [rotate(k[:, :, :n], table) for table in rotation.sink]
        keys = torch.cat([*sinks, rotate(k, rotation.own)[:, :, n:]], dim=2)
        values = torch.cat([v[:, :, :n]] * copies + [v[:, :, n:]], dim=2)
        return torch.cat(
            [
                attention(q[:, :, group.queries], _gather_spans(keys, group.keys), _gather_spans(values, group.keys))
                for group in self.groups
            ],
            dim=2,
        )


@dataclass(frozen=True)
class FullView:
    """View of a full clip without a sink or a mask, as in public video models.

    Args:
        positions: of the l latents of the clip, on the timeline.
        sink_positions: empty.
    """

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...] = ()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        return attention(rotate(q, rotation.own), rotate(k, rotation.own), v)


@lru_cache(maxsize=64)
def mask_view(spec: MaskSpec, tokens: int, device: torch.device) -> MaskView:
    """The view of a packed clip, cached for the last 64 calls.

    Args:
        spec: the attention pattern.
        tokens: tokens per latent.
        device: of the view's positions.
    """
    sinks = tuple(sorted({SINK, *(sink_position(end, spec.window) for end in spec.ends)}))
    timeline = list(range(spec.latents))
    clip = len(sinks)  # its first latent among the keys; noisy latents come after the clean ones
    noisy = clip + spec.latents
    starts = [end - length for end, length in zip(accumulate(spec.chunks), spec.chunks, strict=True)]

    def group(query: int, latents: int, *keys: tuple[int, int]) -> QueryGroup:
        spans = [slice(first * tokens, last * tokens) for first, last in _merge_spans(keys)]
        return QueryGroup(slice(query * tokens, (query + latents) * tokens), tuple(spans))

    def context(start: int, length: int) -> tuple[tuple[int, int], int]:
        """The sink's span among the keys, and the first latent of the window, for the chunk at `start`."""
        end = start + length
        sink = sinks.index(sink_position(end, spec.window))
        return (sink, sink + 1), 0 if spec.window is None else max(0, end - spec.window)

    groups = [group(0, 1, (sinks.index(SINK), sinks.index(SINK) + 1))]
    for start, length in zip(starts, spec.chunks, strict=True):
        sink, first = context(start, length)
        groups.append(group(1 + start, length, sink, (clip + first, clip + start + length)))
    if spec.packing == "clean_noisy":
        for start, length in zip(starts, spec.chunks, strict=True):
            sink, first = context(start, length)
            own = (noisy + start, noisy + start + length)
            groups.append(group(1 + spec.latents + start, length, sink, (clip + first, clip + start), own))
    copies = 2 if spec.packing == "clean_noisy" else 1
    return MaskView(torch.tensor([SINK] + timeline * copies, device=device), sinks, tuple(groups), tokens)


def _merge_spans(spans: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """The spans without empty ones; adjacent spans are merged."""
    merged: list[tuple[int, int]] = []
    for first, last in spans:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], last)
        elif first < last:
            merged.append((first, last))
    return merged


def _gather_spans(x: Tensor, spans: tuple[slice, ...]) -> Tensor:
    return x[:, :, spans[0]] if len(spans) == 1 else torch.cat([x[:, :, span] for span in spans], dim=2)
