"""Scenes: the content of clips (speech, gestures, setting, noise) as timelines, before motion and rendering.

A `Scene` is the configuration of a set of clips, and a `Timeline` is the content of one clip. Features other than
speech (gestures, things, framings, changes of mood, noise) have random numbers of their own, so a calm portrait stays
the same when a feature is added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from avatar.errors import UserError
from avatar.puppet import cues
from avatar.puppet.gestures import SECONDS, WITHOUT_ARMS, Event
from avatar.puppet.setting import BACKDROPS, CAMERAS, THING_COLOURS, THINGS, Setting, Thing
from avatar.puppet.speech import Phoneme, Voice, synthesize
from avatar.types import FRAME_RATE, GESTURES, SAMPLE_RATE, SAMPLES_PER_FRAME, STATES

SCHEDULES = ("mixed", "speaking")
PAUSE_S = 0.15  # shortest pause of the other voice that a listener reacts to
REACTION_S = (0.1, 0.35)  # delay of the reaction
LOOK_S = (1.2, 2.4)  # duration of a look at the thing
CUE_DELAY_S = (0.35, 0.6)  # from the start of a cue to its gesture, which a causal model can then know from the audio


@dataclass(frozen=True)
class Scene:
    """Content of a set of clips; all shares are in [0, 1].

    Half of the clips with gestures are *directed*: labels and captions specify every gesture. The others are *free*:
    the gesture label is unspecified, and only words and stress cause gestures.

    Args:
        framings: framing → weight; the framings are those of `setting.CAMERAS`.
        backdrops: some of `setting.BACKDROPS`.
        cues: share of a free clip's sentences that start with words that cause a gesture.
        beats: share of a free clip's other sentences that are accompanied by beats.
        commands_hz: gestures per second of a directed clip.
        moods: share of clips whose emotion changes.
        prosody: share of clips whose voice has the prosody of an emotion that is independent of the face's.
        plain_captions: share of clips whose captions mention neither emotion nor gesture.
        things: share of clips with a thing to look at.
        looks_hz: looks at the thing per second of a directed clip with one, which its captions command.
        transcripts: share of free clips whose captions contain the opening words of each sentence.
        lively: share of clips with 1.5 times the head motion; if above 0, the others have 0.65 times.
        noise: share of clips with noise in the puppet's audio.
        noise_db: smallest and largest signal-to-noise ratio.

    Raises:
        UserError: an unknown name, no framing with a weight above 0, or a number outside its range.
    """

    framings: Mapping[str, float] = field(default_factory=lambda: {"portrait": 1.0})
    backdrops: Sequence[str] = ("disc",)
    cues: float = 0.0
    beats: float = 0.0
    commands_hz: float = 0.0
    moods: float = 0.0
    prosody: float = 0.0
    plain_captions: float = 0.0
    things: float = 0.0
    looks_hz: float = 0.0
    transcripts: float = 0.0
    lively: float = 0.0
    noise: float = 0.0
    noise_db: Sequence[float] = (8.0, 25.0)

    def __post_init__(self):
        object.__setattr__(self, "framings", dict(self.framings))
        object.__setattr__(self, "backdrops", tuple(self.backdrops))
        object.__setattr__(self, "noise_db", tuple(self.noise_db))
        if unknown := [*(self.framings.keys() - CAMERAS.keys()), *(set(self.backdrops) - set(BACKDROPS))]:
            raise UserError(
                f"got the framing or backdrop {unknown[0]!r}; expected framings of {', '.join(CAMERAS)} and backdrops "
                f"of {', '.join(BACKDROPS)}: choose another"
            )
        if not self.framings or min(self.framings.values()) < 0 or sum(self.framings.values()) <= 0:
            raise UserError(f"got framings={self.framings}; expected weights >= 0: set at least one above 0")
        for name in ("cues", "beats", "moods", "prosody", "plain_captions", "things", "transcripts", "lively", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"got {name}={getattr(self, name)}; expected a share in [0, 1]: change it")
        for name in ("commands_hz", "looks_hz"):
            if getattr(self, name) < 0:
                raise UserError(f"got {name}={getattr(self, name)}; expected a number per second >= 0: change it")
        if self.looks_hz and not self.things:
            raise UserError(f"got looks_hz={self.looks_hz} with things=0, so nothing to look at; raise things")

    @property
    def gestures(self) -> bool:
        """Whether clips have gestures."""
        return self.cues + self.beats + self.commands_hz > 0

    def setting(self, rng: np.random.Generator) -> Setting:
        """Draw the setting of a clip."""
        weights = np.array(list(self.framings.values()))
        framing = str(rng.choice(list(self.framings), p=weights / weights.sum()))
        backdrop = str(rng.choice(self.backdrops))
        thing = None
        if rng.random() < self.things:
            side = int(rng.choice((-1, 1)))
            thing = Thing(
                str(rng.choice(THINGS)), str(rng.choice(list(THING_COLOURS))), 0.5 + 0.39 * side, rng.uniform(0.12, 0.4)
            )
        return Setting(framing, backdrop, thing)


class Timeline:
    """Timeline of one clip: both voices, the phonemes and sentences of the puppet, states, pauses of the other voice.

    Args:
        frames: length.
        split: of the sentences.
        rng: draws sentences, states and their times.
        backend, cache: of `speech.synthesize`.
    """

    def __init__(self, frames: int, split: str, rng: np.random.Generator, backend: str | None, cache: Path | None):
        self.own, self.other = np.zeros((2, frames * SAMPLES_PER_FRAME), np.float32)
        self.phonemes: list[Phoneme] = []
        self.state = np.full(frames, STATES.index("idle"))
        self.sentences: list[tuple[str, int, int]] = []  # of the puppet: text, first frame (may be below 0), last frame
        self.pauses: list[int] = []  # frames in which the other voice pauses
        self.frames, self.split, self.rng, self.backend, self.cache = frames, split, rng, backend, cache

    def play(self, schedule: str, own: Voice, other: Voice, cue_share: float = 0.0) -> None:
        """Fill the timeline with speech of both voices and idle time.

        Args:
            schedule: one of SCHEDULES.
            own, other: voices of the puppet and of the other person.
            cue_share: share of the puppet's sentences that start with a cue.
        """
        frame = 0
        while frame < self.frames:
            chances = (1, 0, 0) if schedule == "speaking" else (0.78, 0.12, 0.1)
            state = str(self.rng.choice(("speaking", "listening", "idle"), p=chances))
            if state == "idle":
                end = frame + int(self.rng.uniform(0.8, 2.2) * FRAME_RATE)
            else:
                end = frame + self._add_sentence(frame, own if state == "speaking" else other, state, cue_share)
            self.state[frame:end] = STATES.index(state)
            frame = end

    def silence(self, state: str) -> None:
        """Remove both voices; the puppet has one state throughout."""
        self.own, self.other = np.zeros_like(self.own), np.zeros_like(self.other)
        self.state = np.full(self.frames, STATES.index(state))
        self.phonemes, self.sentences, self.pauses = [], [], []

    def _add_sentence(self, frame: int, voice: Voice, state: str, cue_share: float) -> int:
        """Add a sentence from `frame` on; returns its length in frames, with the pause after it.

        The first sentence of a scene may start before the scene.
        """
        text = cues.draw(self.rng, self.split, cue_share if state == "speaking" else 0.0)
        spoken = synthesize(text, voice, self.cache, self.backend)
        pause = self.rng.uniform(0.1, 0.4)
        skipped = int(self.rng.uniform(0, 0.6) * len(spoken.samples)) if frame == 0 else 0
        begin, samples = frame * SAMPLES_PER_FRAME, spoken.samples[skipped:]
        samples = samples[: len(self.own) - begin]
        track = self.own if state == "speaking" else self.other
        track[begin : begin + len(samples)] = samples
        shift = (begin - skipped) / SAMPLE_RATE
        moved = [Phoneme(p.symbol, p.start_s + shift, p.end_s + shift) for p in spoken.phonemes]
        length = int(np.ceil(((len(spoken.samples) - skipped) / SAMPLE_RATE + pause) * FRAME_RATE))
        if state == "speaking":
            self.phonemes += moved
            self.sentences.append((text, round(shift * FRAME_RATE), frame + length))
        else:
            gaps = [a.end_s for a, b in pairwise(moved) if b.start_s - a.end_s > PAUSE_S]
            ends = [*gaps, *(p.end_s for p in moved[-1:])]
            self.pauses += [int(t * FRAME_RATE) for t in ends if 0 <= t * FRAME_RATE < self.frames]
        return length


def free_gestures(timeline: Timeline, scene: Scene, setting: Setting, rng: np.random.Generator) -> list[Event]:
    """Gestures of a free clip: those that words cause, and beats in other sentences."""
    events = []
    for text, start, stop in timeline.sentences:
        gesture = cues.gesture_of(text)
        if gesture is not None:
            begin = start + int(rng.uniform(*CUE_DELAY_S) * FRAME_RATE)
            events += _visible([_event(gesture, begin, setting, rng)], setting)
        elif rng.random() < scene.beats:
            end = min(stop, start + int(rng.uniform(*SECONDS["beat"]) * FRAME_RATE))
            events += _visible([Event("beat", start, end, int(rng.choice((-1, 1))))], setting)
    return [event for event in events if event.stop > 0]


def commanded_gestures(frames: int, scene: Scene, setting: Setting, rng: np.random.Generator) -> list[Event]:
    """Gestures of a directed clip, at random times without overlap."""
    names = WITHOUT_ARMS if setting.framing == "portrait" else tuple(name for name in SECONDS if name != "beat")
    events, frame = [], 0
    while True:
        frame += int(rng.exponential(1 / scene.commands_hz) * FRAME_RATE) + FRAME_RATE // 2
        event = _event(str(rng.choice(names)), frame, setting, rng)
        if event.stop > frames:
            return events
        events.append(event)
        frame = event.stop


def commanded_looks(frames: int, scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
    """First frames and ends of looks at the thing, at random times without overlap."""
    looks, frame = [], 0
    while True:
        start = frame + int(rng.exponential(1 / scene.looks_hz) * FRAME_RATE) + FRAME_RATE // 2
        frame = start + int(rng.uniform(*LOOK_S) * FRAME_RATE)
        if frame > frames:
            return looks
        looks.append((start, frame))


def gesture_track(events: list[Event], frames: int) -> np.ndarray:
    """Index into types.GESTURES of the gesture in each frame."""
    track = np.full(frames, GESTURES.index("none"))
    for event in events:
        track[max(event.start, 0) : max(event.stop, 0)] = GESTURES.index(event.gesture)
    return track


def reactions(timeline: Timeline, rng: np.random.Generator) -> tuple[int, ...]:
    """Frames of a listener's reactions, shortly after the pauses of the other voice."""
    return tuple(pause + int(rng.uniform(*REACTION_S) * FRAME_RATE) for pause in timeline.pauses)


def with_noise(samples: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Audio with pink noise at a random signal-to-noise ratio; silence stays the same."""
    level = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
    if level == 0:
        return samples
    low, high = scene.noise_db
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE), 50))
    noise = np.fft.irfft(spectrum, len(samples))
    noise *= level * 10 ** (-rng.uniform(low, high) / 20) / noise.std()
    return np.clip(samples + noise, -1, 1).astype(np.float32)


def _event(gesture: str, start: int, setting: Setting, rng: np.random.Generator) -> Event:
    """A gesture of random duration and side; pointing is directed at the thing."""
    stop = start + int(rng.uniform(*SECONDS[gesture]) * FRAME_RATE)
    side = int(rng.choice((-1, 1)))
    if gesture == "point" and setting.thing is not None:
        side = 1 if setting.thing.x > 0.5 else -1
    return Event(gesture, start, stop, side)


def _visible(events: list[Event], setting: Setting) -> list[Event]:
    """The events that the framing shows."""
    return [event for event in events if setting.framing != "portrait" or event.gesture in WITHOUT_ARMS]
