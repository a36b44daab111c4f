"""KV caches for chunk-by-chunk generation: a read-only prefix for training, a ring buffer for streaming.

`cache.view(positions, ends)` gives the view of one forward pass. Its keys and values of the first n latents become
context of later chunks by `cache.advance(view, n)`, which only the rollout calls. A view can be used many times
(denoising steps, recomputation): every pass writes the same slots.

    PrefixCache  for training: the chunks are concatenated and nothing is written in place, so gradients never depend on
                 overwritten memory. They reach earlier chunks only with `detach=False`.
    RingCache    for streaming: fixed storage that is written in place, so the cost per chunk is constant. `spare` slots
                 beyond the window let a session roll back by as many latents.

Both attend to the same keys. Keys are rotated by absolute position when written. Only the sink's are stored un-rotated,
since its position moves with the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from avatar.nn.dot_product import attention
from avatar.nn.masks import SINK, sink_position
from avatar.nn.rope import Rotation, rotate
from avatar.protocols import View

KeysValues = tuple[Tensor, Tensor]  # of one layer, each `b a n d`: a heads, n tokens, d channels per head


@runtime_checkable
class Cache(Protocol):
    """Interface of the KV caches to the rollout."""

    def prime(self) -> View:
        """The view of the pass over the reference, which writes the sink."""
        ...

    def view(self, positions: Sequence[int], ends: Sequence[int]) -> View:
        """The view of a pass over latents at `positions`, whose chunks end before the latents `ends`."""
        ...

    def advance(self, view: View, latents: int) -> None:
        """Keep the keys and values of the first `latents` of a pass as context of later chunks."""
        ...


@dataclass
class SinkView:
    """View of the pass over the reference: the sink attends to itself alone; its keys are stored un-rotated.

    Args:
        positions: [-1].
        sink_positions: (-1,).
        written: layer → keys and values of the last pass.
    """

    positions: Int[Tensor, " l"]
    sink_positions: tuple[int, ...] = (SINK,)
    written: dict[int, KeysValues] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        self.written[layer] = (k, v)
        return attention(rotate(q, rotation.own), rotate(k, rotation.own), v)


@dataclass
class Window:
    """Boolean mask of a pass over the keys [sink at each position | slots].

    Args:
        sink_positions: all positions at which the sink is attended to, ascending.
        mask: q query tokens × k key tokens; each query attends to the sink at one position.
    """

    sink_positions: tuple[int, ...]
    mask: Bool[Tensor, "q k"]


def window_of(ends: Sequence[int], slots: Tensor, window: int | None, tokens: int) -> Window:
    """The mask of a pass.

    Args:
        ends: for each query latent, the latent before which its chunk ends.
        slots: the positions of the cached latents; -2: an empty slot.
        window: latents that a chunk attends to, its own included; None: all.
        tokens: tokens per latent.
    """
    sink_of_query = [sink_position(end, window) for end in ends]
    sinks = tuple(sorted(set(sink_of_query)))
    device = slots.device
    end = torch.tensor(list(ends), device=device)[:, None]
    inside = (slots >= 0) & (slots < end)
    if window is not None:
        inside = inside & (slots >= end - window)
    to_sink = torch.tensor([[own == sink for sink in sinks] for own in sink_of_query], device=device)
    mask = torch.cat([to_sink, inside], 1).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return Window(sinks, mask)


def with_sink(sink: KeysValues, rotation: Rotation, k: Tensor, v: Tensor) -> KeysValues:
    """Keys and values [sink at each position | the rest]."""
    keys = [rotate(sink[0], table) for table in rotation.sink]
    return torch.cat([*keys, k], dim=2), torch.cat([sink[1]] * len(keys) + [v], dim=2)


@dataclass
class PrefixView:
    """View of a pass over new latents after a read-only prefix; made by `PrefixCache.view`.

    Args:
        positions: of the l latents of the pass, on the timeline.
        sink_positions, mask: see `Window`; the keys are [sink at each position | prefix | the pass].
        sink: layer → keys and values of the sink.
        prefix: the chunks before the pass, each a dict layer → keys and values.
        written: layer → keys and values of the last pass.
    """

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
    """KV cache of training rollouts: the keys and values of every chunk, concatenated.

        cache = PrefixCache(net.tokens(height, width), window=8)
        sink = cache.prime()
        net(reference, t0, cond.blank(1), sink)  # at t = 0
        cache.advance(sink, 1)
        view = cache.view(range(0, 2), [2, 2])  # a chunk of latents 0 and 1, which ends before latent 2
        v = net(x, t, cond, view)  # x: b c 2 h w, any number of passes
        cache.advance(view, 2)

    Args:
        tokens: tokens per latent.
        window: latents that a chunk attends to, its own included; None: all.
        device: of the keys and values.
        detach: whether gradients stop at the cached chunks; False also trains the history.
    """

    def __init__(self, tokens: int, window: int | None, device: torch.device | str = "cpu", detach: bool = True):
        self.tokens, self.window, self.device, self.detach = tokens, window, torch.device(device), detach
        self.sink: dict[int, KeysValues] = {}
        self.chunks: list[tuple[tuple[int, ...], dict[int, KeysValues]]] = []  # positions, layer → keys and values

    def prime(self) -> SinkView:
        return SinkView(torch.tensor([SINK], device=self.device))

    def view(self, positions: Sequence[int], ends: Sequence[int]) -> PrefixView:
        """The view of a pass over `positions`; cached chunks that start at or after the first are left out."""
        prefix = [chunk for chunk in self.chunks if chunk[0][0] < positions[0]]
        if self.window is not None:
            prefix = [chunk for chunk in prefix if chunk[0][-1] >= min(ends) - self.window]
        own = torch.tensor(list(positions), device=self.device)
        slots = torch.cat([torch.tensor([p for chunk, _ in prefix for p in chunk], device=self.device).long(), own])
        window = window_of(ends, slots, self.window, self.tokens)
        return PrefixView(own, window.sink_positions, window.mask, self.sink, [chunk for _, chunk in prefix])

    def advance(self, view: View, latents: int) -> None:
        assert isinstance(view, SinkView | PrefixView)
        end = latents * self.tokens
        kept = {layer: (k[:, :, :end], v[:, :, :end]) for layer, (k, v) in view.written.items()}
        if self.detach:
            kept = {layer: (k.detach(), v.detach()) for layer, (k, v) in kept.items()}
        if isinstance(view, SinkView):
            self.sink = kept
            return
        positions = tuple(view.positions[:latents].tolist())
        self.chunks = [chunk for chunk in self.chunks if chunk[0][0] < positions[0]] + [(positions, kept)]


@dataclass
class RingView:
    """View of a pass that writes its keys and values to their slots of the ring; made by `RingCache.view`.

    Args:
        positions: of the l latents of the pass, on the timeline.
        sink_positions, mask: see `Window`; the keys are [sink at each position | all slots].
        ring: the cache.
        slots: the slot of each latent, its position modulo the size of the ring.
    """

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
        stored = keys.flatten(2, 3).to(k.dtype), values.flatten(2, 3).to(v.dtype)
        return attention(rotate(q, rotation.own), *with_sink(self.ring.sink[layer], rotation, *stored), self.mask)


class RingCache:
    """Ring-buffer KV cache for streaming: `window + spare` slots per layer, allocated once.

    Storage per layer is two tensors `b a s n d`: batch, heads, slots, tokens per latent, channels per head.

        cache = RingCache(net.layers, 1, net.heads, net.dim // net.heads, net.tokens(height, width), window=8, spare=2)
        sink = cache.prime()
        net(reference, t0, cond.blank(1), sink)  # at t = 0
        cache.advance(sink, 1)
        view = cache.view(range(0, 2), [2, 2])  # a chunk of latents 0 and 1, which ends before latent 2
        v = net(x, t, cond, view)  # x: 1 c 2 h w, any number of passes
        cache.advance(view, 2)

    Args:
        layers, batch, heads, head_dim: of the network and its inputs.
        tokens: tokens per latent.
        window: latents that a chunk attends to, its own included.
        spare: further slots, at least those of the latents that a merged pass writes ahead or a rollback returns to.
        device, dtype: of the storage; keys and values are cast to the dtype of the pass when read.
    """

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
        self.tokens, self.window, self.size = tokens, window, window + spare
        shape = (batch, heads, self.size, tokens, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.sink: dict[int, KeysValues] = {}
        self.slot_positions = torch.full((self.size,), SINK - 1, device=device)  # -2: empty

    def prime(self) -> SinkView:
        return SinkView(torch.tensor([SINK], device=self.slot_positions.device))

    def view(self, positions: Sequence[int], ends: Sequence[int]) -> RingView:
        """The view of a pass over `positions`, which must leave the keys of its own window in place."""
        assert positions[-1] - (min(ends) - self.window) < self.size, "the pass would overwrite keys that it attends to"
        own = torch.tensor(list(positions), device=self.slot_positions.device)
        slots = own % self.size
        self.slot_positions.index_copy_(0, slots, own)
        window = window_of(ends, self.slot_positions, self.window, self.tokens)
        return RingView(own, window.sink_positions, window.mask, self, slots)

    def advance(self, view: View, latents: int) -> None:
        """Store the sink; the keys and values of other passes are in their slots already."""
        if isinstance(view, SinkView):
            self.sink = {layer: (k.detach(), v.detach()) for layer, (k, v) in view.written.items()}
