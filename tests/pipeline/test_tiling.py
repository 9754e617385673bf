"""Which windows a volume has, in which order, and how much of it they leave unfinished."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.plan import InferenceConventions
from pipeline.tiling import Layout, WindowSettings, lay_out, overlap, window_shape

Triple = tuple[int, int, int]


def settings(patch: Triple, *, factor: Triple = (1, 1, 1), step: float = 0.5, longest: float = 1.5) -> WindowSettings:
    return WindowSettings(patch, factor, step, (), (0, 1), conventions=InferenceConventions(longest_window=longest))


def unfinished(layout: Layout) -> int:
    """By visiting every window: the most planes between the first that is not finished and the last that was seen."""
    most = seen = 0
    for number, row in enumerate(layout.rows):
        seen = max(seen, layout.planes(row)[1])
        left = min(layout.planes(other)[0] for other in layout.rows[number:])
        most = max(most, seen - left)
    return most


@pytest.mark.parametrize("shape", [(40, 16, 16), (16, 40, 16), (17, 19, 50), (8, 8, 8), (3, 30, 5), (64, 64, 64)])
@pytest.mark.parametrize("patches", [[(8, 8, 8)], [(8, 12, 6)], [(8, 8, 8), (16, 4, 10)], [(24, 24, 1)]])
def test_every_voxel_is_seen_and_the_planes_that_are_held_are_enough(shape: Triple, patches: list[Triple]) -> None:
    layout = lay_out(shape, [settings(patch) for patch in patches])
    assert layout.depth == unfinished(layout)
    assert [layout.planes(row)[0] for row in layout.rows] == sorted(layout.planes(row)[0] for row in layout.rows)
    for member in range(len(patches)):
        seen = np.zeros(shape, dtype=int)
        for row in layout.rows:
            if member in row.members:
                for start in row.starts:
                    inside, volume = overlap(start, row.window, shape)
                    assert seen[volume].shape == np.empty(row.window)[inside].shape
                    seen[volume] += 1
        assert seen.min() >= 1


def test_it_goes_along_the_axis_that_leaves_least_unfinished() -> None:
    assert lay_out((40, 16, 16), [settings((8, 8, 8))]).axis == 0
    assert lay_out((16, 40, 16), [settings((8, 8, 8))]).axis == 1
    layout = lay_out((20, 20, 100), [settings((16, 16, 16))])
    assert (layout.axis, layout.live_shape) == (2, (20, 20, 16))
    assert lay_out((512, 512, 30), [settings((256, 256, 1))]).live_shape == (512, 512, 1)
    assert lay_out((20, 20, 100), [settings((16, 16, 16))], axis=0).axis == 0


def test_where_it_hardly_matters_it_goes_along_the_first_axis() -> None:
    assert lay_out((40, 40, 44), [settings((16, 16, 16))]).axis == 0
    assert lay_out((40, 40, 48), [settings((16, 16, 16))]).axis == 2


def test_networks_with_the_same_windows_share_them() -> None:
    shared = lay_out((40, 16, 16), [settings((8, 8, 8)), settings((8, 8, 8))])
    assert {row.members for row in shared.rows} == {(0, 1)}
    apart = lay_out((40, 16, 16), [settings((8, 8, 8)), settings((8, 8, 4))])
    assert {row.members for row in apart.rows} == {(0,), (1,)}


def test_a_model_may_want_no_longer_windows() -> None:
    assert window_shape((11, 8, 8), settings((8, 8, 8))) == (11, 8, 8)
    assert window_shape((11, 8, 8), settings((8, 8, 8), longest=1.0)) == (8, 8, 8)


def test_without_networks_there_is_nothing_to_lay_out() -> None:
    with pytest.raises(ValueError, match="at least one network"):
        lay_out((8, 8, 8), [])
