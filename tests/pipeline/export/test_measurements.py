"""Measurements: worlds worked out by hand, and scikit-image's mesh, SimpleITK and brute force as judges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from skimage.measure import marching_cubes

from pipeline.export.measurements import Measures, measure
from pipeline.segmentation import Algorithm, Segmentation
from transforms.geometry import Geometry
from transforms.labels import schema_from_names

SPACING_MM = (0.7, 2.0, 3.5)
TURN = np.linalg.qr(np.array([[1.0, 0.3, -0.2], [-0.25, 1.0, 0.15], [0.2, -0.1, 1.0]]))[0]
SHEAR = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.35], [0.0, 0.0, 1.0]])
GRIDS = {
    "axial": np.diag(SPACING_MM),
    "oblique": TURN @ np.diag(SPACING_MM),
    "flipped": TURN @ np.diag([-0.7, 2.0, -3.5]),
    "sheared": TURN @ SHEAR @ np.diag(SPACING_MM),
}


def grid(shape: tuple[int, ...], name: str = "axial") -> Geometry:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = GRIDS[name], (-31.0, 12.5, 40.0)
    return Geometry.from_lps(shape, affine)


def measured(labels: np.ndarray, geometry: Geometry, voxels: np.ndarray | None = None) -> Measures:
    """The measures of label 1."""
    schema = schema_from_names({1: "one", 2: "two"})
    segmentation = Segmentation(labels.astype(np.uint8), geometry, schema, Algorithm("phantom", "1"))
    return measure(segmentation, np.zeros(labels.shape) if voxels is None else voxels)[0]


def blob(seed: int, shape: tuple[int, int, int] = (17, 13, 9)) -> np.ndarray:
    """A connected lump without symmetry."""
    generator = np.random.default_rng(seed)
    labels, place = np.zeros(shape, dtype=np.uint8), np.array(shape) // 2
    for _ in range(400):
        labels[tuple(place)] = 1
        axis = generator.integers(3)
        place[axis] = np.clip(place[axis] + generator.choice([-1, 1]), 1, shape[axis] - 2)
    return labels


def lps_mm(points_ijk: np.ndarray, geometry: Geometry) -> np.ndarray:
    return points_ijk @ geometry.affine_lps[:3, :3].T + geometry.affine_lps[:3, 3]


def test_a_box() -> None:
    labels = np.zeros((12, 9, 7))
    labels[2:10, 3:6, 1:5] = 1  # 8 x 3 x 4 voxels of 0.7 x 2 x 3.5 mm
    voxels = np.arange(labels.size, dtype=np.float32).reshape(labels.shape)
    found = measured(labels, grid(labels.shape), voxels)
    assert (found.label_id, found.voxels) == (1, 96)
    assert found.volume_mm3 == pytest.approx(96 * 4.9)
    assert found.volume_ml == pytest.approx(96 * 4.9 / 1000)
    assert found.intensity is not None
    inside = voxels[2:10, 3:6, 1:5]
    assert (found.intensity.minimum, found.intensity.maximum) == (inside.min(), inside.max())
    assert found.intensity.mean == pytest.approx(inside.mean(dtype=float))
    assert found.intensity.deviation == pytest.approx(np.sqrt(((inside - inside.mean(dtype=float)) ** 2).mean()))


def test_diameters_of_a_long_box_in_plane() -> None:
    labels = np.zeros((12, 9, 7))
    labels[1:11, 4, 2] = 1  # 10 voxels of 0.7 mm in a row, 2 mm wide
    found = measured(labels, grid(labels.shape)).in_plane
    assert found is not None
    assert found.k == 2
    assert found.longest.length_mm == pytest.approx(7.0)
    x_mm = sorted(found.longest.ends_lps_mm[:, 0])
    assert x_mm == pytest.approx([-31 + 0.5 * 0.7, -31 + 10.5 * 0.7])
    assert found.longest.ends_lps_mm[:, 1:] == pytest.approx(np.array([[12.5 + 4 * 2.0, 40 + 2 * 3.5]] * 2))
    # The outline runs over face centres: across, it is as wide as a voxel.
    assert found.perpendicular.length_mm == pytest.approx(2.0)


def test_one_voxel_is_as_long_as_its_longest_side() -> None:
    labels = np.zeros((3, 3, 3))
    labels[1, 1, 1] = 1
    found = measured(labels, grid(labels.shape), np.full(labels.shape, -7.0))
    assert found.longest is not None
    assert found.in_plane is not None
    assert found.intensity is not None
    assert (found.voxels, found.longest.length_mm) == (1, pytest.approx(3.5))
    assert (found.in_plane.longest.length_mm, found.in_plane.perpendicular.length_mm) == pytest.approx((2.0, 0.7))
    assert (found.intensity.mean, found.intensity.deviation) == (-7.0, 0.0)


def test_an_absent_label_has_no_volume_and_nothing_else() -> None:
    found = measured(np.zeros((3, 3, 3)), grid((3, 3, 3)))
    assert (found.voxels, found.volume_mm3, found.intensity, found.longest, found.in_plane) == (0, 0, None, None, None)


@pytest.mark.parametrize("name", GRIDS)
def test_a_ball_is_as_wide_as_it_is(name: str) -> None:
    geometry = grid((60, 24, 16), name)
    points_mm = lps_mm(np.argwhere(np.ones(geometry.shape)), geometry)
    centre_mm = lps_mm(np.array([[29.6, 11.3, 7.4]]), geometry)
    ball = (np.linalg.norm(points_mm - centre_mm, axis=1) <= 18.0).reshape(geometry.shape)
    found = measured(ball, geometry)
    assert found.longest is not None
    assert found.in_plane is not None
    assert found.volume_mm3 == pytest.approx(4 / 3 * np.pi * 18**3, rel=0.02)
    assert found.longest.length_mm == pytest.approx(36.0, abs=3.5)
    assert found.in_plane.longest.length_mm == pytest.approx(36.0, abs=2.0)
    assert found.in_plane.perpendicular.length_mm == pytest.approx(36.0, abs=2.0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", range(4))
def test_longest_diameter_is_that_of_the_mesh(name: str, seed: int) -> None:
    """Marching cubes halfway between inside and outside has its corners where the faces' centres are."""
    labels = blob(seed)
    geometry = grid(labels.shape, name)
    found = measured(labels, geometry).longest
    corners_ijk = marching_cubes(np.pad(labels, 1).astype(float), level=0.5)[0] - 1
    points_mm = lps_mm(corners_ijk, geometry)
    distances_mm = np.linalg.norm(points_mm[:, None] - points_mm[None], axis=2)
    assert found is not None
    assert found.length_mm == pytest.approx(distances_mm.max(), rel=1e-6)
    assert np.linalg.norm(np.diff(found.ends_lps_mm, axis=0)) == pytest.approx(found.length_mm)
    for end_mm in found.ends_lps_mm:
        assert np.linalg.norm(points_mm - end_mm, axis=1).min() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_feret_diameter_of_simpleitk(seed: int) -> None:
    """ITK measures between voxel centres, so it is shorter by less than two halves of a voxel."""
    labels = blob(seed)
    image = sitk.GetImageFromArray(labels.T)
    image.SetSpacing((1.0, 1.0, 1.0))
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.ComputeFeretDiameterOn()
    statistics.Execute(image)
    affine = np.eye(4)
    found = measured(labels, Geometry.from_lps(labels.shape, affine)).longest
    assert found is not None
    assert 0 < found.length_mm - statistics.GetFeretDiameter(1) <= np.sqrt(3)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", range(4))
def test_in_plane_by_brute_force(name: str, seed: int) -> None:
    labels = blob(seed)
    geometry = grid(labels.shape, name)
    found = measured(labels, geometry).in_plane
    assert found is not None
    best_mm, best_k, points_mm = -1.0, -1, np.zeros((0, 3))
    for k in range(labels.shape[2]):
        edges = [
            (i + di, j + dj, k)
            for i, j in np.argwhere(labels[:, :, k])
            for di, dj in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))
        ]
        placed_mm = lps_mm(np.array(edges), geometry) if edges else np.zeros((0, 3))
        longest_mm = max((np.linalg.norm(a - b) for a, b in itertools.combinations(placed_mm, 2)), default=-1.0)
        if longest_mm > best_mm + 1e-9:
            best_mm, best_k, points_mm = longest_mm, k, placed_mm
    assert found.k == best_k
    assert found.longest.length_mm == pytest.approx(best_mm)
    assert found.perpendicular.length_mm == pytest.approx(widest_mm(points_mm, found.longest.ends_lps_mm), rel=1e-3)
    along, across = np.diff(found.longest.ends_lps_mm, axis=0)[0], np.diff(found.perpendicular.ends_lps_mm, axis=0)[0]
    assert along @ across == pytest.approx(0.0, abs=1e-6)
    assert np.linalg.norm(across) == pytest.approx(found.perpendicular.length_mm)
    outline_mm = lps_mm(np.insert(found.outline_ij, 2, found.k, axis=1), geometry)
    assert outline_mm[0] == pytest.approx(found.longest.ends_lps_mm[0])
    assert np.linalg.norm(outline_mm - found.longest.ends_lps_mm[1], axis=1).min() < 1e-9


def widest_mm(points_mm: np.ndarray, ends_mm: np.ndarray) -> float:
    """The widest of the places along a line, sampled finely, where all pairs of points span across it."""
    along = np.diff(ends_mm, axis=0)[0]
    along = along / np.linalg.norm(along)
    t_mm = (points_mm - ends_mm[0]) @ along
    sideways = points_mm - ends_mm[0] - np.outer(t_mm, along)
    s_mm = sideways @ (sideways[np.linalg.norm(sideways, axis=1).argmax()] / np.linalg.norm(sideways, axis=1).max())
    widest = 0.0
    for place_mm in t_mm:
        left, right = t_mm <= place_mm + 1e-9, t_mm >= place_mm - 1e-9
        gaps = np.maximum(t_mm[right][None] - t_mm[left][:, None], 0.0)
        part = np.divide(place_mm - t_mm[left][:, None], gaps, out=np.zeros_like(gaps), where=gaps > 1e-9)
        crossing = s_mm[left][:, None] + part * (s_mm[right][None] - s_mm[left][:, None])
        widest = max(widest, crossing.max() - crossing.min())
    return widest


def test_only_the_largest_piece_counts_for_diameters() -> None:
    labels = np.zeros((30, 9, 9))
    labels[2:6, 2:5, 2:5] = 1
    labels[28, 8, 8] = 1
    alone = labels.copy()
    alone[28, 8, 8] = 0
    geometry = grid(labels.shape)
    both, one = measured(labels, geometry), measured(alone, geometry)
    assert both.voxels == one.voxels + 1
    assert both.longest is not None
    assert one.longest is not None
    assert both.longest.length_mm == one.longest.length_mm
    assert np.array_equal(both.longest.ends_lps_mm, one.longest.ends_lps_mm)


def test_a_diagonal_thread_is_one_piece() -> None:
    labels = np.zeros((8, 8, 8))
    labels[range(1, 7), range(1, 7), range(1, 7)] = 1
    found = measured(labels, Geometry.from_lps(labels.shape, np.eye(4))).longest
    assert found is not None
    assert found.length_mm == pytest.approx(np.sqrt(6**2 + 5**2 + 5**2))


def test_statistics_of_simpleitk() -> None:
    labels = blob(5)
    voxels = np.random.default_rng(1).normal(40, 300, labels.shape).astype(np.float32)
    statistics = sitk.LabelStatisticsImageFilter()
    statistics.Execute(sitk.GetImageFromArray(voxels.T), sitk.GetImageFromArray(labels.T))
    found = measured(labels, grid(labels.shape), voxels).intensity
    assert found is not None
    assert found.mean == pytest.approx(statistics.GetMean(1), rel=1e-6)
    count = int(labels.sum())
    # ITK's is the sample's.
    assert found.deviation == pytest.approx(statistics.GetSigma(1) * np.sqrt((count - 1) / count), rel=1e-6)
    assert (found.minimum, found.maximum) == (statistics.GetMinimum(1), statistics.GetMaximum(1))


def test_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="an image of"):
        measured(np.ones((3, 3, 3)), grid((3, 3, 3)), np.zeros((3, 3, 4)))
