"""Audio of a source on the time axis of its video: mono, 16 kHz, sample 0 at the time stamp of the first frame.

Samples are placed by time stamps, so that audio and video stay synchronous: a stream that starts late is preceded by
silence, one that starts early is cut, and gaps are filled with silence.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float32

from avatar.data.preprocess.probe import open_source
from avatar.data.preprocess.reasons import Rejected, repair
from avatar.media.decode import MIN_DOWNMIX_ENERGY
from avatar.types import SAMPLE_RATE

FULL_SCALE = 0.999
MAX_GAP_S = 0.02  # deviation of time stamps that is not yet a gap or an overlap
AUDIO_FRAMES_PER_BLOCK = 64  # processed together
MIN_LEVEL_DB = -120.0  # the level of digital silence


@dataclass(frozen=True)
class SourceAudio:
    """The complete audio of a source, with sample 0 at the first video frame."""

    samples: Float32[np.ndarray, " s"]
    sha256: str | None  # of the 16-bit samples before alignment; None: no audio stream
    offset_s: float = 0.0  # of the first audio sample from the first video frame
    clipped: float = 0.0  # share of samples at full scale
    repairs: list[dict[str, str]] = field(default_factory=list)


def silent_audio(seconds: float) -> SourceAudio:
    """Silence for a source without an audio stream."""
    samples = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    return SourceAudio(samples, None, repairs=[repair("no_audio", f"{seconds:.2f} s of silence")])


def read_source_audio(path: Path, start_s: float) -> SourceAudio:
    """Read the first audio stream and align it with the video. It takes about 64 kB of memory per second.

    Args:
        start_s: time of the first video frame, in seconds of the file's clock.

    Raises:
        Rejected: corrupt, no_audio (a stream without samples), nonfinite, antiphase.
    """
    reader = _AudioReader()
    with open_source(path) as container:
        planar = av.AudioResampler(format="fltp")
        try:
            for decoded in container.decode(audio=0):
                for frame in planar.resample(decoded):
                    reader.push(frame)
        except ValueError as error:  # PyAV's, for a stream that changes its rate or channels
            raise Rejected("corrupt", f"the audio format changes ({error})") from None
    if reader.first_s is None or not reader.position:
        raise Rejected("no_audio", "an audio stream without samples")
    samples = reader.finish()
    if reader.mono_energy < MIN_DOWNMIX_ENERGY * reader.channel_energy:
        raise Rejected("antiphase", f"averaging keeps {reader.mono_energy / reader.channel_energy:.2%} of the sound")
    repairs = reader.repairs()
    offset = reader.first_s - start_s
    digest = hashlib.sha256(to_int16(samples).tobytes()).hexdigest()
    lead = round(offset * SAMPLE_RATE)
    if lead:
        repairs.append(repair("start_offset", f"audio starts {offset:+.3f} s from the start of the video"))
        samples = np.concatenate([np.zeros(lead, np.float32), samples]) if lead > 0 else samples[-lead:]
    return SourceAudio(samples, digest, offset, reader.at_full_scale / reader.count, repairs)


def level_db(samples: Float32[np.ndarray, "..."]) -> float:
    """Root mean square in dB of full scale, at least -120."""
    mean = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return max(10 * np.log10(mean), MIN_LEVEL_DB) if mean > 0 else MIN_LEVEL_DB


def to_int16(samples: Float32[np.ndarray, " s"]) -> np.ndarray:
    """Little-endian 16-bit PCM of samples in [-1, 1]."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2")


class _AudioReader:
    """Averages channels, fills gaps, resamples and collects statistics, in blocks of many short audio frames."""

    def __init__(self):
        self.first_s: float | None = None
        self.rate = self.channels = self.position = self.count = self.at_full_scale = 0
        self.channel_energy = self.mono_energy = self.gap_s = self.overlap_s = 0.0
        self._resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
        self._pending: list[np.ndarray] = []  # consecutive audio frames, `c s`
        self._resampled: list[np.ndarray] = []

    def push(self, frame: av.AudioFrame) -> None:
        channels = frame.to_ndarray()
        time = frame.time
        if self.first_s is None:
            self.first_s, self.rate, self.channels = time or 0.0, frame.sample_rate, len(channels)
        expected = self.position if time is None else round((time - self.first_s) * self.rate)
        if expected - self.position > MAX_GAP_S * self.rate:
            self.gap_s += (expected - self.position) / self.rate
            self._flush()
            self._resample(np.zeros(expected - self.position, np.float32))
            self.position = expected
        elif self.position - expected > MAX_GAP_S * self.rate:  # two packets for the same time: keep the first
            self.overlap_s += (self.position - expected) / self.rate
            channels = channels[:, self.position - expected :]
        self._pending.append(channels)
        self.position += channels.shape[1]
        if len(self._pending) == AUDIO_FRAMES_PER_BLOCK:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        channels = np.concatenate(self._pending, axis=1)
        self._pending.clear()
        finite = np.isfinite(channels)
        if not finite.all():
            at = self.position - channels.shape[1] + int(finite.min(axis=0).argmin())
            raise Rejected("nonfinite", f"{at / self.rate:.2f} s into the audio")
        mono = channels.mean(axis=0)
        self.count += channels.size
        self.at_full_scale += int((np.abs(channels) >= FULL_SCALE).sum())
        self.channel_energy += float(np.square(channels, dtype=np.float64).mean(axis=0).sum())
        self.mono_energy += float(np.square(mono, dtype=np.float64).sum())
        if len(mono):
            self._resample(mono)

    def _resample(self, mono: np.ndarray) -> None:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono)[None], format="fltp", layout="mono")
        frame.sample_rate = self.rate
        self._resampled += [out.to_ndarray()[0] for out in self._resampler.resample(frame)]

    def finish(self) -> Float32[np.ndarray, " s"]:
        self._flush()
        return np.concatenate(self._resampled + [out.to_ndarray()[0] for out in self._resampler.resample(None)])

    def repairs(self) -> list[dict[str, str]]:
        found = []
        if self.gap_s:
            found.append(repair("audio_gap", f"{self.gap_s:.3f} s"))
        if self.overlap_s:
            found.append(repair("audio_overlap", f"{self.overlap_s:.3f} s"))
        if self.channels > 1:
            found.append(repair("downmix", f"{self.channels} channels"))
        if self.rate != SAMPLE_RATE:
            found.append(repair("sample_rate", f"{self.rate} Hz"))
        return found
