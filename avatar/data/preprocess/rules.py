"""What a data set is made by: rules that are numbers and choices, and tools that bring weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from avatar.data.preprocess.clips import whole_length
from avatar.data.preprocess.detectors import Detectors
from avatar.data.preprocess.encoding import Encoders
from avatar.data.preprocess.scores import Scorer
from avatar.errors import UserError
from avatar.types import FRAME_RATE

CHOICES = {"faces": ("keep", "reject"), "no_audio": ("keep", "reject"), "pictures": ("copy", "encode")}


@dataclass(frozen=True)
class Rules:
    """What is made of a source, and what is rejected.

    Args:
        shortest_s, longest_s: Of clips, in seconds; both are rounded down to 1 + s·k frames.
        temporal_stride: s, the autoencoder's.
        multiple: Of the sides of pictures in pixels: even, and a multiple of the autoencoder's spatial stride.
        side: The most of the shorter side in pixels; None: as it is.
        cut: Threshold of the cut detector, 0 to 1.
        faces: "keep" or "reject" a clip in which no face, or more than one, is found.
        no_audio: "keep" sources without a sound stream, over silence, or "reject" them.
        silent_db: Level of a whole source in dB of full scale under which it is rejected.
        clipped: Share of samples at full scale from which it is.
        av_length_s: Seconds that picture and sound may end apart.
        frozen_s: Seconds without change from which a clip is rejected.
        pictures: "copy" those that need no change from sources in H.264, or "encode" all of them.
        preset, crf: Of libx264, where pictures are encoded.
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
        for part in fields(self):
            value = getattr(self, part.name)
            if part.type in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"rules.{part.name}={value}; wanted a number")
        for name, wanted in CHOICES.items():
            if getattr(self, name) not in wanted:
                raise UserError(f"rules.{name}={getattr(self, name)}; wanted {' or '.join(wanted)}")
        if self.multiple < 2 or self.multiple % 2:
            raise UserError(f"multiple={self.multiple}; wanted an even one, for colour has half the resolution")
        if self.temporal_stride < 1 or not 2 <= self.shortest <= self.longest:
            raise UserError(
                f"clips of {self.shortest_s} to {self.longest_s} s in steps of {self.temporal_stride} frames; wanted "
                f"shortest_s from {(1 + self.temporal_stride) / FRAME_RATE} on, and longest_s no less"
            )

    @property
    def shortest(self) -> int:
        return whole_length(int(self.shortest_s * FRAME_RATE), self.temporal_stride)

    @property
    def longest(self) -> int:
        return whole_length(int(self.longest_s * FRAME_RATE), self.temporal_stride)


@dataclass(frozen=True)
class Models:
    """What needs weights; none of it is shipped but the encoders."""

    detectors: Detectors = field(default_factory=Detectors)
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    encoders: Encoders = field(default_factory=Encoders)

    @property
    def need_frames(self) -> bool:
        """Whether any of them looks at a clip's pictures."""
        return bool(self.scorers) or self.encoders.autoencoder is not None
