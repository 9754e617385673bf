"""Boxes of labels: by hand, and as SciPy finds them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import find_objects

from pipeline.label_boxes import boxes_of_values, held_box, joined

SHAPE = (14, 12, 10)
DTYPES = [np.uint8, np.int16, np.uint16, np.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_by_hand(dtype: type[np.generic], order: str) -> None:
    label_map = np.zeros(SHAPE, dtype=dtype, order=order)
    label_map[2:4, 5:7, 1:9] = 3
    label_map[12, 11, 9] = 7
    assert boxes_of_values(label_map, [3, 5, 7, 999]) == {
        3: (slice(2, 4), slice(5, 7), slice(1, 9)),
        7: (slice(12, 13), slice(11, 12), slice(9, 10)),
    }
    assert boxes_of_values(label_map, [7]).keys() == {7}
    assert held_box(label_map) == (slice(2, 13), slice(5, 12), slice(1, 10))


def test_nothing() -> None:
    assert held_box(np.zeros(SHAPE, np.uint8)) is None
    assert boxes_of_values(np.zeros(SHAPE, np.uint8), [1, 2]) == {}
    assert boxes_of_values(np.zeros((0, 0, 0), np.uint8), [1]) == {}


@pytest.mark.parametrize("count", [5, 12, 30, 64, 65, 150])
def test_many_values_as_scipy(count: int) -> None:
    """More of them than bits in a word."""
    label_map = np.random.default_rng(count).integers(0, count + 1, SHAPE, dtype=np.int32)
    label_map[label_map == 2] = 0
    expected = {v: box for v, box in enumerate(find_objects(label_map), start=1) if box is not None}
    assert boxes_of_values(label_map, range(1, count + 1)) == expected


def test_joined() -> None:
    boxes = [(slice(1, 3), slice(4, 5), slice(0, 9)), (slice(2, 7), slice(1, 2), slice(3, 4))]
    assert joined(boxes) == (slice(1, 7), slice(1, 5), slice(0, 9))
