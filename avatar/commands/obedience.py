"""Obedience: counterfactual pairs of held-out clips that differ in one control, generated and read.

Reference, audio and noise are the same in both clips of a pair. `held_out` generates the clips, the same reader as for
all scores estimates their states, and rule-based classifiers (`avatar.metrics.control`) read the control. The same
pairs, acted by the simulator, give the share that a perfect model would reach with this reader.

    emotion         another emotion, by its label; no prompt
    emotion_text    the same, by the prompt alone; no labels
    head_gesture    a nod, shake or shrug in the middle of a portrait, by its label
    arm_gesture     a wave, pointing or shrug in the middle of a half or full body, by its label
    gesture_text    the gestures of both, by the prompt alone
    state           listening instead of idle, by its label, while the puppet's voice is silent
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from avatar.commands.held_out import HeldOutClips
from avatar.conditioning import audio_timeline
from avatar.conditioning.prompts import encode_prompt
from avatar.data.encoded_clips import stack_padded
from avatar.metrics import control
from avatar.metrics.state_estimation import EstimatedClip
from avatar.puppet.captions import caption
from avatar.puppet.clip import Acting, PuppetClip
from avatar.puppet.gestures import Event
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, ROLES, STATES, Conditioning

GESTURE_S = 1.6  # duration of a commanded gesture, seconds
HEAD_GESTURES, ARM_GESTURES = ("nod", "shake", "shrug"), ("wave", "point", "shrug")
INTENSITIES = (0.5, 1.0)  # the range that training clips have
SHOWN = 3  # pairs per control that are kept as videos

Generate = Callable[[Conditioning, Sequence[int], str], list[Tensor]]  # conditioning, clips, title → videos


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
class Shown:
    """Videos of one pair: true and generated, before and after."""

    title: str
    truth: tuple[Tensor, Tensor]
    generated: tuple[Tensor, Tensor]


def obedience(held_out: HeldOutClips, count: int, generate: Generate) -> tuple[dict[str, Any], dict[str, list[Shown]]]:
    """Scores and example videos of each control, over pairs of the first `count` held-out clips.

    Args:
        held_out: the clips.
        count: pairs per control, at most; gestures have those of their framing.
        generate: the system: videos for a conditioning of some of the clips.

    Returns:
        The scores of `metrics.control.counterfactual` per control, with `truth`, the accuracy of the acted pairs, the
        `ratio` to it, and the rank correlation of intensities; and some pairs of each control.
    """
    scores: dict[str, Any] = {}
    shown: dict[str, list[Shown]] = {}
    for one in controls(held_out, count):
        videos = [
            generate(side.cond, one.clips, f"{one.name.replace('_', ' ')}, {what}")
            for side, what in ((one.before, "without"), (one.after, "with"))
        ]
        true = [acted(held_out, one.clips, side.acting) for side in (one.before, one.after)]
        read = [_read(held_out, one.clips, side) for side in videos]
        bound = _score(one, [_read(held_out, one.clips, side) for side in true])["accuracy"]
        found = _score(one, read)
        scores[one.name] = found | {"truth": bound, "ratio": found["accuracy"] / bound if bound else math.nan}
        if one.name == "emotion":
            scores[one.name]["intensity_rank_correlation"] = intensity_correlation(one, read[1])
        shown[one.name] = [
            Shown(
                f"{one.labels[i]}: {held_out.truth[one.clips[i]].identity.description}",
                (true[0][i], true[1][i]),
                (videos[0][i], videos[1][i]),
            )
            for i in range(min(SHOWN, len(one.clips)))
        ]
    return scores, shown


def controls(held_out: HeldOutClips, count: int) -> list[Control]:
    """The controls that the held-out clips can show."""
    every = list(range(min(count, held_out.clips.count)))
    portraits = [i for i in every if held_out.truth[i].setting.framing == "portrait"]
    bodies = [i for i in every if held_out.truth[i].setting.framing != "portrait"]
    made = [_emotion(held_out, every, text=False), _emotion(held_out, every, text=True)]
    for name, clips, gestures in (
        ("head_gesture", portraits, HEAD_GESTURES),
        ("arm_gesture", bodies, ARM_GESTURES),
    ):
        if clips and held_out.clips.scene.gestures:
            made.append(
                _gesture(held_out, name, clips, [gestures[i % len(gestures)] for i in range(len(clips))], False)
            )
    if held_out.clips.scene.gestures:
        asked = [(HEAD_GESTURES if i in portraits else ARM_GESTURES)[i % 3] for i in every]
        made.append(_gesture(held_out, "gesture_text", every, asked, True))
    if held_out.clips.schedule == "mixed":
        made.append(_state(held_out, every))
    return made


def acted(held_out: HeldOutClips, clips: Sequence[int], acting: Sequence[Acting]) -> list[Tensor]:
    """True videos of held-out clips with another acting."""
    frames = 1 + held_out.stride * held_out.clips.latents
    made = (held_out.acted(i, one) for i, one in zip(clips, acting, strict=True))
    return [held_out.world.video(clip, 1, frames) for clip in made]


def intensity_correlation(one: Control, read: Sequence[EstimatedClip]) -> float:
    """Spearman's rank correlation of asked and shown intensity, over the pairs with an emotion that has one."""
    asked = [acting.intensity for acting in one.after.acting]
    shown = [control.intensity(clip.trajectory, label) for clip, label in zip(read, one.labels, strict=True)]
    known = [(a, b) for a, b in zip(asked, shown, strict=True) if b is not None]
    if len(known) < 3:
        return float("nan")
    ranks = rankdata(np.array(known), axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])


def _score(one: Control, read: Sequence[Sequence[EstimatedClip]]) -> dict[str, Any]:
    pairs = [(a.trajectory[one.frames], b.trajectory[one.frames]) for a, b in zip(*read, strict=True)]
    return control.counterfactual(pairs, one.labels, one.attribute)


def _read(held_out: HeldOutClips, clips: Sequence[int], videos: Sequence[Tensor]) -> list[EstimatedClip]:
    return [held_out.reader.read(held_out.truth[i], video, start=1) for i, video in zip(clips, videos, strict=True)]


def _plain(held_out: HeldOutClips, clips: Sequence[int]) -> Conditioning:
    """The clips' conditioning without a prompt and without gestures."""
    flags = {name: torch.full((len(clips),), name == "text") for name in ("audio", "text", "labels")}
    cond = held_out.batch.conditioning.map(lambda x: x[list(clips)]).without(**flags)
    return replace(cond, gesture=torch.full_like(cond.gesture, GESTURES.index("none")))


def _first_emotions(held_out: HeldOutClips, clips: Sequence[int]) -> list[str]:
    return [EMOTIONS[held_out.truth[i].emotion[0]] for i in clips]


def _emotion(held_out: HeldOutClips, clips: list[int], text: bool) -> Control:
    moods = len(EMOTIONS) - 1
    own = _first_emotions(held_out, clips)
    other = [EMOTIONS[1 + (EMOTIONS.index(name) + i % (moods - 1)) % moods] for i, name in enumerate(own)]
    strengths = np.random.default_rng(0).uniform(*INTENSITIES, len(clips)).tolist()
    plain = _plain(held_out, clips)

    def side(names: Sequence[str], intensity: Sequence[float]) -> Side:
        acting = [Acting(name, strength) for name, strength in zip(names, intensity, strict=True)]
        if text:
            return Side(_by_text(held_out, clips, plain, [[(name, "none")] for name in names], None), acting)
        emotion = torch.tensor([EMOTIONS.index(name) for name in names])[:, None].expand_as(plain.emotion)
        amount = torch.tensor(intensity)[:, None].expand_as(plain.emotion_intensity)
        return Side(replace(plain, emotion=emotion, emotion_intensity=amount), acting)

    full = [1.0] * len(clips)
    before, after = side(own, full), side(other, full if text else strengths)
    return Control("emotion_text" if text else "emotion", "emotion", clips, other, before, after, slice(None))


def _gesture(held_out: HeldOutClips, name: str, clips: list[int], asked: list[str], text: bool) -> Control:
    plain, own = _plain(held_out, clips), _first_emotions(held_out, clips)
    length = min(plain.latents, -int(-GESTURE_S * FRAME_RATE // held_out.stride))
    start = (plain.latents - length) // 2
    part, frames = slice(start, start + length), slice(start * held_out.stride, (start + length) * held_out.stride)
    emotion = torch.tensor([EMOTIONS.index(mood) for mood in own])[:, None].expand_as(plain.emotion)
    plain = replace(plain, emotion=emotion)

    def acting(i: int, gestures: tuple[Event, ...]) -> Acting:
        return Acting(own[i], float(held_out.truth[clips[i]].intensity[0]), gestures)

    events = [(Event(gesture, frames.start + 1, frames.stop + 1, 1),) for gesture in asked]
    if text:
        prompts = [[(mood, "none"), (mood, gesture)] for mood, gesture in zip(own, asked, strict=True)]
        before = _by_text(held_out, clips, plain, [row[:1] for row in prompts], None)
        after = _by_text(held_out, clips, plain, prompts, part)
    else:
        gestures = plain.gesture.clone()
        gestures[:, part] = torch.tensor([GESTURES.index(gesture) for gesture in asked])[:, None]
        before, after = plain, replace(plain, gesture=gestures)
    numbers = range(len(clips))
    return Control(
        name,
        "gesture",
        clips,
        asked,
        Side(before, [acting(i, ()) for i in numbers]),
        Side(after, [acting(i, events[i]) for i in numbers]),
        frames,
    )


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


def _by_text(
    held_out: HeldOutClips,
    clips: Sequence[int],
    plain: Conditioning,
    prompts: Sequence[Sequence[tuple[str, str]]],
    second: slice | None,
) -> Conditioning:
    """The conditioning with prompts and without labels.

    Args:
        prompts: for each clip, the emotion and gesture of its first and, where there is one, of its second prompt.
        second: the latents of the second prompts.
    """

    def words(truth: PuppetClip, mood: str, gesture: str) -> str:
        state = int(truth.state[0])
        return caption(truth.identity, EMOTIONS.index(mood), [state], GESTURES.index(gesture))

    rows = []
    for i, asked in zip(clips, prompts, strict=True):
        tokens = [encode_prompt(words(held_out.truth[i], *one), held_out.text) for one in asked]
        rows.append([held_out.text.padded(row) for row in tokens])
    event = torch.zeros_like(plain.text_event)
    if second is not None:
        event[:, second] = 1
    unspecified = torch.zeros_like(plain.state)
    return replace(
        plain,
        text=stack_padded([torch.stack([tokens for tokens, _ in row]) for row in rows]),
        text_mask=stack_padded([torch.stack([mask for _, mask in row]) for row in rows]),
        text_event=event,
        state=unspecified,
        emotion=unspecified,
        gesture=unspecified,
    )
