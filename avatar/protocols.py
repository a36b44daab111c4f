"""The protocols between ranks: what networks, views, autoencoders and encoders are to each other."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from avatar.types import Conditioning, Latents, Pixels, Times


@runtime_checkable
class TrainingData(Protocol):
    """What a run asks of its data module, beside Lightning's own."""

    start: int  # the pass that a resumed run goes on with

    @property
    def accumulate(self) -> int:
        """Passes per batch."""
        ...

    @property
    def regions(self) -> frozenset[str]:
        """Those of REGIONS that some of the training samples have masks of."""
        ...

    def check(self, ranks: int) -> None:
        """Raise an error for what can't be trained on by so many ranks, as far as it shows before anything is encoded.

        A run calls it, on every rank, before its folder is opened.
        """
        ...

    def describe_batch(self, ranks: int) -> str:
        """What an update learns from."""
        ...


@runtime_checkable
class LatentData(TrainingData, Protocol):
    """A data module of latents, of clips as long as `buckets.lengths` says."""

    autoencoder: "VideoAutoencoder"
    audio: "AudioEncoder"
    text: "TextEncoder"
    image: "ImageEncoder | None"
    buckets: Any  # an `avatar.data.bucketing.LengthBuckets`

    def sizes(self) -> set[tuple[int, int]]:
        """Heights and widths of its latents."""
        ...


@runtime_checkable
class View(Protocol):
    """What the latents of one forward pass may attend to; causality and caching live here, never in the network."""

    @property
    def positions(self) -> Int[Tensor, " l"]:
        """The place of each latent on the timeline; the sink's is -1."""
        ...

    @property
    def sink_positions(self) -> tuple[int, ...]:
        """Every place that the sink is seen at."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Any) -> Tensor:
        """What the pass's un-rotated queries find, among its own keys and what is cached; idempotent within a chunk."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts the velocity v = eps - x0 of every latent it is given."""

    def __call__(
        self,
        x: Latents,
        t: Times,
        cond: Conditioning,
        view: View,
        r: Times | None = None,
        guidance: Tensor | None = None,
    ) -> Latents: ...

    def tokens(self, height: int, width: int) -> int:
        """Tokens per latent of height × width."""
        ...


@runtime_checkable
class EncoderStream(Protocol):
    """An encode in progress: pieces of whole latents' frames in, the first with one frame more, their latents out."""

    def push(self, piece: Pixels) -> Latents: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any) -> None: ...


@runtime_checkable
class DecoderStream(Protocol):
    """A decode in progress: pieces of latents in, the frames they complete out."""

    def push(self, piece: Latents) -> Pixels: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any) -> None: ...


@runtime_checkable
class VideoAutoencoder(Protocol):
    """Frames ↔ normalised latents. 1 + s·k frames make 1 + k latents; the first one stands for its frame alone."""

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
        """A fresh stream, to be primed with the reference's latent, whose one frame is discarded."""
        ...


@runtime_checkable
class AudioEncoder(Protocol):
    """Sound → one feature vector per frame, and the window of frames that stands around each latent.

    Features are made for a *hop* of frames at a time, and hops lie on a grid that begins where the timeline does: those
    of a hop are a function of its own samples, of the `memory` samples before them and of the `reach` samples after.
    """

    dim: int
    num_layers: int  # of layers of a network, which lie side by side in the features; 1: they are of one piece
    left_context: int  # frames before a latent's own frames
    right_context: int  # frames after them; with the hop and the reach it makes what "future" means, and latency
    hop_frames: int  # frames whose features are made together
    left_samples: int
    lookahead_samples: int
    silence: Float[Tensor, "h d"]  # the features of a hop of silence, amid silence

    @property
    def fingerprint(self) -> str:
        """The weights and settings that features depend on."""
        ...

    def encode(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of all whole frames, of which the first begins a hop; before and after the samples is silence."""
        ...

    def interior(self, samples: Float[Tensor, " s"]) -> Float[Tensor, "f d"]:
        """Features of whole hops, from samples that bring `memory` more before them and `reach` more after them."""
        ...

    def tokens(self, stride: int) -> int:
        """Frames in a latent's window."""
        ...

    def window(self, features: Float[Tensor, "f d"], stride: int) -> Float[Tensor, "l k d"]:
        """The window of each of l latents, from left_context + stride·l + right_context frames."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """Pictures → features of width `dim`."""

    dim: int

    @property
    def fingerprint(self) -> str:
        """The weights and settings that features depend on."""
        ...

    def encode(self, pictures: Float[Tensor, "b c 1 h w"]) -> Float[Tensor, "b i g"]: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts → what the model's text entrance takes: a prompt's own tokens, none of them all zeros, then padding."""

    @property
    def fingerprint(self) -> str:
        """The weights and settings that tokens depend on."""
        ...

    def encode(self, prompts: list[str]) -> tuple[Shaped[Tensor, "e n ..."], Bool[Tensor, "e n"]]: ...

    def check(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is none, or that there is no room for."""
        ...

    def padded(self, tokens: Shaped[Tensor, "m ..."]) -> tuple[Shaped[Tensor, "n ..."], Bool[Tensor, " n"]]:
        """A prompt's own tokens with zeros behind them, and which of all these may be attended to."""
        ...
