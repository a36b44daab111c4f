"""Counterfactual pairs: true clips follow every control, equal clips follow none, and one input differs."""

from dataclasses import replace

import hydra
import numpy as np
import pytest
import torch

from avatar.commands.control_pairs import controls
from avatar.commands.held_out import HeldOutClips
from avatar.commands.obedience import acted, obedience
from avatar.data.clip_encoding import ClipSet
from avatar.metrics.control import CLASSIFIERS
from avatar.puppet.clip import HELD_OUT, Acting, make_clip
from avatar.puppet.gestures import Event
from avatar.puppet.motion import channel
from avatar.puppet.worlds import StateWorld
from avatar.types import EMOTIONS, STATES
from tests.stages import composed

COUNT = 12


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    cfg = composed(
        "train", "autoencoder=states", "model=states", "scene=full", "scene.things=1.0", "scene.looks_hz=0.4"
    )
    clips = ClipSet("dev", "mixed", COUNT, 14, scene=hydra.utils.instantiate(cfg.scene))
    parts = (hydra.utils.instantiate(cfg[name]) for name in ("autoencoder", "audio", "text"))
    return HeldOutClips(StateWorld(), *parts, None, clips, tmp_path_factory.mktemp("cache"), 0)


def test_true_clips_follow_every_control(held_out):
    made = {one.name: one for one in controls(held_out, COUNT)}
    assert set(made) == {
        *("emotion", "emotion_text", "emotion_label_over_text", "head_gesture", "arm_gesture", "gesture_text"),
        *("point_at", "look_text", "state"),
    }
    assert {*made["head_gesture"].labels, *made["arm_gesture"].labels} == {"nod", "shake", "shrug", "wave", "point"}
    assert set(made["gesture_text"].labels) == {"nod", "shake", "shrug", "wave", "point"}
    true = [video[:, : 4 * 14] for video in held_out.ground_truth()]
    scores, shown = obedience(held_out, COUNT, lambda cond, clips, title: [true[i] for i in clips])
    for name, found in scores.items():
        # A calm listener may not nod within the clip; idle eyes may rest on the thing by themselves.
        assert found["truth"] >= (0.7 if name in ("state", "look_text") else 0.9), (name, found)
        assert found["autoencoder"] == found["truth"]  # states are coded without loss
        assert found["accuracy"] == 0 and found["stayed"] == 1 and found["ratio"] == 0  # it generates the same twice
        assert found["pairs"] == len(made[name].clips)
        assert len(shown[name]) == min(3, found["pairs"])


def test_intensities_are_read_from_true_clips(held_out):
    one = next(one for one in controls(held_out, COUNT) if one.name == "emotion")

    def generate(cond, clips, title):
        side = one.after if title.startswith("emotion, with") and "without" not in title else None
        acting = [None] * len(clips) if side is None else side.acting
        made = [
            held_out.truth[i] if act is None else held_out.acted(i, act) for i, act in zip(clips, acting, strict=True)
        ]
        return [held_out.world.video(clip, 1, 1 + 4 * 14) for clip in made]

    scores, _ = obedience(held_out, COUNT, generate)
    assert scores["emotion"]["intensity_rank_correlation"] > 0.8


def test_the_sides_of_a_pair_differ_in_one_control_only(held_out):
    changed = {
        "emotion": {"emotion", "emotion_intensity"},
        "emotion_text": {"text", "text_mask"},
        "head_gesture": {"gesture"},
        "arm_gesture": {"gesture"},
        "gesture_text": {"text", "text_mask", "text_event"},
        "state": {"state"},
        "emotion_label_over_text": {"emotion"},
        "point_at": {"gesture"},
        "look_text": {"text", "text_mask", "text_event"},
    }
    for one in controls(held_out, COUNT):
        before, after = one.before.cond, one.after.cond
        different = {
            name
            for name in before.given
            if getattr(before, name).shape != getattr(after, name).shape
            or not torch.equal(getattr(before, name), getattr(after, name))
        }
        assert different <= changed[one.name] and different, one.name
        if one.name.endswith("_text"):
            assert after.text_mask.any()
            assert one.name == "emotion_label_over_text" or not (before.emotion.any() or after.gesture.any())
        else:
            assert not before.text_mask.any() and not after.text_mask.any()
        assert set(one.labels) <= set(CLASSIFIERS[one.attribute][1][1:])


def test_a_prompt_in_mid_clip_is_attended_to_in_its_latents_only(held_out):
    one = next(one for one in controls(held_out, COUNT) if one.name == "gesture_text")
    event = one.after.cond.text_event
    assert event.max() == 1 and (event[:, 0] == 0).all() and (event[:, -1] == 0).all()
    part = slice(one.frames.start // 4, one.frames.stop // 4)
    assert (event[:, part] == 1).all() and event.sum() == event[:, part].sum()


def test_acting_changes_the_face_and_keeps_the_voice():
    plain = make_clip(3, "dev", 60, backend="formant")
    sad = make_clip(3, "dev", 60, backend="formant", acting=Acting("sad", 1.0))
    nod = make_clip(3, "dev", 60, backend="formant", acting=Acting("sad", 1.0, (Event("nod", 10, 40, 1),)))
    assert (plain.own == sad.own).all() and set(sad.emotion) == {EMOTIONS.index("sad")}
    same = np.abs(plain.states - sad.states)[:, channel("mouth_open")].max()
    assert same == 0 and np.abs(plain.states - sad.states).max() > 0.2
    moved = np.abs(nod.states - sad.states).max(1) > 0.05
    assert not moved[:9].any() and moved[14:36].all() and not moved[42:].any()
    silent = make_clip(3, "dev", 60, backend="formant", acting=Acting("sad", silent="listening"))
    assert not silent.own.any() and not silent.other.any() and set(silent.state) == {STATES.index("listening")}
    assert silent.states[:, channel("mouth_open")].max() == 0


def test_without_a_thing_there_is_none_to_look_or_point_at(held_out):
    plain = [replace(clip, setting=replace(clip.setting, thing=None)) for clip in held_out.truth]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "truth", plain)
        assert {one.name for one in controls(held_out, COUNT)} & {"point_at", "look_text"} == set()


def test_a_prompt_that_names_the_old_emotion_stays_in_both_clips(held_out):
    one = next(one for one in controls(held_out, COUNT) if one.name == "emotion_label_over_text")
    by_text = next(one for one in controls(held_out, COUNT) if one.name == "emotion_text")
    assert torch.equal(one.before.cond.text, by_text.before.cond.text)
    assert torch.equal(one.after.cond.text, one.before.cond.text)
    assert (one.before.cond.emotion != one.after.cond.emotion).all()


def test_combinations_that_training_clips_never_have_are_scored_apart(held_out):
    """Of the acted pairs, those of unseen combinations are generated as if the label had no effect."""

    def generate(cond, clips, title):
        one = next(c for c in made if title.startswith(f"{c.name.replace('_', ' ')}, "))
        acting = (one.before if "without" in title else one.after).acting
        unseen = [
            (label, held_out.truth[i].identity.kind) in HELD_OUT for label, i in zip(one.labels, clips, strict=True)
        ]
        sides = [b if new else a for a, b, new in zip(acting, one.before.acting, unseen, strict=True)]
        return acted(held_out, clips, sides)

    made = controls(held_out, COUNT)
    scores, _ = obedience(held_out, COUNT, generate)
    kinds = [held_out.truth[i].identity.kind for i in range(COUNT)]
    emotion = next(one for one in made if one.name == "emotion")
    assert scores["emotion"]["unseen_pairs"] == sum(p in HELD_OUT for p in zip(emotion.labels, kinds, strict=True)) > 0
    assert scores["emotion"]["seen_accuracy"] > 0.9 and scores["emotion"]["unseen_accuracy"] == 0
