"""Caches of keys and values for chunk-by-chunk generation, as explicit values; only the rollout advances them.

`cache.view(positions, ends)` gives the view of one forward pass; what it wrote for its first n latents counts for later
chunks once `cache.advance(view, n)` is called. A view may be used many times (denoising, recomputation): same slots.

Two kinds, one meaning:

    PrefixCache  for training: a read-only prefix, concatenated. Nothing is written in place, so no gradient takes a
                 path through overwritten memory, and none reaches earlier chunks unless `detach=False` asks for it.
    RingCache    for streaming: fixed storage, written in place by index tensors, so cost per chunk is flat for ever.
                 `spare` slots outlive the window, so that a session can go back by as many latents.

Keys are rotated by absolute position when written; the sink's alone are kept un-rotated, for it moves with the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from avatar.nn.masks import SINK, sink_position
from avatar.nn.rope import Rotation, rotate
from avatar.protocols import View

KeysValues = tuple[Tensor, Tensor]


@runtime_checkable
class Cache(Protocol):
    """What a rollout drives."""

    def prime(self) -> View: ...

    def view(self, positions: Sequence[int], ends: Sequence[int]) -> View: ...

    def advance(self, view: View, latents: int) -> None: ...


@dataclass
class SinkView:
    """The pass that reads the reference in: the sink attends to itself; its un-rotated keys are remembered."""

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...] = (SINK,)
    written: dict[int, KeysValues] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        self.written[layer] = (k, v)
        return attention(rotate(q, rotation.own), rotate(k, rotation.own), v)


@dataclass
class Window:
    """What the queries of a pass may attend to: the sink at one of several places, and slots by their positions."""

    sink_positions: tuple[int, ...]
    mask: Bool[Tensor, "q k"]


def window_of(ends: Sequence[int], slots: Tensor, window: int | None, tokens: int) -> Window:
    """The window of query latents whose chunks end at `ends`, over slots that hold these positions (-2: empty)."""
    seen_from = [sink_position(end, window) for end in ends]
    places = tuple(sorted(set(seen_from)))
    device = slots.device
    end = torch.tensor(list(ends), device=device)[:, None]
    inside = (slots >= 0) & (slots < end)
    if window is not None:
        inside = inside & (slots >= end - window)
    to_sink = torch.tensor([[seen == place for place in places] for seen in seen_from], device=device)
    mask = torch.cat([to_sink, inside], 1).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return Window(places, mask)


def with_sink(sink: KeysValues, rotation: Rotation, k: Tensor, v: Tensor) -> KeysValues:
    """Keys and values [sink at each of its places | the rest]."""
    keys = [rotate(sink[0], table) for table in rotation.sink]
    return torch.cat([*keys, k], dim=2), torch.cat([sink[1]] * len(keys) + [v], dim=2)


@dataclass
class PrefixView:
    """A pass over new latents behind a read-only prefix."""

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...]
    mask: Bool[Tensor, "q k"]
    sink: dict[int, KeysValues]
    prefix: list[dict[int, KeysValues]]
    written: dict[int, KeysValues] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        k = rotate(k, rotation.own)
        self.written[layer] = (k, v)
        keys = torch.cat([*(chunk[layer][0] for chunk in self.prefix), k], dim=2)
        values = torch.cat([*(chunk[layer][1] for chunk in self.prefix), v], dim=2)
        return attention(rotate(q, rotation.own), *with_sink(self.sink[layer], rotation, keys, values), self.mask)


class PrefixCache:
    """The cache of training rollouts: every chunk's keys and values, detached unless history is to be trained too."""

    def __init__(self, tokens: int, window: int | None, device: torch.device | str = "cpu", detach: bool = True):
        self.tokens, self.window, self.device, self.detach = tokens, window, torch.device(device), detach
        self.sink: dict[int, KeysValues] = {}
        self.chunks: list[tuple[tuple[int, ...], dict[int, KeysValues]]] = []

    def prime(self) -> SinkView:
        return SinkView(torch.tensor([SINK], device=self.device))

    def view(self, positions: Sequence[int], ends: Sequence[int]) -> PrefixView:
        """A pass over `positions`; a chunk of the prefix that starts at or after them is taken as rewritten."""
        prefix = [chunk for chunk in self.chunks if chunk[0][0] < positions[0]]
        if self.window is not None:
            prefix = [chunk for chunk in prefix if chunk[0][-1] >= min(ends) - self.window]
        own = torch.tensor(list(positions), device=self.device)
        slots = torch.cat([torch.tensor([p for where, _ in prefix for p in where], device=self.device).long(), own])
        seen = window_of(ends, slots, self.window, self.tokens)
        return PrefixView(own, seen.sink_positions, seen.mask, self.sink, [chunk for _, chunk in prefix])

    def advance(self, view: View, latents: int) -> None:
        assert isinstance(view, SinkView | PrefixView)
        end = latents * self.tokens
        kept = {layer: (k[:, :, :end], v[:, :, :end]) for layer, (k, v) in view.written.items()}
        if self.detach:
            kept = {layer: (k.detach(), v.detach()) for layer, (k, v) in kept.items()}
        if isinstance(view, SinkView):
            self.sink = kept
            return
        where = tuple(view.positions[:latents].tolist())
        self.chunks = [chunk for chunk in self.chunks if chunk[0][0] < where[0]] + [(where, kept)]


@dataclass
class RingView:
    """A pass whose keys go straight to their slots of the ring."""

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...]
    mask: Bool[Tensor, "q k"]
    ring: "RingCache"
    slots: Int[Tensor, " l"]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        keys, values = self.ring.keys[layer], self.ring.values[layer]
        shape = (*k.shape[:2], len(self.slots), self.ring.tokens, k.shape[-1])
        keys.index_copy_(2, self.slots, rotate(k, rotation.own).reshape(shape).to(keys.dtype))
        values.index_copy_(2, self.slots, v.reshape(shape).to(values.dtype))
        seen = keys.flatten(2, 3).to(k.dtype), values.flatten(2, 3).to(v.dtype)
        return attention(rotate(q, rotation.own), *with_sink(self.ring.sink[layer], rotation, *seen), self.mask)


class RingCache:
    """The cache of streams: `window + spare` slots of fixed storage for each layer, allocated once."""

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        tokens: int,
        window: int,
        spare: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.tokens, self.window, self.spare, self.size = tokens, window, spare, window + spare
        shape = (batch, heads, self.size, tokens, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.sink: dict[int, KeysValues] = {}
        self.held = torch.full((self.size,), SINK - 1, device=device)  # the position each slot holds

    def prime(self) -> SinkView:
        return SinkView(torch.tensor([SINK], device=self.held.device))

    def view(self, positions: Sequence[int], ends: Sequence[int]) -> RingView:
        assert positions[-1] - (min(ends) - self.window) < self.size, "the pass would overwrite keys that it attends to"
        where = torch.tensor(list(positions), device=self.held.device)
        slots = where % self.size
        self.held.index_copy_(0, slots, where)
        seen = window_of(ends, self.held, self.window, self.tokens)
        return RingView(where, seen.sink_positions, seen.mask, self, slots)

    def advance(self, view: View, latents: int) -> None:
        """Keep what the view wrote: the ring has it already, in its slots; only the sink is stored apart."""
        if isinstance(view, SinkView):
            self.sink = {layer: (k.detach(), v.detach()) for layer, (k, v) in view.written.items()}
