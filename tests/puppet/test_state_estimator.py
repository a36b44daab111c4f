"""State estimation against the truth: clean, degraded and invalid frames, bodies and arms, and colour errors."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from avatar.puppet.clip import make_clip
from avatar.puppet.identity import Identity
from avatar.puppet.motion import HIGH, LOW, channel
from avatar.puppet.scene import Scene
from avatar.puppet.state_estimator import BODY_CHANNELS, StateEstimator, lab, palette_error, visible_channels
from avatar.types import REGIONS

SEEDS = (4, 9)  # a person and a cat


@pytest.fixture(scope="module", params=SEEDS)
def scene(request):
    clip = make_clip(request.param, "test", 120, "speaking", backend="formant")
    return clip, clip.frames(64), StateEstimator(clip.identity, 64)


def degraded(frames: np.ndarray, blur: float = 1.0, noise: float = 8.0, tint=(1.0, 1.0, 1.0)) -> np.ndarray:
    """Frames as an autoencoder may decode them: blurred, noisy, tinted."""
    rng = np.random.default_rng(0)
    out = gaussian_filter(frames.astype(float), (0, blur, blur, 0)) * tint
    return (out + rng.normal(0, noise, out.shape)).clip(0, 255).astype(np.uint8)


def without_mouth(clip, frames: np.ndarray) -> np.ndarray:
    """Frames with the mouth painted over."""
    colour = clip.identity.palette["muzzle" if clip.identity.muzzle else "skin"]
    return np.where((clip.regions(frames.shape[1])[REGIONS.index("lips")] > 0.35)[..., None], np.uint8(colour), frames)


def agreement(clip, estimate, name: str) -> float:
    return np.corrcoef(clip.states[:, channel(name)], estimate.column(name))[0, 1]


def test_clean_frames_are_estimated_exactly(scene):
    clip, frames, estimator = scene
    estimate = estimator.estimate(frames)
    assert estimate.valid.all() and estimate.residual.max() < 0.1
    assert agreement(clip, estimate, "mouth_open") > 0.995
    error = np.abs(estimate.states - clip.states) / (HIGH - LOW)
    for name, bound in (
        ("mouth_open", 0.03),
        ("head_x", 0.01),
        ("head_y", 0.01),
        ("head_roll", 0.01),
        ("lid", 0.04),
        ("gaze_x", 0.04),
    ):
        assert error[:, channel(name)].mean() < bound, name
    assert error[:, channel("smile")].mean() < 0.05 and error[:, channel("mouth_wide")].mean() < 0.06


def test_degraded_frames_are_estimated(scene):
    clip, frames, estimator = scene
    for changed in (degraded(frames), degraded(frames, tint=(1.05, 0.97, 0.95)), degraded(frames, blur=1.6, noise=4)):
        estimate = estimator.estimate(changed)
        assert estimate.valid.all()
        assert agreement(clip, estimate, "mouth_open") > 0.98
        assert agreement(clip, estimate, "head_x") > 0.95


@pytest.mark.parametrize("framing", ["portrait", "half"])
def test_looks_to_a_side_are_estimated(framing):
    directed = Scene(framings={framing: 1.0}, backdrops=("room",), looks_hz=0.4, things=1.0)
    clip = make_clip(3, "test", 100, "speaking", backend="formant", directed=directed)
    shown = StateEstimator(clip.identity, 64, clip.setting).estimate(degraded(clip.frames(64), blur=0.5))
    gaze = np.abs(clip.states[:, channel("gaze_x")])
    aside, clear = gaze > 0.7, (gaze > 0.7) | (gaze < 0.3)
    assert 0.2 < aside.mean() < 0.9
    assert np.mean(((np.abs(shown.column("gaze_x")) > 0.5) == aside)[clear]) > 0.85


def test_a_missing_mouth_noise_and_another_puppet_are_invalid(scene):
    clip, frames, estimator = scene
    assert not estimator.estimate(without_mouth(clip, frames)).valid.any()
    assert not estimator.estimate(degraded(without_mouth(clip, frames))).valid.any()
    noise = np.random.default_rng(0).integers(0, 256, frames[:20].shape, dtype=np.uint8)
    assert not estimator.estimate(noise).valid.any()
    other = make_clip(clip.identity.seed + 77, "test", 20, backend="formant")
    assert not estimator.estimate(other.frames(64)).valid.any()


def test_estimates_do_not_depend_on_the_order_of_frames(scene):
    _, frames, estimator = scene
    order = np.random.default_rng(0).permutation(len(frames))
    shuffled, in_order = estimator.estimate(frames[order]), estimator.estimate(frames)
    np.testing.assert_allclose(shuffled.states, in_order.states[order], atol=1e-3)


def test_larger_frames_are_estimated():
    clip = make_clip(0, "test", 60, "speaking", backend="formant")
    estimate = StateEstimator(clip.identity, 96).estimate(clip.frames(96))
    assert estimate.valid.all() and agreement(clip, estimate, "mouth_open") > 0.99


def test_the_palette_error_orders_clean_degraded_tinted_and_other_puppets(scene):
    clip, frames, _ = scene
    states, other = clip.states[:20], Identity.from_seed(clip.identity.seed + 3)
    own = palette_error(clip.identity, frames[:20], states)
    changed = palette_error(clip.identity, degraded(frames[:20]), states)
    tinted = palette_error(clip.identity, degraded(frames[:20], tint=(1.1, 0.95, 0.9)), states)
    foreign = palette_error(other, frames[:20], states)
    assert own.max() < 0.5 and changed.max() < 2.5 < tinted.min() and tinted.max() < foreign.min()
    np.testing.assert_allclose(lab(np.array([255.0, 255.0, 255.0])), (100, 0, 0), atol=0.01)
    np.testing.assert_allclose(lab(np.array([255.0, 0.0, 0.0])), (53.24, 80.09, 67.20), atol=0.02)


def test_frames_of_another_size_are_rejected(scene):
    estimator = scene[2]
    with pytest.raises(ValueError, match="expected uint8 of"):
        estimator.estimate(np.zeros((1, 96, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="64 to 256"):
        StateEstimator(Identity.from_seed(0), 48)


@pytest.mark.parametrize("framing", ["half", "full"])
def test_bodies_are_estimated(framing):
    directed = Scene(framings={framing: 1.0}, backdrops=("room",), commands_hz=1.0, things=1.0)
    clip = make_clip(12, "test", 150, "speaking", backend="formant", directed=directed)  # shakes its head and shrugs
    assert len(set(clip.doing)) >= 3
    estimator = StateEstimator(clip.identity, 64, clip.setting)
    estimate = estimator.estimate(clip.frames(64))
    assert estimate.valid.mean() > 0.95
    assert agreement(clip, estimate, "mouth_open") > 0.99
    moved = [name for name in BODY_CHANNELS if np.std(clip.states[:, channel(name)]) > 0.05 and "hand" not in name]
    assert {"head_yaw", "shoulders", "fore_l", "fore_r"} <= set(moved)
    for name in ("head_yaw", "shoulders", "fore_l", "fore_r", "upper_l", "upper_r"):
        assert name not in moved or agreement(clip, estimate, name) > 0.95, name
    error = np.abs(estimate.states - clip.states) / (HIGH - LOW)
    assert max(error[:, channel(name)].mean() for name in visible_channels(clip.setting)) < 0.08
    assert not estimator.estimate(replace(clip, identity=Identity.from_seed(5)).frames(64)).valid.any()
    assert np.median(palette_error(clip.identity, clip.frames(64), estimate.states, clip.setting)) < 1


def test_only_the_raised_arm_is_raised():
    """Each arm is estimated from its own side of the frame: an error would raise both."""
    clip = make_clip(0, "test", 40, "speaking", backend="formant", directed=Scene(framings={"half": 1.0}))
    states = clip.states.copy()
    states[:, channel("upper_l")], states[:, channel("fore_l")], states[:, channel("hand_l")] = 0.6, 0.55, 1.0
    estimate = StateEstimator(clip.identity, 64, clip.setting).estimate(replace(clip, states=states).frames(64))
    assert (
        np.abs(estimate.column("upper_l") - 0.6).max() < 0.08 and np.abs(estimate.column("fore_l") - 0.55).max() < 0.1
    )
    assert np.abs(estimate.column("upper_r") - 0.05).max() < 0.08
