"""Speech synthesis with exact phoneme times, by two backends.

    espeak     eSpeak NG in a separate process; the optional extra `speech`
    formant    the formant synthesiser of this package

Both name phonemes by eSpeak's English mnemonics, without stress marks. A gap between two phonemes is silence. Samples
are 16-bit values scaled to [-1, 1], so that a cached utterance is equal to a new one.
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
MAX_RATE = 350  # words per minute; from 450 on, eSpeak's phoneme times are wrong
VERSION = 1  # of the processing in this module; a part of the cache's keys


@dataclass(frozen=True)
class Voice:
    """A voice. Raises UserError for a rate or a pitch outside its range."""

    name: str = "en-us"  # of eSpeak, `language+variant`
    rate: int = 175  # words per minute, 80 to 350
    pitch: int = 50  # 0 to 99
    range: int = 50  # of the pitch, 0 to 99

    def __post_init__(self):
        if not 80 <= self.rate <= MAX_RATE:
            raise UserError(
                f"got a voice of {self.rate} words per minute; expected 80 to {MAX_RATE}, for exact phoneme times: "
                "choose another rate"
            )
        if not (0 <= self.pitch <= 99 and 0 <= self.range <= 99):
            raise UserError(f"got pitch={self.pitch}, range={self.range}; expected 0 to 99: change them")


@dataclass(frozen=True)
class Phoneme:
    """A phoneme from `start_s` to `end_s` seconds; a stop consonant starts with its closure, not with its burst."""

    symbol: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Utterance:
    """A spoken text: samples at 16 kHz in [-1, 1] and its phonemes in order."""

    samples: Float[np.ndarray, " n"]
    phonemes: tuple[Phoneme, ...]


def best_backend() -> str:
    """The best installed backend: `espeak`, else `formant`."""
    return "espeak" if importlib.util.find_spec("espeakng_loader") and hasattr(os, "fork") else "formant"


def synthesize(text: str, voice: Voice, cache: Path | None = None, backend: str | None = None) -> Utterance:
    """Synthesize a text, or read it from the cache; a deterministic function of its arguments.

    Args:
        text: English, with at least one letter.
        voice: of the speaker.
        cache: folder of utterances; None: no cache.
        backend: one of BACKENDS; None: the best installed one.

    Raises:
        UserError: a text without letters, an unknown or missing backend, an unknown voice, or a damaged cache file.
    """
    backend = backend or best_backend()
    if not any(c.isalpha() for c in text):
        raise UserError(f"got the text {text!r}, which has no letters; expected at least one word: add one")
    if backend not in BACKENDS:
        raise UserError(f"got the speech backend {backend!r}; expected one of {', '.join(BACKENDS)}: choose another")
    if cache is None:
        return _utterance(*_synthesize_pcm(text, voice, backend))
    path = Path(cache) / f"{_cache_key(text, voice, backend)}.npz"
    if not path.exists():
        _write_cache(path, *_synthesize_pcm(text, voice, backend))
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return _utterance(stored["pcm"], stored["symbols"], stored["times"])
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(
            f"got {path}, which can't be read ({error}); expected a cached utterance: delete it and run again"
        ) from error


def _utterance(pcm: Int16[np.ndarray, " n"], symbols: np.ndarray, times: Float[np.ndarray, "p 2"]) -> Utterance:
    phonemes = (Phoneme(str(s), float(a), float(b)) for s, (a, b) in zip(symbols, times, strict=True))
    return Utterance(pcm.astype(np.float32) / 32768, tuple(phonemes))


def _synthesize_pcm(text: str, voice: Voice, backend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Synthesize 16-bit samples at 16 kHz, the phonemes' symbols, and their times in seconds."""
    samples, phonemes = (_synthesize_espeak if backend == "espeak" else _synthesize_formant)(text, voice)
    pcm = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
    symbols = np.array([p.symbol for p in phonemes], dtype="U8")
    return pcm, symbols, np.array([(p.start_s, p.end_s) for p in phonemes], dtype=np.float64).reshape(-1, 2)


def _synthesize_formant(text: str, voice: Voice) -> tuple[Float[np.ndarray, " n"], list[Phoneme]]:
    # Written out: with a repr, a rename of the class would change the audio.
    named = f"name={voice.name!r}, rate={voice.rate!r}, pitch={voice.pitch!r}, range={voice.range!r}"
    seed = int.from_bytes(hashlib.sha256(f"({text!r}, Voice({named}))".encode()).digest()[:8])
    samples, timed = formant.synthesize(text, voice.rate, voice.pitch, voice.range, seed)
    return samples, [Phoneme(*entry) for entry in timed]


def _synthesize_espeak(text: str, voice: Voice) -> tuple[Float[np.ndarray, " n"], list[Phoneme]]:
    if not importlib.util.find_spec("espeakng_loader"):
        raise UserError(
            "got backend='espeak'; expected the package espeakng-loader: install the extra `speech` or pass "
            "backend='formant'"
        )
    request = {"text": text, "voice": voice.name, "rate": voice.rate, "pitch": voice.pitch, "range": voice.range}
    worker = _start_worker(os.getpid())
    assert worker.stdin and worker.stdout
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    worker.stdin.flush()
    line = worker.stdout.readline() or '{"error": "the eSpeak NG worker has ended; see its error output"}'
    response = json.loads(line)
    if "error" in response:
        raise UserError(response["error"])
    rate = response["rate"]
    samples = np.frombuffer(base64.b64decode(response["pcm"]), np.int16).astype(np.float32) / 32768
    phonemes = _with_closures(_phonemes(response["phonemes"], len(samples), rate), samples, rate)
    factor = gcd(SAMPLE_RATE, rate)
    up, down = SAMPLE_RATE // factor, rate // factor
    return resample_poly(samples, up, down, window=_lowpass(max(up, down))), phonemes


@functools.cache
def _lowpass(rate: int) -> Float[np.ndarray, " taps"]:
    """The filter of resample_poly at `rate` times the sampling rate, cached: scipy would design it for every call."""
    taps = np.sinc(np.arange(-10 * rate, 10 * rate + 1) / rate) * np.kaiser(20 * rate + 1, 5.0)
    return (taps / taps.sum()).astype(np.float32)


def _phonemes(events: list[list], length: int, rate: int) -> list[Phoneme]:
    """Phonemes from eSpeak's [mnemonic, first sample], without pauses and language marks; each ends at the next."""
    ends = [start for _, start in events[1:]] + [length]
    named = ((symbol.strip("',%=|"), start, end) for (symbol, start), end in zip(events, ends, strict=True))
    return [
        Phoneme(symbol, start / rate, end / rate)
        for symbol, start, end in named
        if symbol and not symbol.startswith(("_", "(")) and end > start
    ]


def _with_closures(phonemes: list[Phoneme], samples: Float[np.ndarray, " n"], rate: int) -> list[Phoneme]:
    """The phonemes with p, t and k extended to the start of their closures.

    eSpeak's event of a voiceless stop is its burst. The closure before it, about 50 ms of silence, is found in the
    audio and subtracted from the phoneme before, which keeps at least 20 ms.
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
        block = round(phoneme.start_s * rate / hop) - 2  # the burst may start one or two blocks before its event
        while block >= 0 and block * hop / rate >= earliest and silent[block]:
            block -= 1
        start = max((block + 1) * hop / rate, earliest)
        if start < phoneme.start_s - 0.01:
            shifted[i] = Phoneme(phoneme.symbol, start, phoneme.end_s)
            if adjacent:
                shifted[i - 1] = Phoneme(before.symbol, shifted[i - 1].start_s, start)
    return shifted


@functools.lru_cache(maxsize=1)
def _start_worker(pid: int) -> subprocess.Popen:
    """Start the eSpeak server of this process, once; a forked process has another `pid` and starts its own server."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "avatar.puppet.espeak_worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
    atexit.register(_stop_worker, worker)
    return worker


def _stop_worker(worker: subprocess.Popen) -> None:
    """Stop the server by the end of its input."""
    assert worker.stdin and worker.stdout
    worker.stdin.close()
    worker.wait()
    worker.stdout.close()


def _cache_key(text: str, voice: Voice, backend: str) -> str:
    version = importlib.metadata.version("espeakng_loader") if backend == "espeak" else formant.VERSION
    return hashlib.sha256(json.dumps([text, astuple(voice), backend, version, VERSION]).encode()).hexdigest()


def _write_cache(path: Path, pcm: np.ndarray, symbols: np.ndarray, times: np.ndarray) -> None:
    """Write an utterance atomically, since other processes may read the cache at the same time."""
    create_folder(path.parent)
    with writing(path), tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, pcm=pcm, symbols=symbols, times=times)
    os.replace(file.name, path)
