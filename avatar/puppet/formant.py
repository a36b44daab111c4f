"""Formant synthesiser: text → phonemes by letter-to-sound rules → audio, with exact phoneme times.

It replaces eSpeak NG on machines without it, and in tests. Its phonemes are easy to distinguish for a model, but do not
sound natural. Each has four formants, a loudness, and shares of voice and noise, which change over 30 ms between
phonemes. The source (a pulse train of falling pitch, and white noise) is filtered with the formants' frequency response
in windows of 16 ms, by overlap-add.

Phonemes have eSpeak's English mnemonics. All functions are deterministic.
"""

import re

import numpy as np
from jaxtyping import Complex, Float

from avatar.types import SAMPLE_RATE

VERSION = 1
HOP = 128  # samples, 8 ms
WINDOW = 256  # samples, 16 ms
FFT = 512  # a window and its impulse response
PAUSE_S = {",": 0.15, ";": 0.2, ":": 0.2, ".": 0.3, "!": 0.3, "?": 0.3}

# symbol → formants (Hz), loudness, voice, noise, duration (ms); a diphthong is two vowels
PHONEMES = {
    "i:": ((280, 2250, 2900), 0.75, 1, 0, 110),
    "I": ((400, 1950, 2550), 0.8, 1, 0, 75),
    "E": ((560, 1800, 2480), 0.9, 1, 0, 95),
    "a": ((720, 1700, 2450), 1.0, 1, 0, 115),
    "A:": ((750, 1150, 2500), 1.0, 1, 0, 130),
    "V": ((640, 1250, 2550), 0.95, 1, 0, 80),
    "O:": ((560, 860, 2500), 0.95, 1, 0, 125),
    "U": ((430, 1050, 2300), 0.8, 1, 0, 75),
    "u:": ((310, 850, 2250), 0.7, 1, 0, 110),
    "3:": ((470, 1330, 1700), 0.85, 1, 0, 115),
    "@": ((500, 1450, 2500), 0.75, 1, 0, 55),
    "w": ((290, 650, 2200), 0.5, 1, 0, 60),
    "j": ((280, 2200, 3000), 0.5, 1, 0, 55),
    "r": ((330, 1100, 1500), 0.5, 1, 0, 60),
    "l": ((350, 1200, 2900), 0.55, 1, 0, 60),
    "m": ((240, 1100, 2200), 0.35, 1, 0, 70),
    "n": ((240, 1600, 2600), 0.35, 1, 0, 60),
    "N": ((240, 2000, 2700), 0.35, 1, 0, 65),
    "v": ((250, 1200, 2300), 0.25, 1, 0.3, 55),
    "D": ((270, 1400, 2600), 0.25, 1, 0.2, 45),
    "z": ((250, 4500, 6000), 0.25, 0.6, 0.7, 75),
    "Z": ((250, 2400, 3300), 0.25, 0.6, 0.7, 75),
    "f": ((1200, 3500, 7000), 0.12, 0, 1, 85),
    "T": ((1400, 4000, 7000), 0.1, 0, 1, 80),
    "s": ((4600, 5800, 7000), 0.3, 0, 1, 95),
    "S": ((2300, 3100, 5000), 0.3, 0, 1, 95),
    "h": ((600, 1500, 2500), 0.15, 0, 1, 55),
    "b": ((250, 900, 2200), 0.12, 1, 0, 65),
    "d": ((250, 1700, 2700), 0.12, 1, 0, 60),
    "g": ((250, 1900, 2500), 0.12, 1, 0, 65),
    "p": ((500, 900, 2200), 0.3, 0, 1, 80),
    "t": ((500, 3800, 5000), 0.3, 0, 1, 75),
    "k": ((500, 1900, 2600), 0.3, 0, 1, 80),
}
CLOSURE_S = 0.05  # silence at the start of p, t and k, before the burst
VOWELS = frozenset(list(PHONEMES)[:11])

# pattern → phonemes; the first pattern that matches at a position of a word is used. None: the letter is its phoneme.
RULES = [
    (r"tion", "S @ n"), (r"sion", "Z @ n"), (r"ture\b", "t S @"), (r"ough", "O:"), (r"augh", "O:"), (r"eigh", "E I"),
    (r"igh", "a I"), (r"tch", "t S"), (r"the\b", "D @"), (r"sh", "S"), (r"ch", "t S"), (r"ph", "f"), (r"wh", "w"),
    (r"th(?=[aeiou])", "D"), (r"th", "T"), (r"ng", "N"), (r"ck", "k"), (r"qu", "k w"), (r"x", "k s"), (r"kn", "n"),
    (r"wr", "r"), (r"ee", "i:"), (r"ea", "i:"), (r"oo", "u:"), (r"ou", "a U"), (r"ow\b", "@ U"), (r"ow", "a U"),
    (r"oa", "@ U"), (r"oi", "O: I"), (r"oy", "O: I"), (r"ai", "E I"), (r"ay", "E I"), (r"au", "O:"), (r"aw", "O:"),
    (r"ew", "j u:"), (r"ie\b", "i:"), (r"ar", "A: r"), (r"or", "O: r"), (r"er\b", "@ r"), (r"[eiu]r", "3: r"),
    (r"all", "O: l"), (r"a(?=[bcdfgklmnprstvz]e\b)", "E I"), (r"i(?=[bcdfgklmnprstvz]e\b)", "a I"),
    (r"o(?=[bcdfgklmnprstvz]e\b)", "@ U"), (r"u(?=[bcdfgklmnprstvz]e\b)", "u:"), (r"(?<=[a-z][a-z])e\b", ""),
    (r"ed\b", "d"), (r"es\b", "z"), (r"\by", "j"), (r"y\b", "i:"), (r"y", "I"), (r"c(?=[eiy])", "s"),
    (r"g(?=[ey])", "d Z"), (r"([bcdfgklmnprstz])\1", None), (r"a", "a"), (r"e\b", "i:"), (r"e", "E"), (r"i", "I"),
    (r"o\b", "@ U"), (r"o", "A:"), (r"u", "V"), (r"j", "d Z"), (r"c", "k"), (r"q", "k"),
    (r"'", ""), (r"([bdfghklmnprstvwz])", None),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), phonemes) for pattern, phonemes in RULES]


def pronounce(word: str) -> list[str]:
    """Phonemes of one lower-case word by RULES; letters without a rule are skipped."""
    found, position = [], 0
    while position < len(word):
        for pattern, phonemes in _COMPILED:
            if match := pattern.match(word, position):
                if phonemes is None:  # a double letter is one phoneme
                    phonemes = {"c": "k"}.get(match[1], match[1])
                found += phonemes.split()
                position = match.end()
                break
        else:
            position += 1
    return found


def synthesize(
    text: str, rate: int, pitch: int, range: int, seed: int
) -> tuple[Float[np.ndarray, " n"], list[tuple[str, float, float]]]:
    """Synthesize a text.

    Args:
        text: English.
        rate: words per minute.
        pitch, range: of the voice, 0 to 99.
        seed: of accents and noise.

    Returns:
        Samples at 16 kHz in [-1, 1], and phonemes as (symbol, start, end) in seconds.
    """
    timed, pauses, end = [], [], 0.02
    for token in re.findall(r"[a-z']+|[,;:.!?]", text.lower()):
        if token in PAUSE_S:
            pauses.append(end)
            end += PAUSE_S[token]
            continue
        for symbol in pronounce(token):
            duration = PHONEMES[symbol][4] / 1000 * 175 / rate
            if symbol in "ptk":
                duration = max(duration, CLOSURE_S + 0.02)
            timed.append((symbol, end, end + duration))
            end += duration
    samples = round((end + 0.05) * SAMPLE_RATE)
    rng = np.random.default_rng(seed)
    return _audio(timed, samples, _fundamental(timed, pauses, samples, pitch, range, rng), rng), timed


def _fundamental(
    timed, pauses, samples: int, pitch: int, range: int, rng: np.random.Generator
) -> Float[np.ndarray, " n"]:
    """Fundamental frequency in Hz per sample: it falls over each phrase, with random accents on vowels."""
    time = np.arange(samples) / SAMPLE_RATE
    starts = np.array([0.0, *pauses])
    phrase = np.searchsorted(starts, time, side="right") - 1
    ends = np.append(starts[1:], samples / SAMPLE_RATE)
    fall = 0.5 - (time - starts[phrase]) / np.maximum(ends - starts, 0.1)[phrase]
    vowels = [(start + stop) / 2 for symbol, start, stop in timed if symbol in VOWELS]
    accents = np.interp(time, vowels, rng.uniform(-1, 1, len(vowels))) if vowels else 0
    return 80 * 2 ** (pitch / 55) * 2 ** (range / 100 * (0.5 * fall + 0.35 * accents))


def _audio(timed, samples: int, pitch: Float[np.ndarray, " n"], rng: np.random.Generator) -> Float[np.ndarray, " n"]:
    """Voice and noise, filtered window by window and scaled to the level of eSpeak's output."""
    hops = samples // HOP + 1
    controls = _controls(timed, hops)
    pulses = np.diff(np.floor(np.cumsum(pitch) / SAMPLE_RATE), prepend=0) * np.sqrt(SAMPLE_RATE / pitch)
    source = np.stack([pulses - pulses.mean(), 0.35 * rng.standard_normal(samples)])
    source = np.pad(source, ((0, 0), (WINDOW // 2, WINDOW)))
    windows = np.lib.stride_tricks.sliding_window_view(source, WINDOW, axis=1)[:, : hops * HOP : HOP]
    mixed = (controls[:, 3:4] * windows[0] + controls[:, 4:5] * windows[1]) * np.hanning(WINDOW + 1)[:WINDOW]
    shaped = np.fft.irfft(np.fft.rfft(mixed, FFT) * _frequency_response(controls[:, :3]))
    out = np.zeros((hops + FFT // HOP + 1) * HOP)
    for hop, piece in enumerate(shaped):
        out[hop * HOP : hop * HOP + FFT] += piece
    out = out[WINDOW // 2 : WINDOW // 2 + samples]
    level = out[np.abs(out) > 0.05 * np.abs(out).max()].std()
    return np.tanh(0.12 * out / level).astype(np.float32)


def _controls(timed, hops: int) -> Float[np.ndarray, "hops 5"]:
    """Formants and source gains per hop, smoothed over phoneme boundaries; silent between phonemes and in closures."""
    time = np.arange(hops) * HOP / SAMPLE_RATE
    formants = np.tile(np.array(PHONEMES["@"][0], float), (hops, 1))
    gains = np.zeros((hops, 2))
    for symbol, start, end in timed:
        frequencies, loudness, voice, noise, _ = PHONEMES[symbol]
        formants[time >= start] = frequencies
        opened = start + CLOSURE_S if symbol in "ptk" else start
        gains[(time >= opened) & (time < end)] = loudness * voice, loudness * noise
        gains[(time >= start) & (time < opened)] = 0
    gains[time >= (timed[-1][2] if timed else 0)] = 0
    return np.hstack([_moving_average(formants, 5), _moving_average(gains, 3)])


def _moving_average(values: Float[np.ndarray, "hops c"], width: int) -> Float[np.ndarray, "hops c"]:
    """Moving average over `width` hops."""
    padded = np.pad(values, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).mean(-1)


def _frequency_response(formants: Float[np.ndarray, "hops 3"]) -> Complex[np.ndarray, "hops bins"]:
    """Frequency response of a cascade of causal resonators with unit gain at 0 Hz; the fourth is at 3.6 kHz."""
    hertz = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1, dtype=np.float32)
    response = np.broadcast_to((1 / (1 + hertz / 1000)).astype(np.complex64), (len(formants), len(hertz)))
    for frequency in (*formants.T.astype(np.float32), np.full(len(formants), 3600, np.float32)):
        square, width = (frequency**2)[:, None], (60 + 0.06 * frequency)[:, None]
        response = response * (square / (square - hertz**2 + 1j * width * hertz))
    return response
