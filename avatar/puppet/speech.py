"""Text → sound with exact phoneme times.

Two backends, one answer: `espeak` (eSpeak NG in a process of its own; the optional extra `speech`) and `formant`
(our own small synthesiser, always there). Both name phonemes by eSpeak's English mnemonics, without stress marks.
Between two phonemes may lie a gap: silence. Samples are 16-bit values scaled to [-1, 1], so that a cached utterance
equals a fresh one.
"""

import atexit
import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import astuple, dataclass
from math import gcd
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16
from scipy.signal import resample_poly

from avatar.errors import UserError
from avatar.files import create_folder, writing
from avatar.puppet import formant
from avatar.types import SAMPLE_RATE

BACKENDS = ("espeak", "formant")
FASTEST = 350  # words a minute; from 450 on, eSpeak's events drift from its sound
VERSION = 1  # of what this module makes of a backend's output; part of the cache's key


@dataclass(frozen=True)
class Voice:
    """Who speaks: an eSpeak voice (`language+variant`), words a minute, pitch and its range (0 to 99)."""

    name: str = "en-us"
    rate: int = 175
    pitch: int = 50
    range: int = 50

    def __post_init__(self):
        if not 80 <= self.rate <= FASTEST:
            raise UserError(
                f"the voice speaks {self.rate} words a minute, but phoneme times are exact from 80 to {FASTEST} only; "
                "choose a rate in between"
            )
        if not (0 <= self.pitch <= 99 and 0 <= self.range <= 99):
            raise UserError(f"pitch {self.pitch} and range {self.range} must lie in 0 to 99; clamp them")


@dataclass(frozen=True)
class Phoneme:
    """A speech sound from `start_s` to `end_s` seconds; a stop's start is its closure's, not its burst's."""

    symbol: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Utterance:
    """A spoken text: samples at 16 kHz in [-1, 1] and its phonemes in order."""

    samples: Float[np.ndarray, " n"]
    phonemes: tuple[Phoneme, ...]

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def available() -> str:
    """The best backend that is installed: `espeak`, else `formant`."""
    return "espeak" if importlib.util.find_spec("espeakng_loader") and hasattr(os, "fork") else "formant"


def synthesize(text: str, voice: Voice, cache: Path | None = None, backend: str | None = None) -> Utterance:
    """Speak a text, or take it from the cache: a deterministic function of its arguments.

    `backend` is one of BACKENDS, by default the best one installed. Raises UserError for an empty text, an unknown
    backend or an unknown voice.
    """
    backend = backend or available()
    if not any(c.isalpha() for c in text):
        raise UserError(f"the text {text!r} has no letter to speak; pass at least one word")
    if backend not in BACKENDS:
        raise UserError(f"unknown speech backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if cache is None:
        return _utterance(*_spoken(text, voice, backend))
    path = Path(cache) / f"{_key(text, voice, backend)}.npz"
    if not path.exists():
        _store(path, *_spoken(text, voice, backend))
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return _utterance(stored["pcm"], stored["symbols"], stored["times"])
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{path} is not a cached utterance ({error}); delete it and run again") from error


def _utterance(pcm: Int16[np.ndarray, " n"], symbols: np.ndarray, times: Float[np.ndarray, "p 2"]) -> Utterance:
    phonemes = (Phoneme(str(s), float(a), float(b)) for s, (a, b) in zip(symbols, times, strict=True))
    return Utterance(pcm.astype(np.float32) / 32768, tuple(phonemes))


def _spoken(text: str, voice: Voice, backend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """16-bit samples at 16 kHz, symbols, and their times in seconds."""
    samples, phonemes = _espeak(text, voice) if backend == "espeak" else _formant(text, voice)
    pcm = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
    symbols = np.array([p.symbol for p in phonemes], dtype="U8")
    return pcm, symbols, np.array([(p.start_s, p.end_s) for p in phonemes], dtype=np.float64).reshape(-1, 2)


def _formant(text: str, voice: Voice) -> tuple[Float[np.ndarray, " n"], list[Phoneme]]:
    seed = int.from_bytes(hashlib.sha256(repr((text, voice)).encode()).digest()[:8])
    samples, timed = formant.speak(text, voice.rate, voice.pitch, voice.range, seed)
    return samples, [Phoneme(*entry) for entry in timed]


def _espeak(text: str, voice: Voice) -> tuple[Float[np.ndarray, " n"], list[Phoneme]]:
    if not importlib.util.find_spec("espeakng_loader"):
        raise UserError("backend 'espeak' needs espeakng-loader; install the extra `speech` or pass backend='formant'")
    request = {"text": text, "voice": voice.name, "rate": voice.rate, "pitch": voice.pitch, "range": voice.range}
    worker = _worker(os.getpid())
    assert worker.stdin and worker.stdout
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    worker.stdin.flush()
    answer = json.loads(worker.stdout.readline() or '{"error": "the eSpeak NG worker has ended; see its error output"}')
    if "error" in answer:
        raise UserError(answer["error"])
    rate = answer["rate"]
    samples = np.frombuffer(base64.b64decode(answer["pcm"]), np.int16).astype(np.float32) / 32768
    phonemes = _with_closures(_clean(answer["phonemes"], len(samples), rate), samples, rate)
    factor = gcd(SAMPLE_RATE, rate)
    up, down = SAMPLE_RATE // factor, rate // factor
    return resample_poly(samples, up, down, window=_lowpass(max(up, down))), phonemes


@functools.cache
def _lowpass(rate: int) -> Float[np.ndarray, " taps"]:
    """The filter that resample_poly would design anew for every utterance, at `rate` times the rate of the samples."""
    taps = np.sinc(np.arange(-10 * rate, 10 * rate + 1) / rate) * np.kaiser(20 * rate + 1, 5.0)
    return (taps / taps.sum()).astype(np.float32)


def _clean(events: list[list], length: int, rate: int) -> list[Phoneme]:
    """Phonemes from [mnemonic, first sample], each up to the next event; pauses and language marks are left out."""
    ends = [start for _, start in events[1:]] + [length]
    named = ((symbol.strip("',%=|"), start, end) for (symbol, start), end in zip(events, ends, strict=True))
    return [
        Phoneme(symbol, start / rate, end / rate)
        for symbol, start, end in named
        if symbol and not symbol.startswith(("_", "(")) and end > start
    ]


def _with_closures(phonemes: list[Phoneme], samples: Float[np.ndarray, " n"], rate: int) -> list[Phoneme]:
    """The same phonemes, with every p, t and k begun at its closure.

    eSpeak's event of a voiceless stop is the burst. The closure before it, some 50 ms of silence, is looked for in the
    sound and taken from the phoneme that it was counted with, of which at least 20 ms remain.
    """
    hop = rate // 500  # 2 ms
    blocks = samples[: len(samples) // hop * hop].reshape(-1, hop)
    silent = np.abs(blocks).max(1) < 0.02 * np.abs(samples).max()
    shifted = list(phonemes)
    for i, phoneme in enumerate(phonemes):
        if phoneme.symbol[0] not in "ptk":
            continue
        before = phonemes[i - 1] if i else Phoneme("", 0.0, 0.0)
        adjacent = i > 0 and before.end_s == phoneme.start_s
        earliest = max(phoneme.start_s - 0.09, before.start_s + 0.02 if adjacent else before.end_s)
        block = round(phoneme.start_s * rate / hop) - 2  # the burst may reach a block or two ahead of its event
        while block >= 0 and block * hop / rate >= earliest and silent[block]:
            block -= 1
        start = max((block + 1) * hop / rate, earliest)
        if start < phoneme.start_s - 0.01:
            shifted[i] = Phoneme(phoneme.symbol, start, phoneme.end_s)
            if adjacent:
                shifted[i - 1] = Phoneme(before.symbol, shifted[i - 1].start_s, start)
    return shifted


@functools.lru_cache(maxsize=1)
def _worker(pid: int) -> subprocess.Popen:
    """The eSpeak server of this process; a forked process (another `pid`) starts one of its own."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "avatar.puppet.espeak_worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
    atexit.register(_end, worker)
    return worker


def _end(worker: subprocess.Popen) -> None:
    """Let the server come to its end: no more requests."""
    assert worker.stdin and worker.stdout
    worker.stdin.close()
    worker.wait()
    worker.stdout.close()


def _key(text: str, voice: Voice, backend: str) -> str:
    made_by = importlib.metadata.version("espeakng_loader") if backend == "espeak" else formant.VERSION
    return hashlib.sha256(json.dumps([text, astuple(voice), backend, made_by, VERSION]).encode()).hexdigest()


def _store(path: Path, pcm: np.ndarray, symbols: np.ndarray, times: np.ndarray) -> None:
    """Write under a temporary name, then rename: another process never sees half a file."""
    create_folder(path.parent)
    with writing(path), tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, pcm=pcm, symbols=symbols, times=times)
    os.replace(file.name, path)
