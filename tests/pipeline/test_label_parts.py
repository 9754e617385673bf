"""Components of all labels at once, against scipy's of one label after the other."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pipeline.label_parts import label_parts


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(7, 6, 8), (1, 5, 9), (5, 1, 9), (6, 7, 1), (1, 1, 1)])
def test_they_are_those_of_each_label_by_itself(shape: tuple[int, int, int], share: float) -> None:
    for seed in range(8):
        random = np.random.default_rng(seed)
        world = np.where(random.random(shape) < share, random.choice([1, 2, 300], shape), 0).astype(np.uint16)
        parts = label_parts(world)
        painted = np.zeros(world.size, np.int64)
        for start, stop, number in zip(parts.starts, parts.stops, parts.numbers, strict=True):
            painted[start:stop] = number + 1
        painted = painted.reshape(shape)
        assert ((painted > 0) == (world > 0)).all()
        for value in (1, 2, 300):
            numbers, count = ndimage.label(world == value, np.ones((3, 3, 3)))
            mine = np.flatnonzero(parts.values == value) + 1
            assert len(mine) == count
            pairs = set(zip(numbers[numbers > 0].tolist(), painted[numbers > 0].tolist(), strict=True))
            assert len(pairs) == count
            sizes = dict(zip(mine.tolist(), parts.sizes[mine - 1].tolist(), strict=True))
            assert all(sizes[own] == (numbers == theirs).sum() for theirs, own in pairs)
        firsts = [int(np.flatnonzero(painted.reshape(-1) == n + 1)[0]) for n in range(len(parts.sizes))]
        assert firsts == sorted(firsts)


def test_nothing_has_no_parts() -> None:
    parts = label_parts(np.zeros((3, 4, 5), np.uint8))
    assert [len(x) for x in (parts.starts, parts.numbers, parts.values, parts.sizes)] == [0] * 4
