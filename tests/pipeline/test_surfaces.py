"""Surface distances: figures that can be worked out by hand, and brute force for any masks."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from skimage.measure import marching_cubes, mesh_surface_area

from pipeline.surfaces import SurfaceDistances, surface_distances

SHAPE = (14, 12, 10)
CUBIC = (1.0, 1.0, 1.0)
FLAT = (0.5, 1.25, 3.0)


def box(start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def cubes(mask: np.ndarray) -> set[tuple[int, int, int]]:
    """The cubes of 2x2x2 voxels that hold both inside and outside, by looking into each."""
    padded = np.pad(mask, 1)
    found = set()
    for place in product(*(range(n + 1) for n in mask.shape)):
        inside = int(padded[tuple(slice(p, p + 2) for p in place)].sum())
        if 0 < inside < 8:
            found.add(place)
    return found


def test_the_same_mask() -> None:
    mask = box((2, 3, 4), (6, 7, 8))
    found = surface_distances(mask, mask, FLAT)
    assert found.surface_dice(0.0) == 1.0
    assert (found.hausdorff_mm(), found.hausdorff_mm(95), found.average_mm()) == (0, 0, 0)


def test_one_voxel_has_the_surface_of_an_octahedron() -> None:
    one = box((5, 5, 5), (6, 6, 6))
    # Its corners lie half a voxel from the centre: eight triangles with sides of sqrt(1/2) mm.
    assert surface_distances(one, one, CUBIC).reference_areas_mm2.sum() == pytest.approx(math.sqrt(3))


def test_two_voxels_apart() -> None:
    found = surface_distances(box((3, 5, 5), (4, 6, 6)), box((8, 5, 5), (9, 6, 6)), CUBIC)
    # Each voxel's eight cubes lie half a voxel around it: the near four are 4 mm from the other's, the far four 5 mm.
    assert sorted(found.to_reference_mm) == pytest.approx([4, 4, 4, 4, 5, 5, 5, 5])
    assert found.hausdorff_mm() == pytest.approx(5)
    assert found.average_mm() == pytest.approx(4.5)
    assert found.surface_dice(4.0) == pytest.approx(0.5)
    assert found.surface_dice(3.9) == 0
    assert found.surface_dice(5.0) == 1


@pytest.mark.parametrize(("axis", "step_mm"), list(enumerate(FLAT)))
def test_a_box_moved_along_an_axis(axis: int, step_mm: float) -> None:
    mask = box((3, 3, 3), (9, 8, 7))
    found = surface_distances(np.roll(mask, 1, axis=axis), mask, FLAT)
    assert found.hausdorff_mm() == pytest.approx(step_mm)
    assert 0 < found.average_mm() < step_mm


@pytest.mark.parametrize("spacing_mm", [CUBIC, FLAT])
@pytest.mark.parametrize("seed", range(3))
def test_as_brute_force(seed: int, spacing_mm: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.random((2, 6, 7, 5)) > 0.7
    found = surface_distances(ours, theirs, spacing_mm)
    between = cdist(np.array(sorted(cubes(ours))) * spacing_mm, np.array(sorted(cubes(theirs))) * spacing_mm)
    assert np.allclose(found.to_reference_mm, between.min(axis=1))
    assert np.allclose(found.to_prediction_mm, between.min(axis=0))
    assert found.hausdorff_mm() == pytest.approx(max(between.min(axis=0).max(), between.min(axis=1).max()))


@pytest.mark.parametrize("spacing_mm", [CUBIC, FLAT, (0.4, 0.4, 6.0)])
def test_as_brute_force_near_and_far(spacing_mm: tuple[float, float, float]) -> None:
    """Single voxels, some in and some out of the ball that is searched step by step."""
    rng = np.random.default_rng(8)
    ours, theirs = rng.random((2, 16, 14, 12)) > 0.997
    found = surface_distances(ours, theirs, spacing_mm)
    between = cdist(np.array(sorted(cubes(ours))) * spacing_mm, np.array(sorted(cubes(theirs))) * spacing_mm)
    assert np.allclose(found.to_reference_mm, between.min(axis=1), rtol=1e-12)
    assert np.allclose(found.to_prediction_mm, between.min(axis=0), rtol=1e-12)
    limit_mm = (0.75 / math.pi * 120 * math.prod(spacing_mm)) ** (1 / 3)
    assert found.to_reference_mm.min() < limit_mm < found.to_reference_mm.max()


def test_areas_of_a_ball_and_a_stretched_one() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(41) - 20] * 3, indexing="ij"))
    ball = np.linalg.norm(grid, axis=0) <= 15
    area = surface_distances(ball, ball, CUBIC).reference_areas_mm2.sum()
    # The staircase of a binary mask has about a tenth more surface than the ball.
    assert 4 * math.pi * 15**2 < area < 1.12 * 4 * math.pi * 15**2
    assert surface_distances(ball, ball, (2, 2, 2)).reference_areas_mm2.sum() == pytest.approx(4 * area)


def test_a_mask_that_touches_the_border_ends_there() -> None:
    whole = np.ones(SHAPE, dtype=bool)
    found = surface_distances(whole, whole, CUBIC)
    i, j, k = SHAPE
    flat = 2 * ((i - 1) * (j - 1) + (j - 1) * (k - 1) + (i - 1) * (k - 1))
    assert found.reference_areas_mm2.sum() > flat
    assert np.array_equal(found.to_reference_mm, np.zeros(len(found.to_reference_mm)))


def test_empty_masks() -> None:
    empty, some = np.zeros(SHAPE), box((1, 1, 1), (3, 3, 3))
    both = surface_distances(empty, empty, CUBIC)
    assert all(math.isnan(x) for x in (both.surface_dice(1), both.hausdorff_mm(), both.average_mm()))
    for one in (surface_distances(empty, some, CUBIC), surface_distances(some, empty, CUBIC)):
        assert one.surface_dice(1e9) == 0
        assert math.isnan(one.hausdorff_mm(95))
        assert math.isnan(one.average_mm())


def test_percentiles_are_weighted_by_area() -> None:
    near, far = np.array([1.0, 2.0, 3.0, 10.0]), np.array([0.5])
    found = SurfaceDistances(near, np.array([50.0, 40.0, 6.0, 4.0]), far, np.array([100.0]))
    assert found.hausdorff_mm(50) == 1
    assert found.hausdorff_mm(90) == 2
    assert found.hausdorff_mm(95) == 3
    assert found.hausdorff_mm(96.5) == 10
    assert found.hausdorff_mm() == 10
    assert found.surface_dice(2.0) == pytest.approx((90 + 100) / 200)
    assert found.average_mm() == pytest.approx((50 + 80 + 18 + 40 + 50) / 200)


def test_left_out_is_what_is_no_mask() -> None:
    with pytest.raises(ValueError, match="three axes"):
        surface_distances(np.zeros((2, 2)), np.zeros((2, 2)), CUBIC)
    with pytest.raises(ValueError, match="three axes"):
        surface_distances(np.zeros(SHAPE), np.zeros((2, 2, 2)), CUBIC)
    with pytest.raises(ValueError, match="a spacing is positive"):
        surface_distances(np.ones(SHAPE), np.ones(SHAPE), (1, 0, 1))


def test_a_tolerance_of_a_voxel_holds_what_is_a_voxel_away() -> None:
    """0.94 mm has no exact number of bits: 7 x 0.94 - 6 x 0.94 is more than 0.94."""
    mask = box((6, 3, 3), (12, 8, 7))
    moved = surface_distances(np.roll(mask, 1, axis=0), mask, (0.94, 1.0, 1.0))
    assert moved.surface_dice(0.94) == 1.0
    assert moved.surface_dice(0.93) < 1.0
    assert moved.hausdorff_mm() == 0.94


def test_a_surface_has_the_area_of_its_mesh() -> None:
    """scikit-image's marching cubes over the whole mask; a ball has no cube of more than four voxels with two parts."""
    grid = np.stack(np.meshgrid(*[np.arange(21) - 10] * 3, indexing="ij"))
    ball = np.linalg.norm(grid, axis=0) <= 7
    vertices, faces, *_ = marching_cubes(ball.astype(np.float32), 0.5, spacing=FLAT, method="lorensen")
    area = surface_distances(ball, ball, FLAT).reference_areas_mm2.sum()
    assert area == pytest.approx(mesh_surface_area(vertices, faces), rel=1e-5)


def test_a_mask_and_its_complement_have_one_surface() -> None:
    mask = np.zeros((8, 8, 8), dtype=bool)
    mask[2:6, 2:6, 2:6] = np.random.default_rng(0).random((4, 4, 4)) > 0.5
    inner = surface_distances(mask, mask, FLAT)
    around = surface_distances(np.pad(~mask, 2, constant_values=True), np.pad(~mask, 2, constant_values=True), FLAT)
    frame = surface_distances(np.ones((12, 12, 12)), np.ones((12, 12, 12)), FLAT)
    assert around.reference_areas_mm2.sum() == pytest.approx(
        inner.reference_areas_mm2.sum() + frame.reference_areas_mm2.sum()
    )
