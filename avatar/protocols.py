"""Interfaces between the packages: data modules, views, networks, autoencoders and encoders."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from avatar.types import Conditioning, Latents, Pixels, Times


@runtime_checkable
class TrainingData(Protocol):
    """The data module of a training run, in addition to Lightning's interface."""

    start: int  # the micro-batch with which a resumed run continues

    @property
    def accumulate(self) -> int:
        """Micro-batches per batch."""
        ...

    @property
    def regions(self) -> frozenset[str]:
        """Those of REGIONS for which some training samples have masks."""
        ...

    def check(self, ranks: int) -> None:
        """Raise UserError for data that can't be trained on with this number of ranks, before anything is encoded.

        A run calls it on every rank before it creates its folder.
        """
        ...

    def describe_batch(self, ranks: int) -> str:
        """The size of the global batch, in words."""
        ...


@runtime_checkable
class LatentData(TrainingData, Protocol):
    """A data module of latents, with clips of the lengths in `buckets.lengths`."""

    autoencoder: "VideoAutoencoder"
    audio: "AudioEncoder"
    text: "TextEncoder"
    image: "ImageEncoder | None"
    buckets: Any  # an avatar.data.bucketing.LengthBuckets

    def sizes(self) -> set[tuple[int, int]]:
        """Heights and widths of its latents."""
        ...


@runtime_checkable
class View(Protocol):
    """What the latents of one forward pass may attend to; causality and caching live here, never in the network."""

    @property
    def positions(self) -> Int[Tensor, " l"]:
        """The position of each latent on the timeline; that of the sink is -1."""
        ...

    @property
    def sink_positions(self) -> tuple[int, ...]:
        """All positions at which the sink is attended to."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Any) -> Tensor:
        """Attention of un-rotated queries to the keys of this pass and of the cache; idempotent within a chunk."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts the velocity v = eps - x0 of every latent."""

    def __call__(
        self,
        x: Latents,
        t: Times,
        cond: Conditioning,
        view: View,
        r: Times | None = None,
    ) -> Latents: ...

    def tokens(self, height: int, width: int) -> int:
        """Tokens per latent of height × width."""
        ...

    def check_guidance(self, scale: float | None) -> None:
        """Raise UserError for a guidance scale that the network does not take."""
        ...


@runtime_checkable
class EncoderStream(Protocol):
    """Streaming encoding: pieces of frames in, the first with one frame more, their latents out."""

    def push(self, piece: Pixels) -> Latents: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any) -> None: ...


@runtime_checkable
class DecoderStream(Protocol):
    """Streaming decoding: pieces of latents in, their frames out."""

    def push(self, piece: Latents) -> Pixels: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any) -> None: ...


@runtime_checkable
class VideoAutoencoder(Protocol):
    """Frames ↔ normalised latents. 1 + s·k frames make 1 + k latents; the first one covers its frame alone."""

    temporal_stride: int
    spatial_stride: int
    channels: int
    training: bool

    @property
    def fingerprint(self) -> str:
        """The hash of the weights that its latents belong to."""
        ...

    def eval(self) -> Any: ...

    def parameters(self) -> Any: ...

    def encode(self, video: Pixels) -> Latents: ...

    def decode(self, latents: Latents) -> Pixels: ...

    def encoder_stream(self) -> EncoderStream: ...

    def decoder_stream(self) -> DecoderStream:
        """A new stream, to be primed with the latent of the reference, whose one frame is discarded."""
        ...


@runtime_checkable
class AudioEncoder(Protocol):
    """Audio → one feature vector per frame, and the window of frames around each latent.

    Features are computed for a *hop* of frames at a time, on a grid that begins with the timeline. Those of a hop
    depend on its own samples, on `left_samples` before them and on `lookahead_samples` after them.
    """

    dim: int
    num_layers: int  # layers of a network whose states are concatenated in the features; 1: no layers
    left_context: int  # frames before a latent's own frames
    right_context: int  # frames after them; with hop and look-ahead, the latency
    hop_frames: int  # frames whose features are computed together
    left_samples: int
    lookahead_samples: int
    silence: Float[Tensor, "h d"]  # the features of a hop of silence, surrounded by silence

    @property
    def fingerprint(self) -> str:
        """The weights and settings that features depend on."""
        ...

    def encode(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of all complete frames; the first one begins a hop, and silence surrounds the samples."""
        ...

    def interior(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of complete hops, from samples with `left_samples` before and `lookahead_samples` after them."""
        ...

    def tokens(self, stride: int) -> int:
        """Frames in a latent's window."""
        ...

    def window(self, features: Float[Tensor, "f d"], stride: int) -> Float[Tensor, "l k d"]:
        """The window of each of l latents, from left_context + stride·l + right_context frames."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """Images → features of width `dim`."""

    dim: int

    @property
    def fingerprint(self) -> str:
        """The weights and settings that features depend on."""
        ...

    def encode(self, pictures: Float[Tensor, "b c 1 h w"]) -> Float[Tensor, "b i g"]: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts → inputs of the model's text embedder: the tokens of a prompt, none of them all zeros, then padding."""

    @property
    def fingerprint(self) -> str:
        """The weights and settings that tokens depend on."""
        ...

    def encode(self, prompts: list[str]) -> tuple[Shaped[Tensor, "e n ..."], Bool[Tensor, "e n"]]: ...

    def check(self, prompt: str) -> None:
        """Raise UserError if the prompt is not a string or exceeds the token limit."""
        ...

    def padded(self, tokens: Shaped[Tensor, "m ..."]) -> tuple[Shaped[Tensor, "n ..."], Bool[Tensor, " n"]]:
        """The tokens of a prompt padded with zeros, and the mask of those that are attended to."""
        ...
