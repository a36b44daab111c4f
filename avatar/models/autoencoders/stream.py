"""A causal network's pass over time in pieces, each continuing where the last one ended.

The layers' cache belongs to the stream, never to the network: any number of streams share one network at the same
time.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.errors import UserError

Piece = Float[Tensor, "b _ _ _ _"]  # of a video or of latents
Memory = dict[Any, Any]  # each layer's cache, by a key of its own choice
Step = Callable[[Piece, Memory, bool], Piece]  # piece, memory to read and update, whether the piece is the first


class Stream:
    """An encode or a decode in progress; a piece that fails leaves it as it was."""

    def __init__(self, step: Step):
        self.step, self.memory, self.begun = step, {}, False

    def push(self, piece: Piece) -> Piece:
        memory = dict(self.memory)
        result = self.step(piece, memory, not self.begun)
        self.memory, self.begun = memory, True
        return result

    def snapshot(self) -> Any:
        return dict(self.memory), self.begun

    def restore(self, snapshot: Any) -> None:
        memory, self.begun = snapshot
        self.memory = dict(memory)


def check_video(video: Piece, first: bool, temporal_stride: int, spatial_stride: int) -> None:
    """Raise UserError for frames that don't fill latents: a stream begins with 1 + s·k of them and goes on by s·k."""
    frames, height, width = video.shape[2:]
    fits = frames > 0 and frames % temporal_stride == int(first) % temporal_stride
    if not fits or height % spatial_stride or width % spatial_stride:
        count = f"1 + {temporal_stride}k frames" if first else f"{temporal_stride}k frames after the first piece"
        raise UserError(
            f"a video of {frames} frames of {height}×{width}; this autoencoder takes {count}, "
            f"height and width multiples of {spatial_stride}: crop it"
        )


def padded(video: Piece, group: int) -> Piece:
    """A stream's first frames as whole groups: the first frame makes one of its own, repeated."""
    return torch.cat([video[:, :, :1].expand(-1, -1, group - 1, -1, -1), video], dim=2)
