"""Clips: determinism, disjoint splits, and labels that agree with audio and motion."""

import functools
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from avatar.puppet import sentences
from avatar.puppet.clip import identity_seed, make_clip
from avatar.puppet.identity import Identity
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel
from avatar.puppet.visemes import mouth_targets
from avatar.types import EMOTIONS, GESTURES, REGIONS, SAMPLES_PER_FRAME, STATES

FRAMES = 150


@functools.cache
def clip_of(seed: int, schedule: str, split: str):
    return make_clip(seed, split, FRAMES, schedule, backend="formant")


def clips(count: int, schedule: str = "mixed", split: str = "train") -> list:
    return [clip_of(seed, schedule, split) for seed in range(count)]


def digest(backend: str | None = "formant") -> str:
    """Hash of the content of a clip, including its pixels."""
    clip = make_clip(3, "train", 40, backend=backend)
    parts = (clip.own, clip.other, clip.states, clip.state, clip.frames(64), clip.regions(64))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + clip.caption.encode()).hexdigest()


def test_a_clip_is_the_same_in_another_process():
    program = "from tests.puppet.test_clip import digest; print(digest(), digest(None))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [digest(), digest(None)]


def test_all_fields_cover_the_frames_of_a_clip():
    clip = make_clip(0, "dev", 33, backend="formant")
    assert clip.own.shape == clip.other.shape == (33 * SAMPLES_PER_FRAME,)
    assert clip.own.dtype == clip.other.dtype == clip.states.dtype == np.float32
    assert clip.states.shape == (33, len(CHANNELS))
    assert len(clip.state) == len(clip.emotion) == len(clip.intensity) == len(clip.gesture) == 33
    assert set(clip.gesture) == {GESTURES.index("none")}
    assert clip.frames(64, 30).shape == (3, 64, 64, 3) and clip.regions(64, 0, 2).shape == (len(REGIONS), 2, 64, 64)
    assert clip.key == "puppet-dev-mixed-0"


def test_splits_share_no_sentence_and_no_identity():
    rng = np.random.default_rng(0)
    drawn = {split: {sentences.draw(rng, split) for _ in range(300)} for split in sentences.SPLITS}
    seeds = {split: {identity_seed(n, split) for n in range(100)} for split in sentences.SPLITS}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not drawn[a] & drawn[b] and not seeds[a] & seeds[b]
    assert all(len(texts) > 290 for texts in drawn.values()), "sentences are rarely drawn twice"
    assert all(sentences.split_of(text) == split for split, texts in drawn.items() for text in texts)
    for split in sentences.SPLITS:
        assert clips(2, split=split)[0].identity.seed % 3 == sentences.SPLITS.index(split)
    palettes = {tuple(Identity.from_seed(seed).palette.values()) for some in seeds.values() for seed in some}
    assert len(palettes) == 300


def test_states_agree_with_the_voices():
    found = set()
    for clip in clips(12):
        for frame in range(FRAMES):
            own, other = (
                np.abs(track[frame * SAMPLES_PER_FRAME : (frame + 1) * SAMPLES_PER_FRAME]).max() > 0
                for track in (clip.own, clip.other)
            )
            found.add((STATES[clip.state[frame]], bool(own), bool(other)))
    assert {("speaking", True, False), ("listening", False, True), ("idle", False, False)} <= found
    allowed = {("speaking", False, False), ("listening", False, False)}  # pauses
    assert found <= allowed | {("speaking", True, False), ("listening", False, True), ("idle", False, False)}


def test_the_speaking_schedule_has_speech_only():
    for clip in clips(6, "speaking"):
        assert set(clip.state) == {STATES.index("speaking")}
        assert not clip.other.any()
        assert clip.states[:, channel("mouth_open")].std() > 0.1
    mixed = np.concatenate([clip.state for clip in clips(24)])
    assert 0.5 < (mixed == STATES.index("speaking")).mean() < 0.98


def test_mouth_audio_and_phonemes_are_synchronous():
    for clip in clips(6, "speaking"):
        opened = clip.states[:, channel("mouth_open")]
        inner = slice(5, FRAMES - 5)  # near its ends a clip lacks the audio and the phonemes outside
        again, _ = mouth_targets(clip.phonemes, clip.own, FRAMES)
        assert np.corrcoef(again[inner], opened[inner])[0, 1] > 0.97
        level = clip.own.reshape(FRAMES, -1).std(1)
        by_lag = [np.corrcoef(np.roll(level, lag)[inner], opened[inner])[0, 1] for lag in range(-4, 5)]
        assert 3 <= np.argmax(by_lag) <= 4 and max(by_lag) > 0.5, "synchronous, or with slightly early lips"


def test_mouths_are_closed_without_speech():
    for clip in clips(12):
        silent = clip.state != STATES.index("speaking")
        settled = silent & np.roll(silent, 3) & np.roll(silent, -3)
        settled[:3] = settled[-3:] = False
        if settled.any():
            assert clip.states[settled, channel("mouth_open")].max() < 0.02


def test_motion_is_smooth_and_in_range():
    for clip in clips(10):
        assert (clip.states >= LOW).all() and (clip.states <= HIGH).all()
        for name, step in (
            ("head_x", 0.004),
            ("head_y", 0.006),
            ("head_roll", 0.5),
            ("smile", 0.12),
            ("brow_raise", 0.2),
        ):
            assert np.abs(np.diff(clip.states[:, channel(name)])).max() < step, name
    blinks = [(np.diff((clip.states[:, channel("lid")] > 0.8).astype(int)) == 1).sum() for clip in clips(10)]
    assert 1 <= np.mean(blinks) <= 4, "in 6 s"


def test_emotions_change_the_face_and_the_caption():
    faces = {}
    for clip in clips(24):
        assert (clip.emotion == clip.emotion[0]).all() and 0.5 <= clip.intensity.min() <= clip.intensity.max() <= 1
        faces.setdefault(EMOTIONS[clip.emotion[0]], []).append(clip)
    mean = {e: np.mean([c.states.mean(0) for c in some], axis=0) for e, some in faces.items()}
    assert mean["happy"][channel("smile")] > 0.3 > -0.2 > mean["sad"][channel("smile")]
    assert mean["angry"][channel("brow_tilt")] > 0.3 > -0.3 > mean["sad"][channel("brow_tilt")]
    assert mean["surprised"][channel("brow_raise")] > 0.3 > -0.2 > mean["angry"][channel("brow_raise")]
    for emotion, some in faces.items():
        for clip in some:
            word = "calm" if emotion == "neutral" else emotion
            assert f" {word} {clip.identity.description} is {STATES[clip.state[0]]}" in clip.caption


def test_unknown_splits_and_schedules_and_empty_clips_are_rejected():
    with pytest.raises(ValueError, match="the split 'val'; expected one of train"):
        make_clip(0, "val", 10)
    with pytest.raises(ValueError, match="the split 'val'; expected one of train"):
        sentences.draw(np.random.default_rng(0), "val")
    with pytest.raises(ValueError, match="the schedule 'singing'; expected"):
        make_clip(0, "train", 10, "singing")
    with pytest.raises(ValueError, match="frames=0"):
        make_clip(0, "train", 0)
