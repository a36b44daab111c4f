"""Counterfactual pairs: conditionings of held-out clips that differ in one control, and the acting that they ask for.

emotion                   another emotion, by its label; no prompt
emotion_text              the same, by the prompt alone; no labels
emotion_label_over_text   the same by its label, while the prompt names the old emotion in both clips
head_gesture              a nod, shake or shrug in the middle of a portrait, by its label
arm_gesture               a wave, pointing or shrug in the middle of a half or full body, by its label
gesture_text              the gestures of both, by the prompt alone
point_at                  pointing at the thing in the picture, by the label; the raised arm is read
look_text                 a look at the thing in the picture, by the prompt alone; in the state world
state                     listening instead of idle, by its label, while the puppet's voice is silent
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from avatar.commands.held_out import HeldOutClips
from avatar.conditioning import audio_timeline
from avatar.conditioning.prompts import encode_prompt
from avatar.data.encoded_clips import stack_padded
from avatar.puppet import captions
from avatar.puppet.clip import Acting
from avatar.puppet.gestures import Event
from avatar.puppet.setting import Thing
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, ROLES, STATES, Conditioning

COMMAND_S = 1.6  # duration of a commanded gesture or look, seconds
HEAD_GESTURES, ARM_GESTURES = ("nod", "shake", "shrug"), ("wave", "point", "shrug")
INTENSITIES = (0.5, 1.0)  # the range that training clips have


@dataclass(frozen=True)
class Side:
    """One side of the pairs of a control: its conditioning, and the acting that it asks for."""

    cond: Conditioning
    acting: list[Acting]


@dataclass(frozen=True)
class Control:
    """A control: pairs of clips without and with it.

    Args:
        name: of the control.
        attribute: which classifier of `metrics.control` reads it.
        clips: numbers of the held-out clips.
        labels: the asked label of each pair.
        before, after: the sides.
        frames: the part that is read.
    """

    name: str
    attribute: str
    clips: list[int]
    labels: list[str]
    before: Side
    after: Side
    frames: slice


@dataclass(frozen=True)
class Middle:
    """The middle of the clips, in which a gesture or a look is commanded."""

    latents: slice
    frames: slice

    @classmethod
    def of(cls, latents: int, stride: int) -> "Middle":
        length = min(latents, -int(-COMMAND_S * FRAME_RATE // stride))
        start = (latents - length) // 2
        return cls(slice(start, start + length), slice(start * stride, (start + length) * stride))


def other_emotion(name: str, number: int) -> str:
    """Another emotion than this one; consecutive numbers give different ones."""
    moods = len(EMOTIONS) - 1
    return EMOTIONS[1 + (EMOTIONS.index(name) + number % (moods - 1)) % moods]


def controls(held_out: HeldOutClips, count: int) -> list[Control]:
    """The controls that the first `count` held-out clips can show."""
    every = list(range(min(count, held_out.clips.count)))
    portraits = [i for i in every if held_out.truth[i].setting.framing == "portrait"]
    bodies = [i for i in every if held_out.truth[i].setting.framing != "portrait"]
    with_thing = [i for i in every if held_out.truth[i].setting.thing is not None]
    made = [_emotion_by_label(held_out, every), _emotion_by_text(held_out, every), _label_over_text(held_out, every)]
    if held_out.clips.scene.gestures:
        groups = (("head_gesture", portraits, HEAD_GESTURES), ("arm_gesture", bodies, ARM_GESTURES))
        asked = {i: names[n % len(names)] for _, clips, names in groups for n, i in enumerate(clips)}
        made += [_gesture(held_out, name, clips, [asked[i] for i in clips]) for name, clips, _ in groups if clips]
        made.append(_gesture_by_text(held_out, every, [asked[i] for i in every]))
        if pointing := [i for i in bodies if i in with_thing]:
            made.append(_point_at(held_out, pointing))
    if held_out.clips.scene.looks_hz and with_thing:
        made.append(_look_by_text(held_out, with_thing))
    if held_out.clips.schedule == "mixed":
        made.append(_state(held_out, every))
    return made


def _plain(held_out: HeldOutClips, clips: Sequence[int]) -> Conditioning:
    """The clips' conditioning with the first emotion, without a prompt and without gestures."""
    flags = {name: torch.full((len(clips),), name == "text") for name in ("audio", "text", "labels")}
    cond = held_out.batch.conditioning.map(lambda x: x[list(clips)]).without(**flags)
    emotion = torch.tensor([EMOTIONS.index(name) for name in _first_emotions(held_out, clips)], dtype=torch.long)
    gesture = torch.full_like(cond.gesture, GESTURES.index("none"))
    return replace(cond, emotion=emotion[:, None].expand_as(cond.emotion), gesture=gesture)


def _first_emotions(held_out: HeldOutClips, clips: Sequence[int]) -> list[str]:
    return [EMOTIONS[held_out.truth[i].emotion[0]] for i in clips]


def _other_emotions(held_out: HeldOutClips, clips: Sequence[int]) -> list[str]:
    return [other_emotion(name, i) for i, name in enumerate(_first_emotions(held_out, clips))]


def _emotion_by_label(held_out: HeldOutClips, clips: list[int]) -> Control:
    plain, own, other = _plain(held_out, clips), _first_emotions(held_out, clips), _other_emotions(held_out, clips)
    strengths = np.random.default_rng(0).uniform(*INTENSITIES, len(clips)).tolist()
    before, after = _labelled(plain, own, [1.0] * len(clips)), _labelled(plain, other, strengths)
    return Control("emotion", "emotion", clips, other, before, after, slice(None))


def _label_over_text(held_out: HeldOutClips, clips: list[int]) -> Control:
    own, other = _first_emotions(held_out, clips), _other_emotions(held_out, clips)
    prompts = [[_caption(held_out, i, mood)] for i, mood in zip(clips, own, strict=True)]
    prompted = _with_prompts(held_out, _plain(held_out, clips), prompts)
    before, after = (_labelled(prompted, names, [1.0] * len(clips)) for names in (own, other))
    return Control("emotion_label_over_text", "emotion", clips, other, before, after, slice(None))


def _labelled(plain: Conditioning, names: Sequence[str], intensity: Sequence[float]) -> Side:
    emotion = torch.tensor([EMOTIONS.index(name) for name in names])[:, None].expand_as(plain.emotion)
    amount = torch.tensor(intensity)[:, None].expand_as(plain.emotion_intensity)
    acting = [Acting(name, strength) for name, strength in zip(names, intensity, strict=True)]
    return Side(replace(plain, emotion=emotion, emotion_intensity=amount), acting)


def _emotion_by_text(held_out: HeldOutClips, clips: list[int]) -> Control:
    plain, own, other = _plain(held_out, clips), _first_emotions(held_out, clips), _other_emotions(held_out, clips)

    def side(names: Sequence[str]) -> Side:
        prompts = [[_caption(held_out, i, name)] for i, name in zip(clips, names, strict=True)]
        return Side(_by_text(held_out, plain, prompts), [Acting(name, 1.0) for name in names])

    return Control("emotion_text", "emotion", clips, other, side(own), side(other), slice(None))


def _gesture(held_out: HeldOutClips, name: str, clips: list[int], asked: list[str]) -> Control:
    plain = _plain(held_out, clips)
    middle = Middle.of(plain.latents, held_out.stride)
    gesture = plain.gesture.clone()
    gesture[:, middle.latents] = torch.tensor([GESTURES.index(one) for one in asked], dtype=torch.long)[:, None]
    before, after = (Side(plain, _own_acting(held_out, clips)), _gesturing(held_out, clips, asked, middle))
    return Control(name, "gesture", clips, asked, before, Side(replace(plain, gesture=gesture), after), middle.frames)


def _gesture_by_text(held_out: HeldOutClips, clips: list[int], asked: list[str]) -> Control:
    plain, own = _plain(held_out, clips), _first_emotions(held_out, clips)
    middle = Middle.of(plain.latents, held_out.stride)
    rows = zip(clips, own, asked, strict=True)
    prompts = [[_caption(held_out, i, mood), _caption(held_out, i, mood, gesture)] for i, mood, gesture in rows]
    before = Side(_by_text(held_out, plain, [row[:1] for row in prompts]), _own_acting(held_out, clips))
    after = Side(_by_text(held_out, plain, prompts, middle.latents), _gesturing(held_out, clips, asked, middle))
    return Control("gesture_text", "gesture", clips, asked, before, after, middle.frames)


def _point_at(held_out: HeldOutClips, clips: list[int]) -> Control:
    labels = _sides_of_things(held_out, clips)
    return replace(_gesture(held_out, "point_at", clips, ["point"] * len(clips)), attribute="point_side", labels=labels)


def _look_by_text(held_out: HeldOutClips, clips: list[int]) -> Control:
    plain, own = _plain(held_out, clips), _first_emotions(held_out, clips)
    middle = Middle.of(plain.latents, held_out.stride)
    prompts = []
    for i, mood in zip(clips, own, strict=True):
        first = _caption(held_out, i, mood)
        prompts.append([first, first + captions.looking_at(_thing(held_out, i))])
    look = (middle.frames.start + 1, middle.frames.stop + 1)
    before = Side(_by_text(held_out, plain, [row[:1] for row in prompts]), _own_acting(held_out, clips))
    acting = [replace(acting, looks=(look,)) for acting in _own_acting(held_out, clips)]
    after = Side(_by_text(held_out, plain, prompts, middle.latents), acting)
    return Control("look_text", "gaze_side", clips, _sides_of_things(held_out, clips), before, after, middle.frames)


def _state(held_out: HeldOutClips, clips: list[int]) -> Control:
    plain = _silent(held_out, _plain(held_out, clips))
    sides = [replace(plain, state=torch.full_like(plain.state, STATES.index(name))) for name in ("idle", "listening")]
    own = _first_emotions(held_out, clips)
    before, after = (
        Side(cond, [Acting(name, silent=state) for name in own])
        for cond, state in zip(sides, ("idle", "listening"), strict=True)
    )
    return Control("state", "state", clips, ["listening"] * len(clips), before, after, slice(None))


def _silent(held_out: HeldOutClips, cond: Conditioning) -> Conditioning:
    """The conditioning with a silent own voice and without another."""
    encoder, frames = held_out.audio, held_out.stride * cond.latents
    length = encoder.left_context + frames + encoder.right_context
    features = audio_timeline.silent_features(encoder, -encoder.left_context, length)
    windows = encoder.window(features, held_out.stride)[: cond.latents]
    audio, mask = cond.audio.clone(), cond.audio_mask.clone()
    audio[:, ROLES.index("own")], mask[:, ROLES.index("other")] = windows, False
    return replace(cond, audio=audio, audio_mask=mask)


def _thing(held_out: HeldOutClips, clip: int) -> Thing:
    thing = held_out.truth[clip].setting.thing
    assert thing is not None
    return thing


def _sides_of_things(held_out: HeldOutClips, clips: Sequence[int]) -> list[str]:
    """The side of each clip's thing."""
    return ["right" if _thing(held_out, i).x > 0.5 else "left" for i in clips]


def _own_acting(held_out: HeldOutClips, clips: Sequence[int]) -> list[Acting]:
    """Acting with the first emotion of each clip, without gestures."""
    own = _first_emotions(held_out, clips)
    return [Acting(mood, float(held_out.truth[i].intensity[0])) for i, mood in zip(clips, own, strict=True)]


def _gesturing(held_out: HeldOutClips, clips: Sequence[int], asked: Sequence[str], middle: Middle) -> list[Acting]:
    """The same with a gesture in the middle, at the side of the thing if there is one."""
    start, stop, made = middle.frames.start + 1, middle.frames.stop + 1, []
    for i, gesture, acting in zip(clips, asked, _own_acting(held_out, clips), strict=True):
        thing = held_out.truth[i].setting.thing
        side = -1 if thing is not None and thing.x < 0.5 else 1
        made.append(replace(acting, gestures=(Event(gesture, start, stop, side),)))
    return made


def _caption(held_out: HeldOutClips, clip: int, mood: str, gesture: str = "none") -> str:
    truth = held_out.truth[clip]
    return captions.caption(truth.identity, EMOTIONS.index(mood), [int(truth.state[0])], GESTURES.index(gesture))


def _by_text(
    held_out: HeldOutClips, plain: Conditioning, prompts: Sequence[Sequence[str]], second: slice | None = None
) -> Conditioning:
    """The conditioning with prompts and without labels."""
    unspecified = torch.zeros_like(plain.state)
    prompted = _with_prompts(held_out, plain, prompts, second)
    return replace(prompted, state=unspecified, emotion=unspecified, gesture=unspecified)


def _with_prompts(
    held_out: HeldOutClips, plain: Conditioning, prompts: Sequence[Sequence[str]], second: slice | None = None
) -> Conditioning:
    """The conditioning with prompts.

    Args:
        prompts: for each clip, its first and, where there is one, its second prompt.
        second: the latents of the second prompts.
    """
    rows = [[held_out.text.padded(encode_prompt(prompt, held_out.text)) for prompt in row] for row in prompts]
    event = torch.zeros_like(plain.text_event)
    if second is not None:
        event[:, second] = 1
    return replace(
        plain,
        text=stack_padded([torch.stack([tokens for tokens, _ in row]) for row in rows]),
        text_mask=stack_padded([torch.stack([mask for _, mask in row]) for row in rows]),
        text_event=event,
    )
