"""Region masks from boxes at every resolution, and the estimated box of a mouth."""

import numpy as np

from avatar.media.regions import box_masks, mouth_box


def test_a_mask_is_the_covered_share_of_each_pixel():
    (found,) = box_masks(np.array([[0.25, 0.0, 0.625, 1.0]]), 2, 4)
    np.testing.assert_allclose(found, [[0, 1, 0.5, 0]] * 2)
    (found,) = box_masks(np.array([[0.3, 0.3, 0.4, 0.45]]), 2, 2)  # inside one pixel
    np.testing.assert_allclose(found, [[0.1 * 0.15 * 4, 0], [0, 0]], atol=1e-12)


def test_a_coarse_mask_is_the_mean_of_a_fine_one():
    """Hence a mask of the latents is that of the image, for every stride."""
    boxes = np.random.default_rng(0).uniform(-0.2, 1.2, (9, 2, 2))
    boxes = np.concatenate([boxes.min(1), boxes.max(1)], axis=1).astype(np.float32)
    fine = box_masks(boxes, 24, 48)
    for edge in (8, 4, 3):
        pooled = fine.reshape(9, 24 // edge, edge, 48 // edge, edge).mean(axis=(2, 4))
        np.testing.assert_allclose(box_masks(boxes, 24 // edge, 48 // edge), pooled, atol=1e-6)
    inside = np.clip(boxes, 0, 1)
    area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
    np.testing.assert_allclose(fine.mean(axis=(1, 2)), area, atol=1e-6)


def test_a_missing_box_has_an_empty_mask():
    assert not box_masks(np.full((2, 4), np.nan), 3, 3).any()
    assert not box_masks(np.array([[0.1, np.nan, 0.9, 0.9]]), 3, 3).any()


def test_the_mouth_is_the_middle_of_the_lower_third_of_the_face():
    faces = np.array([[0.2, 0.1, 0.6, 0.7], [np.nan] * 4])
    np.testing.assert_allclose(mouth_box(faces), [[0.3, 0.5, 0.5, 0.7], [np.nan] * 4])
