"""Random masks: the promised coverage, every kind of shape, and the same again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from mtu_compile.core.masks import random_mask


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (16, 16)])
def test_masks_cover_10_to_60_percent(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    masks = [random_mask(rng, height, width) for _ in range(200)]
    covered = [float((mask > 0).mean()) for mask in masks]
    assert min(covered) >= 0.1 and max(covered) <= 0.6 and max(covered) - min(covered) > 0.3
    assert all(mask.shape == (height, width) and set(np.unique(mask)) <= {0, 255} for mask in masks)
    # No corner or side is always left alone.
    assert (np.mean(masks, axis=0) > 0).all()


def test_masks_are_rectangles_and_other_shapes() -> None:
    rng = np.random.default_rng(0)
    filled = []
    for _ in range(100):
        rows, columns = np.nonzero(random_mask(rng, 64, 64))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        filled.append(len(rows) / box)
    assert 10 < sum(share == 1.0 for share in filled) < 60  # rectangles fill their bounding box
    assert sum(share < 0.7 for share in filled) > 10  # strokes do not


def test_the_same_seed_gives_the_same_mask() -> None:
    first, second = (random_mask(np.random.default_rng(7), 64, 64) for _ in range(2))
    assert np.array_equal(first, second)
