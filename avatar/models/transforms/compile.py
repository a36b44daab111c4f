"""torch.compile of a backbone, block by block or as a whole, for forward passes over full clips."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avatar.models.transforms.apply import blocks_of
from avatar.nn.masks import FullView, MaskView
from avatar.nn.rope import Rotation
from avatar.protocols import View
from avatar.types import Conditioning, Latents, Times

MAX_GRAPHS = 64  # beyond its limit, 8 by default, torch falls back to eager mode almost silently


@dataclass(frozen=True)
class Compiled:
    """Transform: compile each block by itself, for passes over full clips; all blocks share the compiled graphs.

    The cached passes of a rollout are not compiled: their KV cache differs between blocks and chunks, and each would
    need its own graph. Parameter names stay the same.

    Args:
        backend: backend of torch.compile, such as "inductor" or, without code generation, "aot_eager".

    Raises:
        UserError: the network has no blocks.
    """

    backend: str = "inductor"

    def __call__(self, net: nn.Module) -> None:
        _allow_graphs()
        for block in blocks_of(net):
            # Not block.compile(): it would leave the forward inside activation checkpointing uncompiled.
            block.forward = _on_full_clips(torch.compile(block.forward, backend=self.backend), block.forward)


@dataclass(frozen=True)
class CompiledNetwork:
    """Transform: compile the whole network, for passes over full clips.

    For small networks, whose time goes to element-wise operations and to their embeddings. Each shape of a batch is
    compiled by itself, in about half a minute on the CPU; symbolic shapes take minutes. All else is as in `Compiled`.

    Args:
        backend: backend of torch.compile.
    """

    backend: str = "inductor"

    def __call__(self, net: nn.Module) -> None:
        _allow_graphs()
        compiled, eager = torch.compile(net.forward, backend=self.backend, dynamic=False), net.forward

        def forward(x: Latents, t: Times, cond: Conditioning, view: View, *embedded: Any, **named: Any) -> Latents:
            chosen = compiled if isinstance(view, MaskView | FullView) else eager
            return chosen(x, t, cond, view, *embedded, **named)

        net.forward = forward


def _allow_graphs() -> None:
    """Allow a graph per clip length and size, with and without gradients: all blocks are one code object for torch."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)


def _on_full_clips(compiled: Callable[..., Tensor], eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, time: Tensor, text: Any, audio: Any, view: View, rotation: Rotation) -> Tensor:
        chosen = compiled if isinstance(view, MaskView | FullView) else eager
        return chosen(x, time, text, audio, view, rotation)

    return forward
