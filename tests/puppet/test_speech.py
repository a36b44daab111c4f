"""Speech synthesis: determinism, phoneme times, the cache, and the mouth trajectories from phonemes."""

import sys

import numpy as np
import pytest

from avatar.puppet import speech
from avatar.puppet.speech import Phoneme, Voice, synthesize
from avatar.puppet.visemes import mouth_targets
from avatar.types import SAMPLE_RATE

TEXT = "Peter hid the map, but the big puppy happily barked. Maybe Bob will come by."
needs_espeak = pytest.mark.skipif(speech.best_backend() != "espeak", reason="the extra `speech` is not installed")
backends = pytest.mark.parametrize("backend", [pytest.param("espeak", marks=needs_espeak), "formant"])


@backends
def test_utterances_are_deterministic_and_contain_their_phonemes(backend):
    first, second = (synthesize(TEXT, Voice(), backend=backend) for _ in range(2))
    np.testing.assert_array_equal(first.samples, second.samples)
    assert first.phonemes == second.phonemes
    assert np.abs(first.samples).max() <= 1 and first.samples.std() > 0.03
    edges = [time for p in first.phonemes for time in (p.start_s, p.end_s)]
    assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] <= duration(first)
    assert {"p", "m", "b", "h"} <= {p.symbol for p in first.phonemes}


@backends
def test_audio_is_loud_in_vowels_and_silent_in_closures(backend):
    spoken = synthesize(TEXT, Voice(), backend=backend)
    vowels = [level(spoken, p.start_s, p.end_s) for p in spoken.phonemes if p.symbol[0] in "aAEIiOV"]
    closures = [level(spoken, p.start_s + 0.01, p.start_s + 0.03) for p in spoken.phonemes if p.symbol in "ptk"]
    assert len(closures) >= 6
    assert np.median(closures) < 0.05 * np.median(vowels)


@backends
def test_lips_close_for_p_b_and_m_and_open_for_vowels(backend):
    spoken = synthesize(TEXT, Voice(rate=200), backend=backend)
    opened, wide = mouth_targets(spoken.phonemes, spoken.samples, int(duration(spoken) * 25))
    for p in spoken.phonemes:
        if p.symbol in "pbm":
            first, last = int(p.start_s * 25 - 1), int(p.end_s * 25)
            assert opened[max(first, 0) : last + 1].min() < 0.01, p
    assert opened.max() > 0.7
    assert wide.min() < -0.1 and wide.max() > 0.4


@backends
def test_the_mouth_is_closed_in_silence(backend):
    spoken = synthesize(TEXT, Voice(), backend=backend)
    last = spoken.phonemes[-1].end_s
    opened, wide = mouth_targets(spoken.phonemes, np.pad(spoken.samples, (0, SAMPLE_RATE)), int(25 * (last + 1)))
    assert opened[int(25 * (last + 0.15)) :].max() < 0.01
    assert np.abs(wide[int(25 * (last + 0.15)) :]).max() < 0.02


def test_a_diphthong_moves_from_one_vowel_to_another():
    samples = np.full(SAMPLE_RATE, 0.1, np.float32)
    _, wide = mouth_targets([Phoneme("aU", 0.3, 0.7)], samples, 25)
    assert wide[9] > 0 and wide[15] < -0.5


@backends
def test_a_cached_utterance_is_equal_to_a_new_one(backend, tmp_path):
    new = synthesize(TEXT, Voice(), backend=backend)
    stored, again = (synthesize(TEXT, Voice(), tmp_path, backend) for _ in range(2))
    other = synthesize(TEXT, Voice(rate=140), tmp_path, backend)
    assert len(list(tmp_path.iterdir())) == 2, "one file per text and voice, and no temporary file"
    for cached in (stored, again):
        np.testing.assert_array_equal(cached.samples, new.samples)
        assert cached.phonemes == new.phonemes
    assert duration(other) > duration(new)


def test_the_formant_synthesiser_replaces_a_missing_espeak(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    assert speech.best_backend() == "formant"
    np.testing.assert_array_equal(
        synthesize(TEXT, Voice()).samples, synthesize(TEXT, Voice(), backend="formant").samples
    )
    with pytest.raises(ValueError, match="install the extra"):
        synthesize(TEXT, Voice(), backend="espeak")


@needs_espeak
def test_an_unknown_voice_is_rejected_and_the_next_request_succeeds():
    with pytest.raises(ValueError, match="the voice 'nobody'; expected"):
        synthesize(TEXT, Voice("nobody"), backend="espeak")
    assert synthesize("Hello.", Voice(), backend="espeak").phonemes[0].symbol == "h"


def test_invalid_requests_and_damaged_files_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"351 words per minute; expected 80 to 350"):
        Voice(rate=351)
    with pytest.raises(ValueError, match="pitch=120"):
        Voice(pitch=120)
    with pytest.raises(ValueError, match="no letters; expected"):
        synthesize(" 7 ", Voice(), backend="formant")
    with pytest.raises(ValueError, match="the speech backend 'siri'; expected"):
        synthesize(TEXT, Voice(), backend="siri")
    synthesize(TEXT, Voice(), tmp_path, "formant")
    stored = next(tmp_path.iterdir())
    stored.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"expected a cached utterance: delete it"):
        synthesize(TEXT, Voice(), tmp_path, "formant")


def duration(spoken: speech.Utterance) -> float:
    return len(spoken.samples) / SAMPLE_RATE


def level(spoken: speech.Utterance, start_s: float, end_s: float) -> float:
    """Root mean square of the audio in an interval."""
    return float(spoken.samples[int(start_s * SAMPLE_RATE) : int(end_s * SAMPLE_RATE)].std())
