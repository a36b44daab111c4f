"""Base class of all autoencoders: a full pass is a stream of one piece."""

from typing import ClassVar

from torch import nn

from avatar.models.autoencoders.stream import Memory, Stream, check_video
from avatar.models.bundle import Origin
from avatar.types import Latents, Pixels


class StreamedAutoencoder(nn.Module):
    """Video autoencoder (see `avatar.protocols.VideoAutoencoder`) whose encoder and decoder run piece by piece.

    A subclass sets the sizes and defines `_encode_piece` and `_decode_piece`, which cache in `memory` what later pieces
    need; `decoder_parts` names the layers that only decoding needs.
    """

    decoder_parts: ClassVar[tuple[str, ...]] = ()
    origin: Origin
    temporal_stride: int
    spatial_stride: int
    channels: int

    @property
    def fingerprint(self) -> str:
        """The hash of the weights that its latents belong to."""
        return self.origin.fingerprint

    def encode(self, video: Pixels) -> Latents:
        """Normalised latents of 1 + s·k frames, height and width multiples of the spatial stride."""
        return self.encoder_stream().push(video)

    def decode(self, latents: Latents) -> Pixels:
        """The 1 + s·k frames of 1 + k latents, about within [-1, 1]."""
        return self.decoder_stream().push(latents)

    def encoder_stream(self) -> Stream:
        """A new encoding stream."""
        return Stream(self._encode_checked)

    def decoder_stream(self) -> Stream:
        """A new decoding stream."""
        return Stream(self._decode_piece)

    def drop_decoder(self) -> None:
        """Delete the layers that only decoding needs."""
        for name in self.decoder_parts:
            delattr(self, name)

    def _encode_checked(self, video: Pixels, memory: Memory, first: bool) -> Latents:
        check_video(video, first, self.temporal_stride, self.spatial_stride)
        return self._encode_piece(video, memory, first)

    def _encode_piece(self, video: Pixels, memory: Memory, first: bool) -> Latents:
        raise NotImplementedError

    def _decode_piece(self, latents: Latents, memory: Memory, first: bool) -> Pixels:
        raise NotImplementedError
