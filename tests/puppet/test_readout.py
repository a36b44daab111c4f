"""The read-out against known truth: exact on clean frames, robust to what autoencoders do, and honest about what it
can't read.
"""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from avatar.puppet.clip import make_clip
from avatar.puppet.identity import Identity
from avatar.puppet.motion import HIGH, LOW, channel
from avatar.puppet.readout import WITH_ARMS, Readout, lab, palette_error, readable
from avatar.puppet.scene import Scene
from avatar.types import REGIONS

SEEDS = (4, 9)  # a person and a cat


@pytest.fixture(scope="module", params=SEEDS)
def scene(request):
    clip = make_clip(request.param, "test", 120, "speaking", backend="formant")
    return clip, clip.frames(64), Readout(clip.identity, 64)


def worn(frames: np.ndarray, blur: float = 1.0, noise: float = 8.0, tint=(1.0, 1.0, 1.0)) -> np.ndarray:
    """Frames as an autoencoder may return them."""
    rng = np.random.default_rng(0)
    out = gaussian_filter(frames.astype(float), (0, blur, blur, 0)) * tint
    return (out + rng.normal(0, noise, out.shape)).clip(0, 255).astype(np.uint8)


def erased(clip, frames: np.ndarray) -> np.ndarray:
    """Frames whose mouth is painted over."""
    colour = clip.identity.palette["muzzle" if clip.identity.muzzle else "skin"]
    return np.where((clip.regions(frames.shape[1])[REGIONS.index("lips")] > 0.35)[..., None], np.uint8(colour), frames)


def agreement(clip, reading, name: str) -> float:
    return np.corrcoef(clip.states[:, channel(name)], reading.column(name))[0, 1]


def test_clean_frames_are_read_exactly(scene):
    clip, frames, readout = scene
    reading = readout.read(frames)
    assert reading.valid.all() and reading.residual.max() < 0.1
    assert agreement(clip, reading, "mouth_open") > 0.995
    error = np.abs(reading.states - clip.states) / (HIGH - LOW)
    for name, bound in (("mouth_open", 0.03), ("head_x", 0.01), ("head_y", 0.01), ("head_roll", 0.01), ("lid", 0.04)):
        assert error[:, channel(name)].mean() < bound, name
    assert error[:, channel("smile")].mean() < 0.05 and error[:, channel("mouth_wide")].mean() < 0.06


def test_blurred_noisy_and_tinted_frames_are_still_read(scene):
    clip, frames, readout = scene
    for spoilt in (worn(frames), worn(frames, tint=(1.05, 0.97, 0.95)), worn(frames, blur=1.6, noise=4)):
        reading = readout.read(spoilt)
        assert reading.valid.all()
        assert agreement(clip, reading, "mouth_open") > 0.98
        assert agreement(clip, reading, "head_x") > 0.95


def test_an_erased_mouth_noise_and_another_puppet_are_not_believed(scene):
    clip, frames, readout = scene
    assert not readout.read(erased(clip, frames)).valid.any()
    assert not readout.read(worn(erased(clip, frames))).valid.any()
    noise = np.random.default_rng(0).integers(0, 256, frames[:20].shape, dtype=np.uint8)
    assert not readout.read(noise).valid.any()
    assert not readout.read(make_clip(clip.identity.seed + 77, "test", 20, backend="formant").frames(64)).valid.any()


def test_a_reading_follows_the_mouth_and_not_its_own_habits(scene):
    _, frames, readout = scene
    order = np.random.default_rng(0).permutation(len(frames))
    np.testing.assert_allclose(readout.read(frames[order]).states, readout.read(frames).states[order], atol=1e-3)


def test_larger_frames_are_read_as_well():
    clip = make_clip(0, "test", 60, "speaking", backend="formant")
    reading = Readout(clip.identity, 96).read(clip.frames(96))
    assert reading.valid.all() and agreement(clip, reading, "mouth_open") > 0.99


def test_the_palette_error_is_nought_for_the_puppet_small_when_worn_and_large_for_another(scene):
    clip, frames, _ = scene
    states, other = clip.states[:20], Identity.from_seed(clip.identity.seed + 3)
    own = palette_error(clip.identity, frames[:20], states)
    spoilt = palette_error(clip.identity, worn(frames[:20]), states)
    tinted = palette_error(clip.identity, worn(frames[:20], tint=(1.1, 0.95, 0.9)), states)
    foreign = palette_error(other, frames[:20], states)
    assert own.max() < 0.5 and spoilt.max() < 2.5 < tinted.min() and tinted.max() < foreign.min()
    np.testing.assert_allclose(lab(np.array([255.0, 255.0, 255.0])), (100, 0, 0), atol=0.01)
    np.testing.assert_allclose(lab(np.array([255.0, 0.0, 0.0])), (53.24, 80.09, 67.20), atol=0.02)


def test_frames_of_another_size_are_refused(scene):
    readout = scene[2]
    with pytest.raises(ValueError, match="built for uint8"):
        readout.read(np.zeros((1, 96, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="64 to 256"):
        Readout(Identity.from_seed(0), 48)


@pytest.mark.parametrize("framing", ["half", "full"])
def test_bodies_are_read_by_parts(framing):
    directed = Scene(framings={framing: 1.0}, backdrops=("room",), commands_hz=1.0, things=1.0)
    clip = make_clip(12, "test", 150, "speaking", backend="formant", directed=directed)  # shakes its head and shrugs
    assert len(set(clip.doing)) >= 3
    readout = Readout(clip.identity, 64, clip.setting)
    reading = readout.read(clip.frames(64))
    assert reading.valid.mean() > 0.95
    assert agreement(clip, reading, "mouth_open") > 0.99
    moved = [name for name in WITH_ARMS if np.std(clip.states[:, channel(name)]) > 0.05 and "hand" not in name]
    assert {"head_yaw", "shoulders", "fore_l", "fore_r"} <= set(moved)
    for name in ("head_yaw", "shoulders", "fore_l", "fore_r", "upper_l", "upper_r"):
        assert name not in moved or agreement(clip, reading, name) > 0.95, name
    error = np.abs(reading.states - clip.states) / (HIGH - LOW)
    assert max(error[:, channel(name)].mean() for name in readable(clip.setting)) < 0.08
    assert not readout.read(replace(clip, identity=Identity.from_seed(5)).frames(64)).valid.any()
    assert np.median(palette_error(clip.identity, clip.frames(64), reading.states, clip.setting)) < 1


def test_a_raised_arm_is_told_from_the_other():
    """Both arms explain their own side: a bank that mixed them up would raise both."""
    clip = make_clip(0, "test", 40, "speaking", backend="formant", directed=Scene(framings={"half": 1.0}))
    states = clip.states.copy()
    states[:, channel("upper_l")], states[:, channel("fore_l")], states[:, channel("hand_l")] = 0.6, 0.55, 1.0
    reading = Readout(clip.identity, 64, clip.setting).read(replace(clip, states=states).frames(64))
    assert np.abs(reading.column("upper_l") - 0.6).max() < 0.08 and np.abs(reading.column("fore_l") - 0.55).max() < 0.1
    assert np.abs(reading.column("upper_r") - 0.05).max() < 0.08
