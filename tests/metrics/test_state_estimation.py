"""State estimation by both readers against the truth, with invalid frames and shapes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from avatar.metrics.state_estimation import PixelReader, StateReader, VideoReader, closure_times, silent_frames
from avatar.puppet.clip import make_clip
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel
from avatar.puppet.scene import Scene
from avatar.puppet.state_estimator import visible_channels
from avatar.puppet.worlds import PixelWorld, StateWorld
from avatar.types import FRAME_RATE


def test_both_readers_agree(clips, true_estimates):
    clip, pixels = clips[0], true_estimates[0]
    states = StateReader().read(clip, StateWorld().video(clip, 0, len(clip.states)))
    assert isinstance(StateReader(), VideoReader) and isinstance(PixelReader(64), VideoReader)
    np.testing.assert_array_equal(states.mouth_open, clip.states[:, 0])
    np.testing.assert_allclose(states.motion[1:], states.truth_motion[1:])
    assert states.valid.all() and pixels.valid.all() and np.isnan(states.delta_e).all()
    assert np.abs(pixels.mouth_open - states.mouth_open).mean() < 0.03
    assert np.corrcoef(pixels.motion[1:], states.motion[1:])[0, 1] > 0.9


def test_channels_are_estimated_and_invisible_ones_are_nan(clips, true_estimates):
    clip, pixels = clips[0], true_estimates[0]
    states = StateReader().read(clip, StateWorld().video(clip, 0, len(clip.states)))
    np.testing.assert_array_equal(states.states, clip.states)
    np.testing.assert_array_equal(pixels.truth_states, clip.states)
    shown = np.isin(CHANNELS, visible_channels(clip.setting))
    assert np.isnan(pixels.states[:, ~shown]).all()
    errors = np.abs(pixels.states - clip.states)[:, shown] / (HIGH - LOW)[shown]
    assert errors.mean() < 0.03
    np.testing.assert_array_equal(pixels.mouth_open, pixels.states[:, 0])
    for name in ("state", "emotion", "gesture", "doing"):
        np.testing.assert_array_equal(getattr(pixels, name), getattr(clip, name))
    half = replace(states, valid=np.arange(len(states)) < 60)
    assert np.isnan(half.trajectory[60:]).all() and (half.trajectory[:60] == clip.states[:60]).all()


@pytest.mark.slow
def test_visible_arms_are_estimated():
    scene = Scene(framings={"half": 1.0}, commands_hz=2.0)
    clip = make_clip(3, "test", 40, "speaking", backend="formant", directed=scene)
    estimated = PixelReader(64).read(clip, PixelWorld(64).video(clip, 0, 40))
    upper = [channel("upper_l"), channel("upper_r")]
    assert estimated.valid.mean() > 0.9 and np.ptp(clip.states[:, upper], axis=0).max() > 0.3
    assert np.abs(estimated.states - clip.states)[:, upper].mean() < 0.1 and estimated.delta_e.mean() < 3


def test_a_crop_has_its_own_truth(clips, videos, true_estimates):
    crop, part = PixelReader(64).read(clips[0], videos[0][:, 30:60], start=30), true_estimates[0].between(30, 60)
    np.testing.assert_array_equal(crop.truth_mouth, clips[0].states[30:60, 0])
    np.testing.assert_allclose(crop.mouth_open, part.mouth_open, atol=1e-3)
    np.testing.assert_array_equal(crop.silent, part.silent)
    np.testing.assert_array_equal(crop.closures_s, part.closures_s)
    np.testing.assert_array_equal(crop.truth_states, part.truth_states)
    assert (crop.closures_s >= 0).all() and (crop.closures_s < 30 / FRAME_RATE).all()


def test_mouths_are_closed_in_silence_and_at_closures(clips):
    for clip in clips:
        assert 0 < silent_frames(clip).sum() < len(clip.states) and clip.states[silent_frames(clip), 0].max() < 0.05
        at = (closure_times(clip) * FRAME_RATE).astype(int)
        assert len(at) and clip.states[at, 0].max() < 0.15


def test_frames_with_nan_or_without_the_puppet_are_invalid(clips, videos):
    changed = videos[0][:, :10].clone()
    changed[1, 4, 20, 20] = float("nan")
    changed[:, 7] = torch.rand(3, 64, 64) * 2 - 1
    estimated = PixelReader(64).read(clips[0], changed)
    assert list(np.flatnonzero(~estimated.valid)) == [4, 7]
    assert list(np.flatnonzero(np.isnan(estimated.motion))) == [0, 4, 5, 7, 8]
    states = StateWorld().video(clips[0], 0, 10)
    states[2, 3], states[0, 6] = float("nan"), 1.6
    estimated = StateReader().read(clips[0], states)
    assert list(np.flatnonzero(~estimated.valid)) == [3, 6] and np.isfinite(estimated.mouth_open).all()


def test_frames_of_another_shape_or_beyond_the_clip_are_rejected(clips, videos):
    with pytest.raises(ValueError, match="expected \\[3, f, 96, 96\\]"):
        PixelReader(96).read(clips[0], videos[0])
    with pytest.raises(ValueError, match="read frames with PixelReader"):
        StateReader().read(clips[0], videos[0])
    states = StateWorld().video(clips[0], 0, 120)
    with pytest.raises(ValueError, match="from frame 10 on; expected at most the 120 of clip"):
        StateReader().read(clips[0], states, start=10)
