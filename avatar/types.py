"""What the parts of the project hand to each other: conditioning, batches, bundles, and the protocols between ranks.

Axes, the same letters in einops and jaxtyping:

    b batch    c channels   f frames (pixels)   l latents (latent frames)   h w space
    n tokens   d width      r roles of audio    k audio tokens per latent   e text events   s samples
    m regions of a picture

Pixels are `b c f h w` in [-1, 1], latents `b c l h w` with unit variance per channel, tokens `b n d`.
Time runs from t = 0, data, to t = 1, noise (see `avatar.diffusion.path`).

The clock: 25 frames and 16,000 samples a second. Frame i covers [i/25, (i+1)/25) s = 640 samples.

The timeline: a latent on the timeline covers `temporal_stride` frames. The *reference* is one frame encoded by itself;
its single latent is the *sink*. It stands before the timeline (position -1), attends only to itself and is never
emitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

FRAME_RATE = 25
SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE // FRAME_RATE

# Index 0 of each vocabulary means "not said": it is what dropout and guidance replace a label by.
ROLES = ("own", "heard")
STATES = ("unspecified", "speaking", "listening", "idle")
EMOTIONS = ("unspecified", "neutral", "happy", "sad", "angry", "surprised")
GESTURES = ("unspecified", "none", "wave", "point", "nod", "shake", "shrug", "beat")
REGIONS = ("face", "lips")  # of a picture; the lips lie in the face

# Capitals, because a signature that takes pixels and gives latents means other lengths by the same letters.
Pixels = Float[Tensor, "b C f H W"]
Latents = Float[Tensor, "b c l h w"]
Times = Float[Tensor, "b l"]


@dataclass
class Conditioning:
    """All that steers a clip, one entry per latent where it can change in mid-clip.

    A modality is *absent* where its mask is False (audio, text) or its index is 0 (labels).
    """

    reference: Float[Tensor, "b c 1 h w"]  # the sink: one frame, encoded by itself
    audio: Float[Tensor, "b r l k d"]  # features by role (see ROLES), k tokens around each latent
    audio_mask: Bool[Tensor, "b r l"]
    text: Shaped[Tensor, "b e n ..."]  # byte ids, or features of a frozen encoder: what the model's text entrance takes
    text_mask: Bool[Tensor, "b e n"]
    text_event: Int[Tensor, "b l"]  # which of the e events is spoken of at each latent
    state: Int[Tensor, "b l"]  # index into STATES
    emotion: Int[Tensor, "b l"]  # index into EMOTIONS
    emotion_intensity: Float[Tensor, "b l"]  # in [0, 1]
    gesture: Int[Tensor, "b l"]  # index into GESTURES
    # What Wan's image-to-video networks take, and no others (see `avatar.data.seeing`):
    image: Float[Tensor, "b i g"] | None = None  # the reference as a frozen image encoder's features
    channels: Float[Tensor, "b j l h w"] | None = None  # beside the latents' own: a mask of what is known, and that

    @property
    def latents(self) -> int:
        return self.state.shape[1]

    def at(self, latents: slice) -> "Conditioning":
        """The conditioning of a part of the timeline."""
        return replace(
            self,
            audio=self.audio[:, :, latents],
            audio_mask=self.audio_mask[:, :, latents],
            text_event=self.text_event[:, latents],
            state=self.state[:, latents],
            emotion=self.emotion[:, latents],
            emotion_intensity=self.emotion_intensity[:, latents],
            gesture=self.gesture[:, latents],
            channels=None if self.channels is None else self.channels[:, :, latents],
        )

    def without(
        self, audio: Bool[Tensor, " b"], text: Bool[Tensor, " b"], labels: Bool[Tensor, " b"]
    ) -> "Conditioning":
        """The same conditioning with modalities taken away from the samples that the flags name."""
        kept = (~labels)[:, None]
        return replace(
            self,
            audio_mask=self.audio_mask & ~audio[:, None, None],
            text_mask=self.text_mask & ~text[:, None, None],
            state=self.state * kept,
            emotion=self.emotion * kept,
            gesture=self.gesture * kept,
        )

    def blank(self, latents: int) -> "Conditioning":
        """The same reference and text, over latents that are the reference: no audio, no event, no labels."""
        b, r, _, k, d = self.audio.shape
        labels = self.state.new_zeros(b, latents)
        known = None
        if self.channels is not None:
            mask = self.channels[:, self.reference.shape[1] :, :1]
            known = torch.cat([torch.ones_like(mask), self.reference], dim=1).expand(-1, -1, latents, -1, -1)
        return replace(
            self,
            audio=self.audio.new_zeros(b, r, latents, k, d),
            audio_mask=self.audio_mask.new_zeros(b, r, latents),
            text_event=labels - 1,
            state=labels,
            emotion=labels,
            emotion_intensity=self.emotion_intensity.new_zeros(b, latents),
            gesture=labels,
            channels=known,
        )

    def map(self, change) -> "Conditioning":
        """Every tensor replaced by `change(tensor)`."""
        return replace(self, **{name: change(getattr(self, name)) for name in self.given})

    @property
    def given(self) -> list[str]:
        """The fields that hold a tensor: all but those that this model does without."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]


def join(parts: list[Conditioning], dim: str) -> Conditioning:
    """Conditionings joined along the batch (`"b"`), or along the timeline of one batch (`"l"`).

    Along the timeline the reference and the text are those of the first part: what changes there is `text_event`.
    """
    first = parts[0]
    if dim == "b":
        return replace(first, **{name: torch.cat([getattr(p, name) for p in parts]) for name in first.given})
    along = {
        "audio": 2,
        "audio_mask": 2,
        "text_event": 1,
        "state": 1,
        "emotion": 1,
        "emotion_intensity": 1,
        "gesture": 1,
        "channels": 2,
    }
    along = {name: axis for name, axis in along.items() if name in first.given}
    return replace(first, **{name: torch.cat([getattr(p, name) for p in parts], axis) for name, axis in along.items()})


# A batch is that of all ranks and of all passes whose gradients are accumulated: each takes every n-th of its samples.
WHOLE = slice(0, None, 1)


@dataclass
class Batch:
    """What a data module yields for training on latents."""

    latents: Float[Tensor, "b c l h w"]
    conditioning: Conditioning
    regions: Float[Tensor, "b m l h w"]  # share of each latent pixel that is each of REGIONS; zeros where unknown
    keys: list[str]  # one name per sample, for logs
    part: slice = field(default_factory=lambda: WHOLE)  # which samples of the whole batch these are


@dataclass
class Frames:
    """What a data module yields for training an autoencoder."""

    video: Float[Tensor, "b c f h w"]
    reference: Float[Tensor, "b c 1 h w"]  # another frame of the same puppet
    regions: Float[Tensor, "b m f h w"]  # as in Batch, per pixel
    keys: list[str]


@dataclass(frozen=True)
class Bundle:
    """What a stage hands to the next: weights, the config that builds their network, and what they were made with."""

    kind: str  # "autoencoder", "teacher", "causal_teacher" or "student"
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]  # `_target_` and constructor arguments of the network
    components: Mapping[str, str] = field(default_factory=dict)  # name of a component → what tells its weights
    plan: Mapping[str, Any] | None = None  # the rollout plan that a student was trained for


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

    def told(self, ranks: int) -> str:
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

    origin: Any  # where its weights come from; `origin.fingerprint` tells its latents from another's
    temporal_stride: int
    spatial_stride: int
    channels: int
    training: bool

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
    states: int  # of layers of a network, which lie side by side in the features; 1: they are of one piece
    left_context: int  # frames before a latent's own frames
    right_context: int  # frames after them; with the hop and the reach it makes what "future" means, and latency
    hop: int  # frames whose features are made together
    memory: int
    reach: int
    silence: Float[Tensor, "h d"]  # the features of a hop of silence, amid silence

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

    def encode(self, pictures: Float[Tensor, "b c 1 h w"]) -> Float[Tensor, "b i g"]: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts → what the model's text entrance takes: a prompt's own tokens, none of them all zeros, then padding."""

    def encode(self, prompts: list[str]) -> tuple[Shaped[Tensor, "e n ..."], Bool[Tensor, "e n"]]: ...

    def check(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is none, or that there is no room for."""
        ...

    def padded(self, tokens: Shaped[Tensor, "m ..."]) -> tuple[Shaped[Tensor, "n ..."], Bool[Tensor, " n"]]:
        """A prompt's own tokens with zeros behind them, and which of all these may be attended to."""
        ...
