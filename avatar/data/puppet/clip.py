"""Clips of the puppet world: sound, states and labels, made from a seed.

`make_clip` is a deterministic function of its arguments. The splits share no sentence (see `sentences`) and no
identity: identity seeds count train, dev, test, train, dev, test, ... Frames are rendered on demand and never
stored.

The puppet speaks, listens (another voice in `heard`, its own silent) or idles (both silent). A clip is cut out of a
longer scene, so it may begin and end in mid-sentence.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from avatar.data.puppet import render, sentences
from avatar.data.puppet.identity import Identity
from avatar.data.puppet.motion import animate
from avatar.data.puppet.sentences import SPLITS
from avatar.data.puppet.speech import Phoneme, Voice, synthesize
from avatar.data.puppet.visemes import mouth_targets
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, SAMPLE_RATE, SAMPLES_PER_FRAME, STATES

SCHEDULES = ("mixed", "speaking")
MARGIN = 12  # frames of the scene before and after the clip, so that motion is under way at its ends
VOICES = ("en-us+m1", "en-us+m3", "en-us+m7", "en-us+f2", "en-us+f4", "en-gb-x-rp+m3", "en-gb-x-rp+f2", "en-gb-x-rp+f5")
# rate, pitch and range of the voice, relative to neutral
PROSODY = {
    "neutral": (1.0, 0, 0),
    "happy": (1.08, 8, 25),
    "sad": (0.85, -8, -25),
    "angry": (1.1, -2, 15),
    "surprised": (1.05, 12, 35),
}
MOODS = {
    "neutral": "calm",
    "happy": "happy",
    "sad": "sad",
    "angry": "angry",
    "surprised": "surprised",
}  # words of captions


@dataclass(frozen=True)
class Clip:
    """One clip of f frames and f·640 samples, with everything that is true of it."""

    key: str
    identity: Identity
    own: Float[np.ndarray, " n"]  # the puppet's voice, 16 kHz, in [-1, 1]
    heard: Float[np.ndarray, " n"]  # the voice that it listens to
    states: Float[np.ndarray, "f s"]  # rows of motion.CHANNELS
    state: Int[np.ndarray, " f"]  # index into types.STATES
    emotion: Int[np.ndarray, " f"]  # index into types.EMOTIONS
    intensity: Float[np.ndarray, " f"]  # of the emotion, in [0, 1]
    gesture: Int[np.ndarray, " f"]  # index into types.GESTURES
    caption: str
    phonemes: tuple[Phoneme, ...]  # of the own voice; times count from the clip's start and may lie beyond its ends

    def frames(self, size: int, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "f h w 3"]:
        """The rendered frames [start, stop), `size` pixels square."""
        return render.render(self.identity, self.states[start:stop], size)

    def mouth_region(self, size: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "f h w"]:
        """The share of each pixel that belongs to the surroundings of the mouth, in [0, 1]."""
        return render.mouth_region(self.identity, self.states[start:stop], size)


def make_clip(
    seed: int,
    split: str,
    frames: int,
    schedule: str = "mixed",
    identities: int = 10_000,
    backend: str | None = None,
    cache: Path | None = None,
) -> Clip:
    """The clip number `seed` of a split.

    `schedule` is "mixed" (mostly speaking, at times listening or idle) or "speaking" (nothing else, for lip-sync
    scores); `identities` is how many puppets the split has; `backend` and `cache` are those of `speech.synthesize`.
    Raises ValueError for an unknown split or schedule and for fewer than one frame or identity.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if frames < 1 or identities < 1 or seed < 0:
        raise ValueError(f"frames {frames}, identities {identities}, seed {seed}: pass 1 or more, 1 or more, 0 or more")
    rng = np.random.default_rng([seed, SPLITS.index(split), SCHEDULES.index(schedule)])
    identity = Identity.from_seed(identity_seed(int(rng.integers(identities)), split))
    emotion = str(rng.choice(list(PROSODY), p=(0.3, 0.2, 0.15, 0.15, 0.2)))
    scene = _Scene(frames + 2 * MARGIN, split, rng, backend, cache)
    scene.play(schedule, voice_of(identity.seed, emotion), voice_of(int(rng.integers(2**31)), "neutral"))
    state = np.array(scene.state)
    mouth = mouth_targets(scene.phonemes, scene.own, len(state))
    emotions = np.full(len(state), EMOTIONS.index(emotion))
    intensity = np.full(len(state), rng.uniform(0.5, 1), np.float32)
    motion = animate(*mouth, state, emotions, intensity, seed=int(rng.integers(2**31)))
    kept = slice(MARGIN, MARGIN + frames)
    heard_at = slice(MARGIN * SAMPLES_PER_FRAME, (MARGIN + frames) * SAMPLES_PER_FRAME)
    shift = MARGIN / FRAME_RATE
    return Clip(
        key=f"puppet-{split}-{schedule}-{seed}",
        identity=identity,
        own=scene.own[heard_at],
        heard=scene.heard[heard_at],
        states=motion[kept],
        state=state[kept],
        emotion=emotions[kept],
        intensity=intensity[kept],
        gesture=np.full(frames, GESTURES.index("none")),
        caption=caption(identity, emotion, state[kept]),
        phonemes=tuple(Phoneme(p.symbol, p.start_s - shift, p.end_s - shift) for p in scene.phonemes),
    )


def identity_seed(number: int, split: str) -> int:
    """The seed of the puppet `number` of a split; no two splits share one."""
    return number * len(SPLITS) + SPLITS.index(split)


def voice_of(seed: int, emotion: str) -> Voice:
    """The voice that belongs to an identity's seed, coloured by an emotion."""
    rng = np.random.default_rng([seed, 0x701CE])
    rate, pitch, reach = PROSODY[emotion]
    return Voice(
        name=str(rng.choice(VOICES)),
        rate=round(rng.uniform(145, 190) * rate),
        pitch=int(np.clip(rng.integers(30, 75) + pitch, 0, 99)),
        range=int(np.clip(rng.integers(40, 65) + reach, 0, 99)),
    )


def caption(identity: Identity, emotion: str, state: Int[np.ndarray, " f"]) -> str:
    """A sentence on who does what: "a happy orange cat is speaking and then listening"."""
    changes = np.flatnonzero(np.diff(state, prepend=-1))
    mood = MOODS[emotion]
    article = "an" if mood[0] in "aeiou" else "a"
    return f"{article} {mood} {identity.description} is {' and then '.join(STATES[state[i]] for i in changes[:3])}"


class _Scene:
    """A timeline under construction: two tracks of sound, the phonemes of the first, and a state per frame."""

    def __init__(self, frames: int, split: str, rng: np.random.Generator, backend: str | None, cache: Path | None):
        self.own, self.heard = np.zeros((2, frames * SAMPLES_PER_FRAME), np.float32)
        self.phonemes: list[Phoneme] = []
        self.state = [STATES.index("idle")] * frames
        self.frames, self.split, self.rng, self.backend, self.cache = frames, split, rng, backend, cache

    def play(self, schedule: str, own: Voice, other: Voice) -> None:
        """Fill the timeline with speaking, listening and idling."""
        frame = 0
        while frame < self.frames:
            chances = (1, 0, 0) if schedule == "speaking" else (0.78, 0.12, 0.1)
            state = str(self.rng.choice(("speaking", "listening", "idle"), p=chances))
            if state == "idle":
                end = frame + int(self.rng.uniform(0.8, 2.2) * FRAME_RATE)
            else:
                end = frame + self._say(frame, own if state == "speaking" else other, state)
            self.state[frame:end] = [STATES.index(state)] * (min(end, self.frames) - frame)
            frame = end

    def _say(self, frame: int, voice: Voice, state: str) -> int:
        """Put a sentence on a track, from `frame` on; returns how many frames it takes with the pause after it.

        The first one of a scene may have begun before it.
        """
        spoken = synthesize(sentences.draw(self.rng, self.split), voice, self.cache, self.backend)
        pause = self.rng.uniform(0.1, 0.4)
        late = int(self.rng.uniform(0, 0.6) * len(spoken.samples)) if frame == 0 else 0
        begin, samples = frame * SAMPLES_PER_FRAME, spoken.samples[late:]
        samples = samples[: len(self.own) - begin]
        track = self.own if state == "speaking" else self.heard
        track[begin : begin + len(samples)] = samples
        if state == "speaking":
            shift = (begin - late) / SAMPLE_RATE
            self.phonemes += [Phoneme(p.symbol, p.start_s + shift, p.end_s + shift) for p in spoken.phonemes]
        return int(np.ceil(((len(spoken.samples) - late) / SAMPLE_RATE + pause) * FRAME_RATE))
