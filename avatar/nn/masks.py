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
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from avatar.errors import UserError
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
            raise UserError(f"chunks of {self.chunks} latents; every chunk needs at least one")
        if self.window is not None and self.window < max(self.chunks):
            raise UserError(f"a window of {self.window} latents can't hold a chunk of {max(self.chunks)}; widen it")

    @property
    def latents(self) -> int:
        return sum(self.chunks)

    @property
    def ends(self) -> list[int]:
        """For each latent of the timeline, where its chunk ends."""
        return [end for end, length in zip(accumulate(self.chunks), self.chunks, strict=True) for _ in range(length)]


@dataclass(frozen=True)
class QueryGroup:
    """Query tokens that see the same key tokens, wherever these lie."""

    queries: slice
    keys: tuple[slice, ...]


@dataclass(frozen=True)
class MaskView:
    """A view of a whole packed clip, sink first: nothing is cached, who sees whom is in the groups.

    A dense mask of a 480p clip has 10⁹ entries and shuts out the fast kernels; groups are exact, need no kernel of
    their own, and cost only what is attended to.
    """

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...]
    groups: tuple[QueryGroup, ...]
    tokens: int  # per latent

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """Over the keys [sink at each place it is seen from | clip]."""
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
    """A view of a whole clip without a sink, every latent seeing every other, as public video models are trained."""

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...] = ()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        return attention(rotate(q, rotation.own), rotate(k, rotation.own), v)


@lru_cache(maxsize=64)
def mask_view(spec: MaskSpec, tokens: int, device: torch.device) -> MaskView:
    """The view of [sink | clip] or [sink | clean | noisy] with `tokens` tokens per latent."""
    places = tuple(sorted({SINK, *(sink_position(end, spec.window) for end in spec.ends)}))
    timeline = list(range(spec.latents))
    clip = len(places)  # in latents among the keys; the noisy one follows the clean
    noisy = clip + spec.latents
    starts = [end - length for end, length in zip(accumulate(spec.chunks), spec.chunks, strict=True)]

    def group(query: int, latents: int, *keys: tuple[int, int]) -> QueryGroup:
        spans = [slice(first * tokens, last * tokens) for first, last in _merge_spans(keys)]
        return QueryGroup(slice(query * tokens, (query + latents) * tokens), tuple(spans))

    def seen(start: int, length: int) -> tuple[tuple[int, int], int]:
        """The sink among the keys, and the first latent of the window, for the chunk that starts here."""
        end = start + length
        sink = places.index(sink_position(end, spec.window))
        return (sink, sink + 1), 0 if spec.window is None else max(0, end - spec.window)

    groups = [group(0, 1, (places.index(SINK), places.index(SINK) + 1))]
    for start, length in zip(starts, spec.chunks, strict=True):
        sink, first = seen(start, length)
        groups.append(group(1 + start, length, sink, (clip + first, clip + start + length)))
    if spec.packing == "clean_noisy":
        for start, length in zip(starts, spec.chunks, strict=True):
            sink, first = seen(start, length)
            own = (noisy + start, noisy + start + length)
            groups.append(group(1 + spec.latents + start, length, sink, (clip + first, clip + start), own))
    copies = 2 if spec.packing == "clean_noisy" else 1
    return MaskView(torch.tensor([SINK] + timeline * copies, device=device), places, tuple(groups), tokens)


def _merge_spans(spans: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Spans without empty ones, neighbours made one."""
    joined: list[tuple[int, int]] = []
    for first, last in spans:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], last)
        elif first < last:
            joined.append((first, last))
    return joined


def _gather_spans(x: Tensor, spans: tuple[slice, ...]) -> Tensor:
    return x[:, :, spans[0]] if len(spans) == 1 else torch.cat([x[:, :, span] for span in spans], dim=2)
