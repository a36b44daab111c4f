"""Boxes become shares of pixels, exactly, at every resolution; a mouth is estimated in its face."""

import numpy as np

from avatar.media.regions import mouth_in, shares


def test_a_box_covers_pixels_by_their_area():
    (found,) = shares(np.array([[0.25, 0.0, 0.625, 1.0]]), 2, 4)
    np.testing.assert_allclose(found, [[0, 1, 0.5, 0]] * 2)
    (found,) = shares(np.array([[0.3, 0.3, 0.4, 0.45]]), 2, 2)  # inside of one pixel
    np.testing.assert_allclose(found, [[0.1 * 0.15 * 4, 0], [0, 0]], atol=1e-12)


def test_coarse_pixels_have_the_mean_of_the_fine_ones():
    """So that a mask on the grid of latents is that of the picture, whatever the stride."""
    boxes = np.random.default_rng(0).uniform(-0.2, 1.2, (9, 2, 2))
    boxes = np.concatenate([boxes.min(1), boxes.max(1)], axis=1).astype(np.float32)
    fine = shares(boxes, 24, 48)
    for edge in (8, 4, 3):
        pooled = fine.reshape(9, 24 // edge, edge, 48 // edge, edge).mean(axis=(2, 4))
        np.testing.assert_allclose(shares(boxes, 24 // edge, 48 // edge), pooled, atol=1e-6)
    inside = np.clip(boxes, 0, 1)
    area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
    np.testing.assert_allclose(fine.mean(axis=(1, 2)), area, atol=1e-6)


def test_where_no_box_is_nothing_is_covered():
    assert not shares(np.full((2, 4), np.nan), 3, 3).any()
    assert not shares(np.array([[0.1, np.nan, 0.9, 0.9]]), 3, 3).any()


def test_the_mouth_is_taken_for_the_middle_of_the_faces_lower_third():
    faces = np.array([[0.2, 0.1, 0.6, 0.7], [np.nan] * 4])
    np.testing.assert_allclose(mouth_in(faces), [[0.3, 0.5, 0.5, 0.7], [np.nan] * 4])
