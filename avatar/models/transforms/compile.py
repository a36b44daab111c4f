"""torch.compile of the blocks of a backbone, one by one, for forward passes over full clips."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avatar.models.transforms.apply import blocks_of
from avatar.nn.masks import FullView, MaskView
from avatar.nn.rope import Rotation
from avatar.protocols import View

MAX_GRAPHS = 64  # beyond torch's own limit, 8, it would fall back to eager mode with hardly a warning


@dataclass(frozen=True)
class Compiled:
    """Compile each block by itself, for passes over full clips; all blocks share the compiled graphs.

    The cached passes of a rollout are not compiled: their KV cache differs from block to block and chunk to chunk, and
    each would need a graph of its own. Parameter names stay the same.

    Args:
        backend: of torch.compile, such as "inductor" or, without code generation, "aot_eager".

    Raises:
        UserError: the network has no blocks.
    """

    backend: str = "inductor"

    def __call__(self, net: nn.Module) -> None:
        # For torch all blocks are one code object; each clip length and size, with or without gradients, is a graph.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        for block in blocks_of(net):
            # Not block.compile(): it finds the checkpointed forward under it and leaves that uncompiled.
            block.forward = _on_full_clips(torch.compile(block.forward, backend=self.backend), block.forward)


def _on_full_clips(compiled: Callable[..., Tensor], eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, time: Tensor, text: Any, audio: Any, view: View, rotation: Rotation) -> Tensor:
        chosen = compiled if isinstance(view, MaskView | FullView) else eager
        return chosen(x, time, text, audio, view, rotation)

    return forward
