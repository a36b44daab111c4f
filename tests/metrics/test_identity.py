"""Colour error and the rate of undecodable frames."""

import numpy as np
import pytest

from avatar.media.frames import from_uint8
from avatar.metrics import identity
from avatar.metrics.state_estimation import PixelReader
from avatar.puppet.identity import Identity
from avatar.puppet.render import render


def test_the_colour_error_is_small_for_the_right_puppet_and_large_for_another(clips, videos, true_estimates):
    clip = clips[0]
    other = from_uint8(render(Identity.from_seed(clip.identity.seed + 3), clip.states[:20], 64))
    tint = (videos[0][:, :20] * 0.85 + 0.1).clamp(-1, 1)
    right, tinted, wrong = (
        identity.delta_e([r])
        for r in (true_estimates[0], *(PixelReader(64).read(clip, video) for video in (tint, other)))
    )
    assert right < 0.5 < 2 < tinted < 15 < wrong


def test_the_undecodable_rate_is_a_share_of_all_frames(estimated):
    clips = [estimated(frames=100), estimated(frames=300, valid=np.arange(300) >= 40)]
    assert identity.undecodable_rate(clips) == pytest.approx(0.1)
    assert np.isnan(identity.undecodable_rate([])) and np.isnan(identity.delta_e([]))
