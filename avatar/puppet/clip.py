"""Clips of the puppet world: audio, states and labels, generated from a seed.

`make_clip` is a deterministic function of its arguments. The splits share no sentence (see `sentences`) and no
identity: identity seeds belong to train, dev, test, train, dev, test, … in turn. Frames are rendered on demand and not
stored.

The puppet speaks, listens (only the other voice speaks) or is idle (both are silent). A clip is a part of a longer
scene, so it may begin and end within a sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from avatar.conditioning.transcripts import transcript
from avatar.errors import UserError
from avatar.puppet import captions, render, scene
from avatar.puppet.gestures import Event
from avatar.puppet.identity import Identity
from avatar.puppet.motion import Direction, animate
from avatar.puppet.scene import SCHEDULES, Scene, Timeline
from avatar.puppet.sentences import SPLITS
from avatar.puppet.setting import PORTRAIT, Setting
from avatar.puppet.speech import Phoneme, Voice
from avatar.puppet.visemes import mouth_targets
from avatar.types import EMOTIONS, FRAME_RATE, SAMPLES_PER_FRAME

MARGIN = 12  # frames of the scene before and after the clip, so that it begins and ends in motion
VOICES = ("en-us+m1", "en-us+m3", "en-us+m7", "en-us+f2", "en-us+f4", "en-gb-x-rp+m3", "en-gb-x-rp+f2", "en-gb-x-rp+f5")
# emotion → factor of the rate, offsets of pitch and range
PROSODY = {
    "neutral": (1.0, 0, 0),
    "happy": (1.08, 8, 25),
    "sad": (0.85, -8, -25),
    "angry": (1.1, -2, 15),
    "surprised": (1.05, 12, 35),
}
# Combinations that training clips never contain, although they contain both parts: they test whether a model
# generalises to new combinations. They apply to scenes with gestures or moods.
HELD_OUT = frozenset(
    {("angry", "rabbit"), ("sad", "fox"), ("happy", "alien"), ("surprised", "bear"), ("nod", "cat"), ("wave", "dog")}
)
CALM = Scene()


@dataclass(frozen=True)
class Acting:
    """What the puppet of a clip shows instead of what its scene draws; speech and all other draws stay the same.

    Args:
        emotion: one of PROSODY; the face's alone, since the voice keeps its prosody.
        intensity: of the emotion, in [0, 1]; None: as drawn.
        gestures: gestures, in frames of the clip.
        looks: first frames and ends of looks at the thing.
        silent: "listening" or "idle" in place of all states, without any voice; None: as drawn.
    """

    emotion: str
    intensity: float | None = None
    gestures: Sequence[Event] = ()
    looks: Sequence[tuple[int, int]] = ()
    silent: str | None = None


@dataclass(frozen=True)
class PuppetClip:
    """One clip of f frames and n = 640 f samples, with its true states and labels."""

    key: str
    identity: Identity
    own: Float[np.ndarray, " n"]  # voice of the puppet, 16 kHz, in [-1, 1]
    other: Float[np.ndarray, " n"]  # voice of the person that it listens to
    states: Float[np.ndarray, "f s"]  # rows of motion.CHANNELS
    state: Int[np.ndarray, " f"]  # index into types.STATES
    emotion: Int[np.ndarray, " f"]  # index into types.EMOTIONS
    intensity: Float[np.ndarray, " f"]  # of the emotion, in [0, 1]
    gesture: Int[np.ndarray, " f"]  # label, index into types.GESTURES
    doing: Int[np.ndarray, " f"]  # true gesture, index into types.GESTURES
    captions: tuple[str, ...]
    captioned: Int[np.ndarray, " f"]  # index into `captions`
    phonemes: tuple[Phoneme, ...]  # of the own voice; times from the clip's start on, some of them outside the clip
    setting: Setting = PORTRAIT

    @property
    def caption(self) -> str:
        """The caption of the first frame."""
        return self.captions[self.captioned[0]]

    def frames(self, size: int, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "f h w 3"]:
        """Render the frames [start, stop) of `size` × `size` pixels."""
        return render.render(self.identity, self.states[start:stop], size, self.setting)

    def regions(self, size: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "m f h w"]:
        """Masks of types.REGIONS in the frames [start, stop), in [0, 1]."""
        return render.regions(self.identity, self.states[start:stop], size, self.setting)


def make_clip(
    seed: int,
    split: str,
    frames: int,
    schedule: str = "mixed",
    identities: int = 10_000,
    backend: str | None = None,
    cache: Path | None = None,
    directed: Scene = CALM,
    acting: Acting | None = None,
) -> PuppetClip:
    """Generate a clip; a deterministic function of its arguments.

    Args:
        seed: number of the clip, at least 0.
        split: "train", "dev" or "test".
        frames: length, at least 1.
        schedule: "mixed" (mostly speaking, sometimes listening or idle) or "speaking" (only speaking, for lip-sync
            scores).
        identities: number of puppets in the split, at least 1.
        backend, cache: of `speech.synthesize`.
        directed: content of the scene.
        acting: replaces emotion and gestures of the scene, for counterfactual clips.

    Raises:
        UserError: an unknown split or schedule, or a number that is too small.
    """
    if split not in SPLITS:
        raise UserError(f"got the split {split!r}; expected one of {', '.join(SPLITS)}: choose another")
    if schedule not in SCHEDULES:
        raise UserError(f"got the schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}: choose another")
    if frames < 1 or identities < 1 or seed < 0:
        raise UserError(
            f"got frames={frames}, identities={identities}, seed={seed}; expected at least 1, 1 and 0: raise them"
        )
    key = [seed, SPLITS.index(split), SCHEDULES.index(schedule)]
    rng, scene_rng = np.random.default_rng(key), np.random.default_rng([*key, 0x5CE7E])
    label_rng, text_rng = np.random.default_rng([*key, 0x1ABE1]), np.random.default_rng([*key, 0x7EC7])
    identity = Identity.from_seed(identity_seed(int(rng.integers(identities)), split))
    emotion = str(rng.choice(list(PROSODY), p=(0.3, 0.2, 0.15, 0.15, 0.2)))
    free = scene_rng.random() < 0.5
    timeline = Timeline(frames + 2 * MARGIN, split, rng, backend, cache)
    voiced = str(label_rng.choice(list(PROSODY))) if label_rng.random() < directed.prosody else emotion
    own, other = voice_of(identity.seed, voiced), voice_of(int(rng.integers(2**31)), "neutral")
    timeline.play(schedule, own, other, directed.cues if free else 0.0)
    if acting is not None and acting.silent is not None:
        timeline.silence(acting.silent)
    mouth = mouth_targets(timeline.phonemes, timeline.own, timeline.frames)
    intensity = np.full(timeline.frames, rng.uniform(0.5, 1), np.float32)
    setting = directed.setting(scene_rng)
    emotions = _emotions(emotion, timeline.frames, directed, identity, split, scene_rng)
    events = _events(timeline, directed, setting, free, identity, split, scene_rng)
    commands = directed.looks_hz > 0 and setting.thing is not None and not free
    looks = scene.commanded_looks(timeline.frames, directed, text_rng) if commands else []
    if acting is not None:
        emotions = np.full(timeline.frames, EMOTIONS.index(acting.emotion))
        intensity = intensity if acting.intensity is None else np.full_like(intensity, acting.intensity)
        events = [replace(event, start=event.start + MARGIN, stop=event.stop + MARGIN) for event in acting.gestures]
        looks = [(start + MARGIN, stop + MARGIN) for start, stop in acting.looks]
        free = False
    direction = Direction(
        events=events,
        target=None if setting.thing is None else setting.thing.gaze,
        looks=looks,
        liveliness=1.0 if directed.lively == 0 else 1.5 if scene_rng.random() < directed.lively else 0.65,
        other_pauses=scene.reactions(timeline, scene_rng),
    )
    motion = animate(*mouth, timeline.state, emotions, intensity, int(rng.integers(2**31)), direction)
    if scene_rng.random() < directed.noise:
        timeline.own = scene.with_noise(timeline.own, directed, scene_rng)
    kept = slice(MARGIN, MARGIN + frames)
    window = slice(MARGIN * SAMPLES_PER_FRAME, (MARGIN + frames) * SAMPLES_PER_FRAME)
    shift = MARGIN / FRAME_RATE
    doing = scene.gesture_track(events, timeline.frames)[kept]
    commanded = np.zeros_like(doing) if free and directed.gestures else doing
    plain = label_rng.random() < directed.plain_captions
    endings = [""] * timeline.frames
    for start, stop in looks:
        assert setting.thing is not None
        endings[start:stop] = [captions.looking_at(setting.thing)] * (stop - start)
    if free and text_rng.random() < directed.transcripts:
        for sentence, start, stop in timeline.sentences:
            part = range(max(start, 0), min(stop, timeline.frames))
            endings[part.start : part.stop] = [transcript(sentence)] * len(part)
    prompts, captioned = captions.timed(identity, emotions[kept], timeline.state[kept], commanded, plain, endings[kept])
    return PuppetClip(
        key=f"puppet-{split}-{schedule}-{seed}",
        identity=identity,
        own=timeline.own[window],
        other=timeline.other[window],
        states=motion[kept],
        state=timeline.state[kept],
        emotion=emotions[kept],
        intensity=intensity[kept],
        gesture=commanded,
        doing=doing,
        captions=prompts,
        captioned=captioned,
        phonemes=tuple(Phoneme(p.symbol, p.start_s - shift, p.end_s - shift) for p in timeline.phonemes),
        setting=setting,
    )


def identity_seed(number: int, split: str) -> int:
    """Seed of the identity `number` of a split; the splits share no seed."""
    return number * len(SPLITS) + SPLITS.index(split)


def voice_of(seed: int, emotion: str) -> Voice:
    """The voice of an identity, with the prosody of an emotion."""
    rng = np.random.default_rng([seed, 0x701CE])
    rate, pitch, pitch_range = PROSODY[emotion]
    return Voice(
        name=str(rng.choice(VOICES)),
        rate=round(rng.uniform(145, 190) * rate),
        pitch=int(np.clip(rng.integers(30, 75) + pitch, 0, 99)),
        range=int(np.clip(rng.integers(40, 65) + pitch_range, 0, 99)),
    )


def _emotions(
    emotion: str, frames: int, directed: Scene, identity: Identity, split: str, rng: np.random.Generator
) -> Int[np.ndarray, " f"]:
    """The emotion of each frame; a change applies to the face, while the voice keeps its first emotion."""
    moods = [emotion]
    if rng.random() < directed.moods:
        moods.append(str(rng.choice([name for name in PROSODY if name != emotion])))
    if directed.moods and split == "train":
        moods = ["neutral" if (mood, identity.kind) in HELD_OUT else mood for mood in moods]
    track = np.full(frames, EMOTIONS.index(moods[0]))
    track[int(rng.uniform(0.25, 0.75) * frames) :] = EMOTIONS.index(moods[-1])
    return track


def _events(
    timeline: Timeline,
    directed: Scene,
    setting: Setting,
    free: bool,
    identity: Identity,
    split: str,
    rng: np.random.Generator,
) -> list[Event]:
    """The gestures of a clip, without held-out combinations."""
    if not directed.gestures:
        return []
    if free:
        events = scene.free_gestures(timeline, directed, setting, rng)
    else:
        events = scene.commanded_gestures(timeline.frames, directed, setting, rng) if directed.commands_hz else []
    return [event for event in events if split != "train" or (event.gesture, identity.kind) not in HELD_OUT]
