"""Settings of a preprocessed data set: rules (numbers and choices) and models (objects with weights)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from avatar.data.preprocess.clips import max_clip_length
from avatar.data.preprocess.detectors import Detectors
from avatar.data.preprocess.encoding import Encoders
from avatar.data.preprocess.scores import Scorer
from avatar.errors import UserError
from avatar.types import FRAME_RATE

CHOICES = {"faces": ("keep", "reject"), "no_audio": ("keep", "reject"), "pictures": ("copy", "encode")}


@dataclass(frozen=True)
class Rules:
    """Rules for cutting, converting and rejecting sources.

    Args:
        shortest_s, longest_s: length of clips in seconds; both are rounded down to 1 + s·k frames.
        temporal_stride: s, the autoencoder's, in frames.
        multiple: divisor of height and width in pixels: even, and a multiple of the autoencoder's spatial stride.
        side: upper limit of the shorter side in pixels; None: no limit.
        cut: threshold of the cut detector, 0 to 1.
        faces: "keep" or "reject" a clip in which no face, or more than one, is detected.
        no_audio: "keep" sources without an audio stream, with silence, or "reject" them.
        silent_db: level of a complete source, in dB of full scale, below which it is rejected.
        clipped: share of samples at full scale from which a source is rejected.
        av_length_s: maximum difference between the ends of video and audio, in seconds.
        frozen_s: seconds without change from which a clip is rejected.
        pictures: "copy" videos that need no change from H.264 sources, or "encode" all of them.
        preset, crf: settings of libx264 for encoded videos.

    Raises:
        UserError: settings of another type or out of range.
    """

    shortest_s: float
    longest_s: float
    temporal_stride: int
    multiple: int
    side: int | None
    cut: float
    faces: str
    no_audio: str
    silent_db: float
    clipped: float
    av_length_s: float
    frozen_s: float
    pictures: str
    preset: str
    crf: int

    def __post_init__(self):
        for rule in fields(self):
            value = getattr(self, rule.name)
            if rule.type in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"rules.{rule.name}={value}; expected a number")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"rules.{name}={getattr(self, name)}; expected {' or '.join(choices)}")
        if self.multiple < 2 or self.multiple % 2:
            raise UserError(
                f"rules.multiple={self.multiple}; expected an even number from 2, since colour has half the resolution"
            )
        if self.temporal_stride < 1 or not 2 <= self.shortest <= self.longest:
            raise UserError(
                f"rules.shortest_s={self.shortest_s}, rules.longest_s={self.longest_s} and "
                f"rules.temporal_stride={self.temporal_stride}; expected shortest_s of at least "
                f"{(1 + self.temporal_stride) / FRAME_RATE} s, longest_s of at least shortest_s, and a positive stride"
            )

    @property
    def shortest(self) -> int:
        """In frames."""
        return max_clip_length(int(self.shortest_s * FRAME_RATE), self.temporal_stride)

    @property
    def longest(self) -> int:
        """In frames."""
        return max_clip_length(int(self.longest_s * FRAME_RATE), self.temporal_stride)


@dataclass(frozen=True)
class Models:
    """Objects with weights. Only the encoders are shipped."""

    detectors: Detectors = field(default_factory=Detectors)
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    encoders: Encoders = field(default_factory=Encoders)

    @property
    def need_frames(self) -> bool:
        """Whether a model processes all frames of a clip."""
        return bool(self.scorers) or self.encoders.autoencoder is not None
