"""Scenes: gestures by words and by labels, gaze at things, reactions, noise, changes of mood, and calm portraits."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from avatar.conditioning.transcripts import LENGTH, transcript
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.puppet import clip as clip_module
from avatar.puppet import cues, sentences
from avatar.puppet.captions import MOODS, caption, looking_at
from avatar.puppet.clip import HELD_OUT, MARGIN, PuppetClip, make_clip
from avatar.puppet.gestures import SECONDS, WITHOUT_ARMS
from avatar.puppet.identity import Identity
from avatar.puppet.motion import channel
from avatar.puppet.scene import CUE_DELAY_S, Scene, Timeline, free_gestures
from avatar.puppet.setting import PORTRAIT, THING_COLOURS, THINGS, Setting, Thing
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, STATES
from tests.stages import composed

HALF = Scene(framings={"half": 1.0}, cues=0.7, beats=1.0, commands_hz=0.5)


def clips(
    count: int, scene: Scene, split: str = "train", schedule: str = "speaking", frames: int = 150
) -> list[PuppetClip]:
    return [make_clip(seed, split, frames, schedule, backend="formant", directed=scene) for seed in range(count)]


def column(clip: PuppetClip, name: str) -> np.ndarray:
    return clip.states[:, channel(name)]


def free(clip: PuppetClip) -> bool:
    return not clip.gesture.any()


def spans(track: np.ndarray) -> list[tuple[str, slice]]:
    """The gestures of a track that are completely inside it."""
    cuts = np.flatnonzero(np.diff(track, prepend=-1, append=-1))
    found = [(GESTURES[track[a]], slice(a, b)) for a, b in pairwise(cuts) if a and b < len(track)]
    return [(name, span) for name, span in found if name != "none"]


@pytest.fixture(scope="module")
def half() -> list[PuppetClip]:
    return clips(36, HALF)


def test_a_calm_portrait_has_no_gestures():
    for clip in clips(6, Scene(), schedule="mixed"):
        assert clip.setting == PORTRAIT and len(clip.captions) == 1
        assert set(clip.doing) == set(clip.gesture) == {GESTURES.index("none")}
        for name in ("upper_l", "fore_r", "hand_l", "shoulders"):
            assert np.ptp(column(clip, name)) == 0


def test_gestures_are_labelled_in_directed_clips_only(half):
    assert {free(clip) for clip in half} == {True, False}
    for clip in half:
        assert free(clip) or (clip.gesture == clip.doing).all()
        for text, at in ((clip.captions[i], clip.captioned == i) for i in range(len(clip.captions))):
            labels = {GESTURES[i] for i in clip.gesture[at]}
            assert len(labels) == 1
            assert ("waving" in text) == (labels == {"wave"}) and ("shrugging" in text) == (labels == {"shrug"})


def test_gestures_move_their_channels(half):
    count = dict.fromkeys(SECONDS, 0)
    for clip in half:
        for name, span in spans(clip.doing):
            count[name] += 1
            if name in ("wave", "point"):
                raised = np.maximum(column(clip, "upper_l"), column(clip, "upper_r"))[span].max()
                shape = [column(clip, f"hand_{side}")[span] for side in "lr"]
                assert raised > 0.55
                assert max(map(np.max, shape)) > 0.9 if name == "wave" else min(map(np.min, shape)) < -0.9
            elif name == "shrug":
                assert column(clip, "shoulders")[span].max() > 0.9
            elif name in ("nod", "shake"):
                assert np.ptp(column(clip, "head_pitch" if name == "nod" else "head_yaw")[span]) > 0.9
    assert min(count.values()) >= 2, count


def test_words_cause_gestures_when_they_can_be_known(half):
    """A sentence starts with the cue, and the gesture starts when the cue has been spoken, or most of it."""
    rng = np.random.default_rng(0)
    drawn = [cues.draw(rng, "test", 1.0) for _ in range(60)]
    assert {cues.gesture_of(text) for text in drawn} == set(cues.CUES)
    assert all(sentences.split_of(text) == "test" for text in drawn)
    assert cues.gesture_of("Nobody found the map.") is None and cues.gesture_of("No, we lost it.") == "shake"
    timeline = Timeline(200, "train", rng, "formant", None)
    timeline.sentences = [("Hello, we left.", 10, 70), ("We left.", 70, 120), ("Who knows, we left.", 120, 180)]
    events = free_gestures(timeline, Scene(cues=1.0), Setting("half"), rng)
    assert [event.gesture for event in events] == ["wave", "shrug"]
    low, high = (seconds * FRAME_RATE for seconds in CUE_DELAY_S)
    assert all(low - 1 <= event.start - start <= high for event, start in zip(events, (10, 120), strict=True))
    found = 0
    for clip in filter(free, half):
        after_pauses = [b.start_s for a, b in pairwise(clip.phonemes) if b.start_s - a.end_s > 0.08]
        for _, span in (one for one in spans(clip.doing) if one[0] != "beat"):
            delays = [span.start / FRAME_RATE - start for start in (clip.phonemes[0].start_s, *after_pauses)]
            assert any(CUE_DELAY_S[0] - 0.05 <= delay <= CUE_DELAY_S[1] + 0.05 for delay in delays)
            found += 1
    assert found >= 8


def test_a_portrait_has_gestures_without_arms_only():
    scene = replace(HALF, framings={"portrait": 1.0})
    done = {GESTURES[i] for clip in clips(12, scene) for i in set(clip.doing)}
    assert done <= {"none", *WITHOUT_ARMS} and len(done) > 2


def test_held_out_combinations_are_in_test_clips_only():
    scene = replace(HALF, moods=1.0)

    def combined(split: str) -> set[tuple[str, str]]:
        pairs = set()
        for clip in clips(50, scene, split, frames=80):
            pairs |= {(EMOTIONS[i], clip.identity.kind) for i in set(clip.emotion)}
            pairs |= {(GESTURES[i], clip.identity.kind) for i in set(clip.doing)}
        return pairs & HELD_OUT

    assert not combined("train") and len(combined("test")) >= 2


def test_puppets_look_and_point_at_things():
    sides, pointed = [], []
    for clip in clips(24, replace(HALF, things=1.0), schedule="mixed"):
        assert clip.setting.thing is not None
        side = np.sign(clip.setting.thing.x - 0.5)
        sides.append(side * column(clip, "gaze_x")[clip.state == STATES.index("idle")])
        for name, span in spans(clip.doing):
            if name == "point":
                arm = "r" if side > 0 else "l"
                pointed.append(column(clip, f"upper_{arm}")[span].max() > 0.55)
    assert np.concatenate(sides).mean() > 0.3 and all(pointed) and len(pointed) >= 2


def test_a_listener_nods_and_blinks_at_pauses():
    """Nods at random times would lower the head as much before a pause as after it."""
    before, after, blinks = [], [], []
    for clip in clips(40, Scene(), schedule="mixed"):
        other = np.abs(clip.other).reshape(-1, 640).max(1) > 0.01
        for i in np.flatnonzero(other[:-1] & ~other[1:]):
            listening = clip.state[i : i + 16] == STATES.index("listening")
            if i >= 12 and listening.sum() >= 14 and len(listening) == 16 and not other[i + 1 : i + 4].any():
                before.append(column(clip, "head_pitch")[i - 8 : i].mean())
                after.append(column(clip, "head_pitch")[i + 6 : i + 14].mean())
                blinks.append(column(clip, "lid")[i : i + 14].max() > 0.9)
    assert np.mean(blinks) > 0.55  # by chance: a quarter
    assert len(after) >= 6 and np.mean(after) > np.mean(before) + 0.08


def test_noise_changes_the_audio_only():
    plain, noisy = (clips(4, replace(Scene(), noise=share)) for share in (0.0, 1.0))
    for a, b in zip(plain, noisy, strict=True):
        assert np.array_equal(a.states, b.states) and a.phonemes == b.phonemes
        ratio = 20 * np.log10(np.std(a.own) / np.std(b.own - a.own))
        assert 6 < ratio < 27


def test_independent_prosody_changes_the_voice_only():
    plain, changed = clips(20, Scene()), clips(20, Scene(prosody=1.0))
    assert [clip.caption for clip in plain] == [clip.caption for clip in changed]
    different = sum((a.own != b.own).any() for a, b in zip(plain, changed, strict=True))
    assert 8 <= different < 20  # one in five draws the same emotion
    for a, b in zip(plain, changed, strict=True):
        assert (a.emotion == b.emotion).all() and a.identity == b.identity


def test_plain_captions_mention_neither_emotion_nor_gesture():
    told, plain = clips(12, HALF), clips(12, replace(HALF, plain_captions=1.0))
    assert any(len(clip.captions) > 1 for clip in told)
    for a, b in zip(told, plain, strict=True):
        assert (a.states == b.states).all() and (a.gesture == b.gesture).all()
        (caption,) = b.captions
        assert a.identity.description in caption and caption.endswith("is speaking")
        assert not any(mood in caption for mood in MOODS.values())


def test_a_commanded_look_is_in_the_caption_and_at_the_thing():
    scene = replace(HALF, things=1.0)
    looks = 0
    for plain, clip in zip(clips(16, scene), clips(16, replace(scene, looks_hz=0.5)), strict=True):
        asked = np.array(["looking at a" in text for text in clip.captions])[clip.captioned]
        assert clip.setting.thing is not None
        gaze = column(clip, "gaze_x") * np.sign(clip.setting.thing.x - 0.5)
        for start, stop in pairwise([0, *np.flatnonzero(np.diff(asked)) + 1, len(asked)]):
            if asked[start]:
                assert gaze[start + 4 : stop - 4].min(initial=1) > 0.6
                looks += 1
        assert not (asked.any() and free(clip)) and (plain.own == clip.own).all() and (plain.doing == clip.doing).all()
        assert all(clip.setting.thing.kind in text for text in clip.captions if "looking" in text)
    assert looks >= 6


def test_transcripts_are_the_openings_of_spoken_sentences():
    """They are in the captions of the frames of their sentence, and nothing else changes."""
    plain, spoken = clips(12, HALF), clips(12, replace(HALF, transcripts=1.0))
    found = 0
    for seed, (a, b) in enumerate(zip(plain, spoken, strict=True)):
        assert (a.states == b.states).all() and (a.own == b.own).all()
        if not free(b):
            assert a.captions == b.captions
            continue
        for frame, (sentence, index) in enumerate(zip(sentences_of(seed, 150), b.captioned, strict=True)):
            caption = b.captions[index]
            assert caption.endswith(transcript(sentence) if sentence else ("speaking", "listening", "idle")), frame
            found += bool(sentence)
    assert found > 300
    assert transcript("No, we lost it.") == ": No, we lost it" and transcript("") == transcript(".") == ""
    assert all(len(transcript(cue)) - 2 == len(cue) <= LENGTH for opening in cues.CUES.values() for cue in opening)


def sentences_of(seed: int, frames: int) -> list[str]:
    """The sentence of each frame of a clip, or an empty one, from a timeline that is recorded while it is made."""
    made = []

    class Recorded(Timeline):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, "Timeline", Recorded)
        make_clip(seed, "train", frames, "speaking", backend="formant", directed=HALF)
    rows = [""] * (frames + 2 * MARGIN)
    for text, start, stop in made[0].sentences:
        rows[max(start, 0) : stop] = [text] * len(rows[max(start, 0) : stop])
    return rows[MARGIN : MARGIN + frames]


def test_captions_fit_into_the_text_encoder():
    people = {identity.description: identity for identity in map(Identity.from_seed, range(300))}.values()
    person = max(people, key=lambda identity: len(identity.description))
    things = [Thing(kind, colour, 0.1, 0.1) for kind in THINGS for colour in THING_COLOURS]
    looks = [
        caption(person, mood, [state], gesture) + looking_at(thing)
        for mood in range(len(EMOTIONS))
        for state in range(1, len(STATES))
        for gesture in range(len(GESTURES))
        for thing in things
    ]
    speaking = STATES.index("speaking")
    spoken = [caption(person, mood, [speaking], 0) + ": " + "w" * LENGTH for mood in range(len(EMOTIONS))]
    several = [caption(person, mood, [1, 2, 3], 0) for mood in range(len(EMOTIONS))]
    encoder = ByteTokenizer(composed("train").text.max_bytes)
    for text in (*looks, *spoken, *several):
        encoder.check(text)


def test_changes_of_mood_change_emotion_and_caption():
    for clip in clips(6, Scene(moods=1.0)):
        assert len(set(clip.emotion)) == 2 == len(clip.captions)
        assert set(clip.captioned) == {0, 1} and clip.captions[0].split()[1] != clip.captions[1].split()[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"framings": {"close": 1.0}}, "'close'"),
        ({"framings": {"half": 0.0}}, "set at least one above 0"),
        ({"backdrops": ("sky",)}, "'sky'"),
        ({"cues": 1.5}, "cues=1.5; expected a share"),
        ({"commands_hz": -1.0}, "commands_hz"),
        ({"looks_hz": -1.0}, "looks_hz"),
        ({"looks_hz": 1.0}, "nothing to look at"),
        ({"transcripts": 2.0}, "transcripts=2.0; expected a share"),
    ],
)
def test_invalid_scenes_are_rejected(wrong, message):
    with pytest.raises(ValueError, match=message):
        Scene(**wrong)
