"""Rendering: visible channels, motion of less than a pixel, masks of face and mouth."""

import numpy as np
import pytest
from PIL import Image

from avatar.puppet.identity import KINDS, Identity
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel
from avatar.puppet.render import eyes_region, face_region, layers, mouth_region, regions, render
from avatar.puppet.setting import Setting
from avatar.types import REGIONS


def pose(**channels: float) -> np.ndarray:
    """One state at rest, except for the given channels."""
    state = np.zeros((1, len(CHANNELS)), np.float32)
    for name, value in channels.items():
        state[0, channel(name)] = value
    return state


def test_identities_are_functions_of_their_seeds_and_differ():
    assert Identity.from_seed(5) == Identity.from_seed(5)
    faces = np.concatenate([render(Identity.from_seed(i), pose(), 64) for i in range(40)]).astype(float)
    apart = [np.abs(a - b).mean() for i, a in enumerate(faces) for b in faces[:i]]
    assert min(apart) > 5
    assert {Identity.from_seed(i).species for i in range(40)} == set(KINDS)


@pytest.mark.parametrize("name", CHANNELS)
def test_every_channel_is_visible(name):
    index = channel(name)
    low, high = np.repeat(pose(mouth_open=0.3), 2, axis=0)[:, None]
    low[0, index], high[0, index] = LOW[index], HIGH[index]
    for seed in range(6):
        before, after = (
            render(Identity.from_seed(seed), state, 96, Setting("half")).astype(int) for state in (low, high)
        )
        assert (np.abs(before - after).max(-1) > 40).sum() >= 8, "at least eight pixels change clearly"


def test_the_visible_change_is_proportional_to_the_mouth_opening():
    identity = Identity.from_seed(0)
    openings = np.linspace(0.1, 1, 19)
    frames = np.concatenate([render(identity, pose(mouth_open=o, lid=1), 64) for o in openings]).astype(float)
    inside = frames[:, 38:60, 18:46]
    skin = np.array(identity.palette["skin"])
    changed = np.abs(inside - skin).sum(-1).sum((1, 2))
    assert np.corrcoef(openings, changed)[0, 1] > 0.99
    assert (np.diff(changed) > 0).all(), "each step of 0.05, half a pixel, is visible"


def test_only_an_open_mouth_has_a_dark_opening():
    for seed in range(6):
        identity = Identity.from_seed(seed)
        shut, opened = (render(identity, pose(mouth_open=o), 64)[0] for o in (0.0, 1.0))
        column = np.abs(opened.astype(int) - shut).max(-1)[:, 32] > 30
        assert column.sum() >= 9
        dark = np.array(identity.palette["mouth"])
        assert (np.abs(opened.astype(int) - dark).max(-1) < 12).sum() > 20
        assert (np.abs(shut.astype(int) - dark).max(-1) < 12).sum() == 0


@pytest.mark.parametrize("size", [64, 100, 256])
def test_frames_of_every_size_have_the_same_content(size):
    identity = Identity.from_seed(1)
    frame = render(identity, pose(mouth_open=0.6), size)
    assert frame.shape == (1, size, size, 3) and frame.dtype == np.uint8
    small = Image.fromarray(frame[0]).resize((64, 64), Image.Resampling.BOX)
    difference = np.abs(np.asarray(small, float) - render(identity, pose(mouth_open=0.6), 64)[0])
    assert difference.mean() < 5, "in grey levels; polygons are a quarter of a pixel too large at any size"


def test_the_mouth_region_contains_the_mouth_and_follows_the_head():
    identity = Identity.from_seed(2)
    region = mouth_region(identity, pose(), 64)[0]
    shut, opened = (render(identity, pose(mouth_open=o), 64)[0].astype(int) for o in (0.0, 0.9))
    changed = np.abs(opened - shut).max(-1)
    assert (changed * (region > 0)).sum() > 0.9 * changed.sum()
    assert region.min() == 0 and region.max() == 1 and 0.08 < region.mean() < 0.25
    moved = mouth_region(identity, pose(head_x=0.03), 64)[0]
    columns = np.arange(64)
    shift = ((moved - region).sum(0) * columns).sum() / region.sum()
    assert abs(shift - 0.03 * 64) < 0.1


def area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


@pytest.mark.parametrize("framing", ["portrait", "half"])
def test_the_face_region_is_the_drawn_head(framing):
    """The head is the largest polygon of skin. Hair, eyes and mouth belong to the region; ears and arms do not."""
    for seed in range(4):
        identity, states, setting = Identity.from_seed(seed), pose(head_x=0.03, head_roll=5.0), Setting(framing)
        region = face_region(identity, states, 64, setting)[0]
        assert region.shape == (64, 64) and region.min() == 0 and region.max() == 1
        head = max((64 * part[0] for name, part in layers(identity, states, setting) if name == "skin"), key=area)
        assert region.sum() == pytest.approx(area(head), rel=0.05), "pixels at the edge count by their share"
        rows, columns = np.nonzero(region)
        assert columns.min() == pytest.approx(head[:, 0].min(), abs=1.5)
        assert rows.max() == pytest.approx(head[:, 1].max(), abs=1.5)


def test_regions_are_in_order_and_the_mouth_is_in_the_face():
    identity, states = Identity.from_seed(3), pose(head_yaw=0.2)
    found = dict(zip(REGIONS, regions(identity, states, 64), strict=True))
    np.testing.assert_array_equal(found["lips"], mouth_region(identity, states, 64))
    assert (found["face"] * found["lips"]).sum() > 0.85 * found["lips"].sum() and found["face"].sum() > found[
        "lips"
    ].sum()


@pytest.mark.parametrize("framing", ["portrait", "half"])
def test_the_eyes_region_contains_what_emotions_change_above_the_mouth(framing):
    setting = Setting(framing)
    for seed in range(12):
        identity, calm = Identity.from_seed(seed), pose(head_yaw=0.3, head_roll=2)
        inside, lips = (made(identity, calm, 64, setting)[0] for made in (eyes_region, mouth_region))
        for moved in ({"brow_raise": 1}, {"brow_raise": -0.7, "brow_tilt": 0.9}, {"lid": 1}, {"gaze_x": 0.9}):
            other = pose(head_yaw=0.3, head_roll=2, **moved)
            change = np.abs(
                render(identity, calm, 64, setting)[0].astype(float) - render(identity, other, 64, setting)[0]
            )
            change = change.sum(axis=-1)
            assert (change * inside).sum() > 0.9 * change.sum() > 0, (seed, moved)
        assert inside.sum() < 0.6 * face_region(identity, calm, 64, setting).sum()
        assert (inside * lips).sum() < 0.02 * lips.sum()


def test_other_sizes_and_shapes_are_rejected():
    with pytest.raises(ValueError, match=r"32 pixels.*64 to 256"):
        render(Identity.from_seed(0), pose(), 32)
    with pytest.raises(ValueError, match=r"pass rows of motion\.CHANNELS"):
        render(Identity.from_seed(0), pose()[:, :5], 64)
    with pytest.raises(ValueError, match="seed -1; expected"):
        Identity.from_seed(-1)
