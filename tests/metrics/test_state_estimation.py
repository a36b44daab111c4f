"""Both readers against known truth, and what they do with frames that aren't there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from avatar.metrics.state_estimation import PixelReader, StateReader, VideoReader, closures, silence
from avatar.puppet.clip import make_clip
from avatar.puppet.motion import CHANNELS, HIGH, LOW, channel
from avatar.puppet.readout import readable
from avatar.puppet.scene import Scene
from avatar.puppet.worlds import PixelWorld, StateWorld
from avatar.types import FRAME_RATE


def test_pixels_and_states_are_read_alike(clips, true_readings):
    clip, pixels = clips[0], true_readings[0]
    states = StateReader().read(clip, StateWorld().video(clip, 0, len(clip.states)))
    assert isinstance(StateReader(), VideoReader) and isinstance(PixelReader(64), VideoReader)
    np.testing.assert_array_equal(states.mouth_open, clip.states[:, 0])
    np.testing.assert_allclose(states.motion[1:], states.truth_motion[1:])
    assert states.valid.all() and pixels.valid.all() and np.isnan(states.delta_e).all()
    assert np.abs(pixels.mouth_open - states.mouth_open).mean() < 0.03
    assert np.corrcoef(pixels.motion[1:], states.motion[1:])[0, 1] > 0.9


def test_all_channels_are_read_beside_the_truth_and_those_that_are_not_shown_are_unknown(clips, true_readings):
    clip, pixels = clips[0], true_readings[0]
    states = StateReader().read(clip, StateWorld().video(clip, 0, len(clip.states)))
    np.testing.assert_array_equal(states.states, clip.states)
    np.testing.assert_array_equal(pixels.truth_states, clip.states)
    shown = np.isin(CHANNELS, readable(clip.setting))
    assert np.isnan(pixels.states[:, ~shown]).all()
    errors = np.abs(pixels.states - clip.states)[:, shown] / (HIGH - LOW)[shown]
    assert errors.mean() < 0.03
    np.testing.assert_array_equal(pixels.mouth_open, pixels.states[:, 0])
    for name in ("state", "emotion", "gesture", "doing"):
        np.testing.assert_array_equal(getattr(pixels, name), getattr(clip, name))
    half = replace(states, valid=np.arange(len(states)) < 60)
    assert np.isnan(half.trajectory[60:]).all() and (half.trajectory[:60] == clip.states[:60]).all()


@pytest.mark.slow
def test_arms_are_read_where_the_camera_shows_them():
    scene = Scene(framings={"half": 1.0}, commands_hz=2.0)
    clip = make_clip(3, "test", 40, "speaking", backend="formant", directed=scene)
    reading = PixelReader(64).read(clip, PixelWorld(64).video(clip, 0, 40))
    upper = [channel("upper_l"), channel("upper_r")]
    assert reading.valid.mean() > 0.9 and np.ptp(clip.states[:, upper], axis=0).max() > 0.3
    assert np.abs(reading.states - clip.states)[:, upper].mean() < 0.1 and reading.delta_e.mean() < 3


def test_a_crop_is_read_beside_its_own_truth(clips, videos, true_readings):
    crop, whole = PixelReader(64).read(clips[0], videos[0][:, 30:60], start=30), true_readings[0].between(30, 60)
    np.testing.assert_array_equal(crop.truth_mouth, clips[0].states[30:60, 0])
    np.testing.assert_allclose(crop.mouth_open, whole.mouth_open, atol=1e-3)
    np.testing.assert_array_equal(crop.silent, whole.silent)
    np.testing.assert_array_equal(crop.closures_s, whole.closures_s)
    np.testing.assert_array_equal(crop.truth_states, whole.truth_states)
    assert (crop.closures_s >= 0).all() and (crop.closures_s < 30 / FRAME_RATE).all()


def test_silent_frames_have_shut_mouths_and_closures_shut_lips(clips):
    for clip in clips:
        assert 0 < silence(clip).sum() < len(clip.states) and clip.states[silence(clip), 0].max() < 0.05
        at = (closures(clip) * FRAME_RATE).astype(int)
        assert len(at) and clip.states[at, 0].max() < 0.15


def test_frames_that_are_not_numbers_or_not_a_puppet_are_not_valid(clips, videos):
    spoilt = videos[0][:, :10].clone()
    spoilt[1, 4, 20, 20] = float("nan")
    spoilt[:, 7] = torch.rand(3, 64, 64) * 2 - 1
    reading = PixelReader(64).read(clips[0], spoilt)
    assert list(np.flatnonzero(~reading.valid)) == [4, 7]
    assert list(np.flatnonzero(np.isnan(reading.motion))) == [0, 4, 5, 7, 8]
    states = StateWorld().video(clips[0], 0, 10)
    states[2, 3], states[0, 6] = float("nan"), 1.6
    reading = StateReader().read(clips[0], states)
    assert list(np.flatnonzero(~reading.valid)) == [3, 6] and np.isfinite(reading.mouth_open).all()


def test_frames_of_another_shape_or_beyond_the_clip_are_refused(clips, videos):
    with pytest.raises(ValueError, match="takes \\[3, f, 96, 96\\]"):
        PixelReader(96).read(clips[0], videos[0])
    with pytest.raises(ValueError, match="read pixels with PixelReader"):
        StateReader().read(clips[0], videos[0])
    states = StateWorld().video(clips[0], 0, 120)
    with pytest.raises(ValueError, match="from frame 10 on, but the clip"):
        StateReader().read(clips[0], states, start=10)
