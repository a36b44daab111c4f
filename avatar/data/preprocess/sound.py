"""Sound on the picture's time axis: mono, 16 kHz, sample 0 at the first frame's time stamp.

Samples are placed by time stamps: a stream that starts late is preceded by silence, one that starts early is cut, and
gaps are filled, so that sound and picture stay together.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float32

from avatar.data.preprocess.probe import opened
from avatar.data.preprocess.reasons import Rejected, repair
from avatar.media.decode import LEAST_DOWNMIX_ENERGY
from avatar.types import SAMPLE_RATE

FULL_SCALE = 0.999
MOST_GAP_S = 0.02  # that time stamps may be off without being a gap
TOGETHER = 64  # frames that are worked off at once
LEAST_LEVEL_DB = -120.0  # what digital silence is said to have


@dataclass(frozen=True)
class Sound:
    """The sound of a source, as long as it lasts."""

    samples: Float32[np.ndarray, " s"]
    sha256: str | None  # of the sound itself, wherever it starts; None: there is none
    offset_s: float = 0.0  # of its first sample against the first frame
    clipped: float = 0.0  # share of samples at full scale
    repairs: list[dict[str, str]] = field(default_factory=list)


def silence(seconds: float) -> Sound:
    """What stands for the sound of a source without any."""
    nothing = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    return Sound(nothing, None, repairs=[repair("no_audio", f"{seconds:.2f} s of silence")])


def read_sound(path: Path, start_s: float) -> Sound:
    """The first sound stream, against a picture that starts at `start_s` of the file's clock.

    Holds about 64 kB per second in memory.

    Raises:
        Rejected: corrupt, no_audio (a stream without samples), nonfinite, antiphase.
    """
    reader = _Reader()
    with opened(path) as container:
        planar = av.AudioResampler(format="fltp")
        try:
            for decoded in container.decode(audio=0):
                for frame in planar.resample(decoded):
                    reader.take(frame)
        except ValueError as error:  # PyAV's, for a stream that changes its rate or channels on the way
            raise Rejected("corrupt", f"the sound changes its form ({error})") from None
    if reader.first_s is None or not reader.taken:
        raise Rejected("no_audio", "a sound stream without samples")
    samples = reader.finish()
    if reader.of_mono < LEAST_DOWNMIX_ENERGY * reader.of_channels:
        raise Rejected("antiphase", f"averaging keeps {reader.of_mono / reader.of_channels:.2%} of the sound")
    repairs = reader.repairs()
    offset = reader.first_s - start_s
    digest = hashlib.sha256(to_int16(samples).tobytes()).hexdigest()
    lead = round(offset * SAMPLE_RATE)
    if lead:
        repairs.append(repair("start_offset", f"sound starts {offset:+.3f} s from the picture"))
        samples = np.concatenate([np.zeros(lead, np.float32), samples]) if lead > 0 else samples[-lead:]
    return Sound(samples, digest, offset, reader.at_full_scale / reader.count, repairs)


def level_db(samples: Float32[np.ndarray, "..."]) -> float:
    """Root mean square in dB of full scale, at least -120."""
    mean = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return max(10 * np.log10(mean), LEAST_LEVEL_DB) if mean > 0 else LEAST_LEVEL_DB


def to_int16(samples: Float32[np.ndarray, " s"]) -> np.ndarray:
    """As 16-bit files store them."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2")


class _Reader:
    """Averages channels, fills gaps, resamples and counts: many frames at a time, for they are short."""

    def __init__(self):
        self.first_s: float | None = None
        self.rate = self.channels = self.taken = self.count = self.at_full_scale = 0
        self.of_channels = self.of_mono = self.gap_s = self.twice_s = 0.0
        self._to_clock = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
        self._waiting: list[np.ndarray] = []  # frames that follow each other, `c s`
        self._pieces: list[np.ndarray] = []

    def take(self, frame: av.AudioFrame) -> None:
        channels = frame.to_ndarray()
        time = frame.time
        if self.first_s is None:
            self.first_s, self.rate, self.channels = time or 0.0, frame.sample_rate, len(channels)
        due = self.taken if time is None else round((time - self.first_s) * self.rate)
        if due - self.taken > MOST_GAP_S * self.rate:
            self.gap_s += (due - self.taken) / self.rate
            self._work_off()
            self._resample(np.zeros(due - self.taken, np.float32))
            self.taken = due
        elif self.taken - due > MOST_GAP_S * self.rate:  # two packets for one time: the first stands
            self.twice_s += (self.taken - due) / self.rate
            channels = channels[:, self.taken - due :]
        self._waiting.append(channels)
        self.taken += channels.shape[1]
        if len(self._waiting) == TOGETHER:
            self._work_off()

    def _work_off(self) -> None:
        if not self._waiting:
            return
        channels = np.concatenate(self._waiting, axis=1)
        self._waiting.clear()
        finite = np.isfinite(channels)
        if not finite.all():
            at = self.taken - channels.shape[1] + int(finite.min(axis=0).argmin())
            raise Rejected("nonfinite", f"{at / self.rate:.2f} s into the sound")
        mono = channels.mean(axis=0)
        self.count += channels.size
        self.at_full_scale += int((np.abs(channels) >= FULL_SCALE).sum())
        self.of_channels += float(np.square(channels, dtype=np.float64).mean(axis=0).sum())
        self.of_mono += float(np.square(mono, dtype=np.float64).sum())
        if len(mono):
            self._resample(mono)

    def _resample(self, mono: np.ndarray) -> None:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono)[None], format="fltp", layout="mono")
        frame.sample_rate = self.rate
        self._pieces += [out.to_ndarray()[0] for out in self._to_clock.resample(frame)]

    def finish(self) -> Float32[np.ndarray, " s"]:
        self._work_off()
        return np.concatenate(self._pieces + [out.to_ndarray()[0] for out in self._to_clock.resample(None)])

    def repairs(self) -> list[dict[str, str]]:
        made = []
        if self.gap_s:
            made.append(repair("audio_gap", f"{self.gap_s:.3f} s"))
        if self.twice_s:
            made.append(repair("audio_overlap", f"{self.twice_s:.3f} s"))
        if self.channels > 1:
            made.append(repair("downmix", f"{self.channels} channels"))
        if self.rate != SAMPLE_RATE:
            made.append(repair("sample_rate", f"{self.rate} Hz"))
        return made
