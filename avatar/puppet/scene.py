"""Scenes: who says and does what when, before anything moves or is drawn.

A `Scene` is what a config says of a set of clips; `Timeline.play` fills one clip with it. What its default leaves out
(gestures, things to look at, other framings, changes of mood, noise) takes no random number, so that a calm portrait
stays the same whatever this module learns to do.
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
PAUSE_S = 0.15  # of the other's voice, to which a listener reacts
REACTION_S = (0.1, 0.35)


@dataclass(frozen=True)
class Scene:
    """How clips are directed. Shares are of clips or sentences, in [0, 1].

    Half of the clips with gestures are *directed*: their labels and captions say what the puppet does, and it does
    nothing else. The others are *free*: the gesture's label is unspecified, words and stress alone cause gestures.
    """

    framings: Mapping[str, float] = field(default_factory=lambda: {"portrait": 1.0})  # weights
    backdrops: Sequence[str] = ("disc",)
    cues: float = 0.0  # of a free clip's sentences, made to open with words that cause a gesture
    beats: float = 0.0  # of a free clip's sentences, accompanied by beats
    commands_hz: float = 0.0  # gestures a second in a directed clip
    moods: float = 0.0  # clips whose emotion changes
    things: float = 0.0  # clips with a thing to look at
    lively: float = 0.0  # clips whose head moves half as much again, of the others by a third less
    noise: float = 0.0  # clips with noise on the sound
    noise_db: Sequence[float] = (8.0, 25.0)  # of speech above noise

    def __post_init__(self):
        object.__setattr__(self, "framings", dict(self.framings))
        object.__setattr__(self, "backdrops", tuple(self.backdrops))
        object.__setattr__(self, "noise_db", tuple(self.noise_db))
        if strange := [*(self.framings.keys() - CAMERAS.keys()), *(set(self.backdrops) - set(BACKDROPS))]:
            raise UserError(
                f"unknown framing or backdrop {strange[0]!r}; wanted {', '.join(CAMERAS)} and {', '.join(BACKDROPS)}"
            )
        if not self.framings or min(self.framings.values()) < 0 or sum(self.framings.values()) <= 0:
            raise UserError(f"framings {self.framings}; give at least one a weight above 0")
        for name in ("cues", "beats", "moods", "things", "lively", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; wanted a share in [0, 1]")
        if self.commands_hz < 0:
            raise UserError(f"commands_hz is {self.commands_hz}; wanted gestures a second, 0 or more")

    @property
    def gestures(self) -> bool:
        return self.cues + self.beats + self.commands_hz > 0

    def setting(self, rng: np.random.Generator) -> Setting:
        """A framing, a backdrop and maybe a thing."""
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
    """A clip under construction: two tracks of sound, the phonemes of the first, states and gestures by frame.

    `rng` draws what is said and when, `own` what a scene adds to that.
    """

    def __init__(self, frames: int, split: str, rng: np.random.Generator, backend: str | None, cache: Path | None):
        self.own, self.other = np.zeros((2, frames * SAMPLES_PER_FRAME), np.float32)
        self.phonemes: list[Phoneme] = []
        self.state = np.full(frames, STATES.index("idle"))
        self.sentences: list[tuple[str, int, int]] = []  # of the puppet: text, first frame (before 0: cut), last
        self.pauses: list[int] = []  # of the other's voice
        self.frames, self.split, self.rng, self.backend, self.cache = frames, split, rng, backend, cache

    def play(self, schedule: str, own: Voice, other: Voice, cue_share: float = 0.0) -> None:
        """Fill the timeline with speaking, listening and idling."""
        frame = 0
        while frame < self.frames:
            chances = (1, 0, 0) if schedule == "speaking" else (0.78, 0.12, 0.1)
            state = str(self.rng.choice(("speaking", "listening", "idle"), p=chances))
            if state == "idle":
                end = frame + int(self.rng.uniform(0.8, 2.2) * FRAME_RATE)
            else:
                end = frame + self._say(frame, own if state == "speaking" else other, state, cue_share)
            self.state[frame:end] = STATES.index(state)
            frame = end

    def _say(self, frame: int, voice: Voice, state: str, cue_share: float) -> int:
        """Put a sentence on a track, from `frame` on; returns how many frames it takes with the pause after it.

        The first one of a scene may have begun before it.
        """
        text = cues.draw(self.rng, self.split, cue_share if state == "speaking" else 0.0)
        spoken = synthesize(text, voice, self.cache, self.backend)
        pause = self.rng.uniform(0.1, 0.4)
        late = int(self.rng.uniform(0, 0.6) * len(spoken.samples)) if frame == 0 else 0
        begin, samples = frame * SAMPLES_PER_FRAME, spoken.samples[late:]
        samples = samples[: len(self.own) - begin]
        track = self.own if state == "speaking" else self.other
        track[begin : begin + len(samples)] = samples
        shift = (begin - late) / SAMPLE_RATE
        moved = [Phoneme(p.symbol, p.start_s + shift, p.end_s + shift) for p in spoken.phonemes]
        length = int(np.ceil(((len(spoken.samples) - late) / SAMPLE_RATE + pause) * FRAME_RATE))
        if state == "speaking":
            self.phonemes += moved
            self.sentences.append((text, round(shift * FRAME_RATE), frame + length))
        else:
            gaps = [a.end_s for a, b in pairwise(moved) if b.start_s - a.end_s > PAUSE_S]
            ends = [*gaps, *(p.end_s for p in moved[-1:])]
            self.pauses += [int(t * FRAME_RATE) for t in ends if 0 <= t * FRAME_RATE < self.frames]
        return length


def free_gestures(timeline: Timeline, scene: Scene, setting: Setting, rng: np.random.Generator) -> list[Event]:
    """Gestures that words cause, and beats, which may accompany the other sentences."""
    events = []
    for text, start, stop in timeline.sentences:
        gesture = cues.gesture_of(text)
        if gesture is not None:
            begin = start + int(rng.uniform(-0.1, 0.15) * FRAME_RATE)
            events += _seen([_event(gesture, begin, setting, rng)], setting)
        elif rng.random() < scene.beats:
            end = min(stop, start + int(rng.uniform(*SECONDS["beat"]) * FRAME_RATE))
            events += _seen([Event("beat", start, end, int(rng.choice((-1, 1))))], setting)
    return [event for event in events if event.stop > 0]


def commanded_gestures(frames: int, scene: Scene, setting: Setting, rng: np.random.Generator) -> list[Event]:
    """Gestures out of nowhere, as a director asks for them; one is over before the next begins."""
    known = WITHOUT_ARMS if setting.framing == "portrait" else tuple(name for name in SECONDS if name != "beat")
    events, frame = [], 0
    while True:
        frame += int(rng.exponential(1 / scene.commands_hz) * FRAME_RATE) + FRAME_RATE // 2
        event = _event(str(rng.choice(known)), frame, setting, rng)
        if event.stop > frames:
            return events
        events.append(event)
        frame = event.stop


def gesture_track(events: list[Event], frames: int) -> np.ndarray:
    """The index into types.GESTURES of what is done at each frame."""
    track = np.full(frames, GESTURES.index("none"))
    for event in events:
        track[max(event.start, 0) : max(event.stop, 0)] = GESTURES.index(event.gesture)
    return track


def reactions(timeline: Timeline, rng: np.random.Generator) -> tuple[int, ...]:
    """Frames at which a listener nods, soon after the other's pauses."""
    return tuple(pause + int(rng.uniform(*REACTION_S) * FRAME_RATE) for pause in timeline.pauses)


def with_noise(samples: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A voice with a room's noise under it, louder at low frequencies."""
    level = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
    if level == 0:
        return samples
    quietest, loudest = scene.noise_db
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE), 50))
    noise = np.fft.irfft(spectrum, len(samples))
    noise *= level * 10 ** (-rng.uniform(quietest, loudest) / 20) / noise.std()
    return np.clip(samples + noise, -1, 1).astype(np.float32)


def _event(gesture: str, start: int, setting: Setting, rng: np.random.Generator) -> Event:
    stop = start + int(rng.uniform(*SECONDS[gesture]) * FRAME_RATE)
    side = int(rng.choice((-1, 1)))
    if gesture == "point" and setting.thing is not None:
        side = 1 if setting.thing.x > 0.5 else -1
    return Event(gesture, start, stop, side)


def _seen(events: list[Event], setting: Setting) -> list[Event]:
    """Those that this framing shows."""
    return [event for event in events if setting.framing != "portrait" or event.gesture in WITHOUT_ARMS]
