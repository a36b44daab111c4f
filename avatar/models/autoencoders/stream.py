"""Streams: passes of a causal network over time in pieces, each continuing where the last one ended.

The layers' cache belongs to the stream, never to the network, so any number of streams can use one network at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.errors import UserError

Piece = Float[Tensor, "b _ _ _ _"]  # of a video or of latents
Memory = dict[Any, Any]  # the caches of the layers; each layer chooses its key
Step = Callable[[Piece, Memory, bool], Piece]  # (piece, memory to read and update, whether it is the first piece)


class Stream:
    """An encoding or decoding in progress; a piece that raises an error leaves it unchanged.

        stream = autoencoder.decoder_stream()
        frames = torch.cat([stream.push(latents[:, :, :1]), stream.push(latents[:, :, 1:])], dim=2)

    Args:
        step: encodes or decodes one piece.
    """

    def __init__(self, step: Step):
        self.step, self.memory, self.begun = step, {}, False

    def push(self, piece: Piece) -> Piece:
        """Encode or decode the next piece."""
        memory = dict(self.memory)
        result = self.step(piece, memory, not self.begun)
        self.memory, self.begun = memory, True
        return result

    def snapshot(self) -> Any:
        """The state of the stream, for `restore`."""
        return dict(self.memory), self.begun

    def restore(self, snapshot: Any) -> None:
        """Return to the state of a snapshot."""
        memory, self.begun = snapshot
        self.memory = dict(memory)


def check_video(video: Piece, first: bool, temporal_stride: int, spatial_stride: int) -> None:
    """Raise UserError for incomplete latents: a stream's first piece has 1 + s·k frames, the others have s·k.

    Args:
        first: whether the video is a stream's first piece.
        temporal_stride, spatial_stride: s frames and pixels per latent.
    """
    frames, height, width = video.shape[2:]
    fits = frames > 0 and frames % temporal_stride == int(first) % temporal_stride
    if not fits or height % spatial_stride or width % spatial_stride:
        count = f"1 + {temporal_stride}k frames" if first else f"{temporal_stride}k frames after the first piece"
        raise UserError(
            f"got a video of {frames} frames of {height}×{width}; this autoencoder takes {count}, "
            f"height and width multiples of {spatial_stride}: crop it"
        )


def padded(video: Piece, group: int) -> Piece:
    """The first frames of a stream in complete groups: the first frame, repeated, is a group of its own."""
    return torch.cat([video[:, :, :1].expand(-1, -1, group - 1, -1, -1), video], dim=2)
