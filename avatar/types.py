"""Data that the packages exchange: conditioning, batches, bundles.

Axes, the same letters in einops and jaxtyping:

    b batch    c channels   f frames (pixels)   l latents (latent frames)   h w space
    n tokens   d width      r roles of audio    k audio tokens per latent   e text events   s samples
    m regions of an image

Pixels are `b c f h w` in [-1, 1], latents `b c l h w` with unit variance per channel, tokens `b n d`.
Time runs from t = 0, data, to t = 1, noise (see `avatar.diffusion.path`).

The clock: 25 frames and 16,000 samples a second. Frame i covers [i/25, (i+1)/25) s = 640 samples.

The timeline: a latent on the timeline covers `temporal_stride` frames. The *reference* is one frame encoded by itself;
its single latent is the *sink*. Its position is -1, before the timeline; it attends only to itself and is never
emitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

FRAME_RATE = 25
SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE // FRAME_RATE

# Index 0 of each vocabulary means "unspecified": dropout and guidance replace labels by it.
ROLES = ("own", "other")
STATES = ("unspecified", "speaking", "listening", "idle")
EMOTIONS = ("unspecified", "neutral", "happy", "sad", "angry", "surprised")
GESTURES = ("unspecified", "none", "wave", "point", "nod", "shake", "shrug", "beat")
REGIONS = ("face", "lips", "eyes")  # of an image; lips and eyes, with their brows, are parts of the face

# Capitals, because a signature that takes pixels and gives latents means other lengths by the same letters.
Pixels = Float[Tensor, "b C f H W"]
Latents = Float[Tensor, "b c l h w"]
Times = Float[Tensor, "b l"]


@dataclass
class Conditioning:
    """The conditioning of a clip, with one entry per latent for what can change within the clip.

    A modality is *absent* where its mask is False (audio, text) or its index is 0 (labels).
    """

    reference: Float[Tensor, "b c 1 h w"]  # the sink: one frame, encoded by itself
    audio: Float[Tensor, "b r l k d"]  # features by role (see ROLES), k tokens around each latent
    audio_mask: Bool[Tensor, "b r l"]
    text: Shaped[Tensor, "b e n ..."]  # byte ids, or features of a frozen encoder
    text_mask: Bool[Tensor, "b e n"]
    text_event: Int[Tensor, "b l"]  # which of the e prompts holds at each latent; -1: none
    state: Int[Tensor, "b l"]  # index into STATES
    emotion: Int[Tensor, "b l"]  # index into EMOTIONS
    emotion_intensity: Float[Tensor, "b l"]  # in [0, 1]
    gesture: Int[Tensor, "b l"]  # index into GESTURES
    # For networks with `guidance_embedding` only: the scale of the labels' guidance that they imitate
    guidance: Float[Tensor, "b l"] | None = None
    # For Wan's image-to-video networks only (see `avatar.conditioning.image_to_video`):
    image: Float[Tensor, "b i g"] | None = None  # the reference as a frozen image encoder's features
    concat_latents: Float[Tensor, "b j l h w"] | None = None  # concatenated to the input: [mask | known latents]

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
            guidance=None if self.guidance is None else self.guidance[:, latents],
            concat_latents=None if self.concat_latents is None else self.concat_latents[:, :, latents],
        )

    def without(
        self, audio: Bool[Tensor, " b"], text: Bool[Tensor, " b"], labels: Bool[Tensor, " b"]
    ) -> "Conditioning":
        """The same conditioning without the modalities of the flagged samples."""
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
        """The conditioning of the reference's own latents: no audio, no prompt, no labels."""
        b, r, _, k, d = self.audio.shape
        labels = self.state.new_zeros(b, latents)
        known = None
        if self.concat_latents is not None:
            mask = self.concat_latents[:, self.reference.shape[1] :, :1]
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
            guidance=None if self.guidance is None else self.guidance[:, :1].expand(-1, latents),
            concat_latents=known,
        )

    def map(self, change) -> "Conditioning":
        """Apply `change` to every tensor."""
        return replace(self, **{name: change(getattr(self, name)) for name in self.given})

    @property
    def given(self) -> list[str]:
        """The names of the fields that hold a tensor."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]


def join(parts: list[Conditioning], dim: str) -> Conditioning:
    """Conditionings joined along the batch (`"b"`), or along the timeline of one batch (`"l"`).

    Along the timeline the reference and the text are those of the first part; only `text_event` changes.
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
        "guidance": 1,
        "concat_latents": 2,
    }
    along = {name: axis for name, axis in along.items() if name in first.given}
    return replace(first, **{name: torch.cat([getattr(p, name) for p in parts], axis) for name, axis in along.items()})


# A batch is global, over all ranks and accumulated micro-batches: each takes every n-th of its samples.
GLOBAL_BATCH = slice(0, None, 1)


@dataclass
class Batch:
    """A batch (or its shard) for training on latents."""

    latents: Float[Tensor, "b c l h w"]
    conditioning: Conditioning
    regions: Float[Tensor, "b m l h w"]  # share of each latent pixel that is each of REGIONS; zeros where unknown
    keys: list[str]  # one name per sample, for logs
    shard: slice = field(default_factory=lambda: GLOBAL_BATCH)  # which samples of the global batch these are
    # For objectives of pixels only:
    video: Float[Tensor, "b C f H W"] | None = None  # the frames of the latents
    video_regions: Float[Tensor, "b m f H W"] | None = None  # as `regions`, per pixel


@dataclass
class Frames:
    """A batch for training an autoencoder."""

    video: Float[Tensor, "b c f h w"]
    reference: Float[Tensor, "b c 1 h w"]  # another frame of the same puppet
    regions: Float[Tensor, "b m f h w"]  # as in Batch, per pixel
    keys: list[str]


@dataclass(frozen=True)
class Bundle:
    """The result of a stage: weights, the config of their network and encoders, and the components they belong to."""

    kind: str  # "autoencoder", "teacher", "causal_teacher" or "student"
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]  # of the network and its encoders, see `avatar.models.registry`
    components: Mapping[str, str] = field(default_factory=dict)  # name of a component → its fingerprint
    plan: Mapping[str, Any] | None = None  # the rollout plan that a student was trained for
