"""Geometry against phantoms with known coordinates, properties that hold for any grid, and three other libraries."""

from __future__ import annotations

from itertools import permutations, product

import highdicom
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from transforms.geometry import SAME_GRID_VOXELS, Geometry

ALL_CODES = ["".join(codes) for axes in permutations(("RL", "AP", "SI")) for codes in product(*axes)]
EXACT = Geometry((3, 4, 5), np.array([[2.0, 0, 0, -7], [0, 3, 0, 11], [0, 0, 4, 5], [0, 0, 0, 1]]))


def grid(
    *,
    shape: tuple[int, int, int] = (4, 5, 6),
    spacing_mm: tuple[float, float, float] = (0.7, 0.9, 3.0),
    turn_deg: tuple[float, float, float] = (0.0, 0.0, 0.0),
    codes: str = "RAS",
    origin_mm: tuple[float, float, float] = (-80.0, 12.5, 300.0),
) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = origin_mm
    return Geometry(shape, affine).oriented(codes)


@st.composite
def grids(draw: st.DrawFn) -> Geometry:
    """Any orientation, left-handed ones too, oblique by any angle, anisotropic, sheared or not."""
    spacings = st.floats(0.3, 7.0)
    matrix = Rotation.from_rotvec([draw(st.floats(-3.0, 3.0)) for _ in range(3)]).as_matrix()
    matrix = matrix[:, draw(st.permutations(range(3)))] * [draw(st.sampled_from((1.0, -1.0))) for _ in range(3)]
    matrix = matrix * [draw(spacings) for _ in range(3)]
    matrix[:, 2] += draw(st.floats(-0.4, 0.4)) * matrix[:, 1]
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = [draw(st.floats(-500.0, 500.0)) for _ in range(3)]
    return Geometry(tuple(draw(st.integers(1, 6)) for _ in range(3)), affine)


def centres_ijk(geometry: Geometry) -> np.ndarray:
    return np.stack(np.indices(geometry.shape), axis=-1).reshape(-1, 3)


def centres_ras(geometry: Geometry) -> set[tuple[float, ...]]:
    return {tuple(point) for point in np.round(geometry.ras_from_ijk(centres_ijk(geometry)), 6) + 0.0}


def itk_image(geometry: Geometry, voxels: np.ndarray | None = None) -> sitk.Image:
    filled = np.zeros(geometry.shape, np.float32) if voxels is None else voxels
    image = sitk.GetImageFromArray(filled.transpose(2, 1, 0))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.affine_lps[:3, 3].tolist())
    image.SetDirection((geometry.affine_lps[:3, :3] / geometry.spacing_mm).ravel().tolist())
    return image


def geometry_of_itk(image: sitk.Image) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Geometry.from_lps(image.GetSize(), affine)


def assert_same(one: Geometry, other: Geometry) -> None:
    assert one.shape == other.shape
    np.testing.assert_allclose(one.affine_ras, other.affine_ras, rtol=0, atol=1e-9)


def test_there_are_48_orientations() -> None:
    assert len(set(ALL_CODES)) == 48


@pytest.mark.parametrize("codes", ALL_CODES)
def test_orientations_are_exact(codes: str) -> None:
    turned = EXACT.oriented(codes)
    assert turned.axis_codes == codes
    assert centres_ras(turned) == centres_ras(EXACT)
    # Worked out by hand: the first voxel sits at the end of the box that the codes point away from.
    lowest, highest = np.array([-7.0, 11, 5]), np.array([-3.0, 20, 21])
    away = {"R": lowest, "L": highest, "A": lowest, "P": highest, "S": lowest, "I": highest}
    axis = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    expected = np.zeros(3)
    for code in codes:
        expected[axis[code]] = away[code][axis[code]]
    assert turned.origin_ras_mm.tolist() == expected.tolist()
    assert turned.shape == tuple(EXACT.shape[axis[code]] for code in codes)
    assert turned.spacing_mm == tuple((2.0, 3.0, 4.0)[axis[code]] for code in codes)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_back_from_every_orientation(codes: str) -> None:
    back = EXACT.oriented(codes).oriented("RAS")
    assert back.shape == EXACT.shape
    assert np.array_equal(back.affine_ras, EXACT.affine_ras)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_nibabel_agrees(codes: str) -> None:
    geometry = grid(turn_deg=(12, -20, 31), codes=codes)
    assert nib.aff2axcodes(geometry.affine_ras) == tuple(codes)
    image = nib.Nifti1Image(np.zeros(geometry.shape, np.float32), geometry.affine_ras)
    canonical = nib.as_closest_canonical(image)
    assert_same(geometry.oriented("RAS"), Geometry(canonical.shape, canonical.affine))


@pytest.mark.parametrize("codes", ALL_CODES)
def test_simpleitk_agrees(codes: str) -> None:
    geometry = grid(turn_deg=(12, -20, 31), codes=codes)
    image = itk_image(geometry)
    for ijk in centres_ijk(geometry)[::7]:
        point = image.TransformIndexToPhysicalPoint(ijk.tolist())
        np.testing.assert_allclose(geometry.affine_lps[:3] @ [*ijk, 1], point, atol=1e-9)
    assert_same(geometry.oriented("PIR"), geometry_of_itk(sitk.DICOMOrient(image, "PIR")))


@pytest.mark.parametrize("codes", ALL_CODES)
def test_highdicom_agrees(codes: str) -> None:
    source = grid(turn_deg=(-8, 25, 14), codes="LPS")
    volume = highdicom.Volume(np.zeros(source.shape, np.float32), source.affine_lps, coordinate_system="PATIENT")
    turned = volume.to_patient_orientation(codes)
    assert_same(source.oriented(codes), Geometry.from_lps(turned.spatial_shape, turned.affine))
    # DICOM names directions by where they point to, F and H for feet and head.
    letters = [code.value for code in turned.get_closest_patient_orientation()]
    assert "".join(letters).replace("F", "I").replace("H", "S") == codes


@given(grids())
def test_points_go_there_and_back(geometry: Geometry) -> None:
    ijk = centres_ijk(geometry) + np.array([0.25, -1.5, 3.0])
    np.testing.assert_allclose(geometry.ijk_from_ras(geometry.ras_from_ijk(ijk)), ijk, atol=1e-9)


@given(grids(), st.sampled_from(ALL_CODES))
def test_orienting_keeps_every_voxel_in_its_place(geometry: Geometry, codes: str) -> None:
    turned = geometry.oriented(codes)
    assert centres_ras(turned) == centres_ras(geometry)
    assert turned.voxel_volume_mm3 == pytest.approx(geometry.voxel_volume_mm3)
    assert_same(turned.oriented(geometry.axis_codes), geometry)


@given(grids(), st.permutations(range(3)))
def test_permuting_undone(geometry: Geometry, order: list[int]) -> None:
    back = [order.index(axis) for axis in range(3)]
    assert_same(geometry.permuted(order).permuted(back), geometry)


@given(grids(), st.integers(0, 2))
def test_flipping_undone(geometry: Geometry, axis: int) -> None:
    flipped = geometry.flipped(axis)
    assert np.linalg.det(flipped.affine_ras[:3, :3]) * np.linalg.det(geometry.affine_ras[:3, :3]) < 0
    assert_same(flipped.flipped(axis), geometry)


@given(grids(), st.tuples(*[st.integers(-4, 4)] * 3), st.tuples(*[st.integers(1, 6)] * 3))
def test_windows_are_of_the_same_lattice(
    geometry: Geometry, start: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    window = geometry.window(start, shape)
    assert window.shape == shape
    np.testing.assert_allclose(
        window.ras_from_ijk(centres_ijk(window)), geometry.ras_from_ijk(centres_ijk(window) + start), atol=1e-9
    )
    assert_same(window.window([-n for n in start], geometry.shape), geometry)


@given(grids(), st.tuples(*[st.floats(0.4, 5.0)] * 3))
def test_respacing_keeps_centre_and_axes(geometry: Geometry, spacing_mm: tuple[float, float, float]) -> None:
    respaced = geometry.respaced(spacing_mm)
    middle = [(np.asarray(g.shape) - 1) / 2 for g in (geometry, respaced)]
    np.testing.assert_allclose(geometry.ras_from_ijk([middle[0]]), respaced.ras_from_ijk([middle[1]]), atol=1e-9)
    np.testing.assert_allclose(respaced.spacing_mm, spacing_mm, rtol=1e-4)
    np.testing.assert_allclose(respaced.direction_ras, geometry.direction_ras, atol=1e-12)
    # Each side is the old one to the nearest whole voxel, but at least one.
    short = np.abs(np.subtract(respaced.extent_mm, geometry.extent_mm)) > np.asarray(respaced.spacing_mm) * 0.5001
    assert not (short & (np.asarray(respaced.shape) > 1)).any()


@given(grids())
def test_respacing_to_its_own_spacing_changes_nothing(geometry: Geometry) -> None:
    assert_same(geometry.respaced(geometry.spacing_mm), geometry)


@given(grids())
def test_lps_there_and_back(geometry: Geometry) -> None:
    back = Geometry.from_lps(geometry.shape, geometry.affine_lps)
    assert np.array_equal(back.affine_ras, geometry.affine_ras)


@given(grids())
def test_json_is_exact(geometry: Geometry) -> None:
    back = Geometry.from_json(geometry.to_json())
    assert back.shape == geometry.shape
    assert np.array_equal(back.affine_ras, geometry.affine_ras)


@given(grids(), st.sampled_from(ALL_CODES), st.tuples(*[st.integers(-2, 3)] * 3), st.tuples(*[st.floats(0.4, 5.0)] * 3))
def test_axis_map_says_where_the_target_lies(
    source: Geometry, codes: str, start: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    target = source.oriented(codes).window(start, (3, 2, 4)).respaced(spacing_mm)
    axes = source.axis_map(target)
    targets = centres_ijk(target)
    expected = np.empty(targets.shape)
    for t, axis in enumerate(axes.source_axes):
        expected[:, axis] = axes.scales[t] * targets[:, t] + axes.offsets[t]
    np.testing.assert_allclose(source.ijk_from_ras(target.ras_from_ijk(targets)), expected, atol=1e-9)


@given(grids(), st.sampled_from(ALL_CODES), st.tuples(*[st.integers(-2, 3)] * 3))
def test_turns_and_windows_are_exact_moves(geometry: Geometry, codes: str, start: tuple[int, int, int]) -> None:
    assert geometry.axis_map(geometry.oriented(codes).window(start, (3, 2, 4))).is_exact


def test_half_a_voxel_is_no_exact_move() -> None:
    shifted = EXACT.affine_ras.copy()
    shifted[0, 3] += 1.0
    assert not EXACT.axis_map(Geometry(EXACT.shape, shifted)).is_exact


def test_an_error_of_scale_counts_at_the_far_end() -> None:
    source = Geometry((512, 2, 2), np.eye(4))
    target = Geometry((512, 2, 2), np.diag([1.0005, 1, 1, 1]))
    assert not source.axis_map(target).is_exact
    assert source.axis_map(target.window((0, 0, 0), (2, 2, 2))).is_exact


def test_rotated_grids_are_not_parallel() -> None:
    source = grid(shape=(300, 300, 20), spacing_mm=(1, 1, 1))
    tilted = grid(shape=(300, 300, 20), spacing_mm=(1, 1, 1), turn_deg=(0, 0, 30))
    with pytest.raises(ValueError, match=r"not parallel: .* against .*oblique by 30\.0 degrees"):
        source.axis_map(tilted)
    # A rotation that no cosine shows still moves the far corner of a large grid.
    slightly = grid(shape=(300, 300, 20), spacing_mm=(1, 1, 1), turn_deg=(0, 0, 0.02))
    with pytest.raises(ValueError, match="not parallel"):
        source.axis_map(slightly)
    near = source.window((0, 0, 0), (20, 20, 20)), slightly.window((0, 0, 0), (20, 20, 20))
    assert near[0].axis_map(near[1]).is_exact


def test_values_by_hand() -> None:
    geometry = grid(shape=(10, 20, 5), spacing_mm=(0.5, 1, 4), codes="LPS", origin_mm=(0, 0, 0))
    assert geometry.extent_mm == (5.0, 20.0, 20.0)
    assert geometry.voxel_volume_mm3 == pytest.approx(2.0)
    assert geometry.origin_ras_mm.tolist() == [4.5, 19.0, 0.0]
    assert geometry.affine_lps[:3, 3].tolist() == [-4.5, -19.0, 0.0]
    assert geometry.describe() == "10x20x5 voxels of 0.5x1x4 mm, LPS, first voxel at RAS (4.50, 19.00, 0.00) mm"


def test_sheared_volume() -> None:
    affine = np.eye(4)
    affine[1, 2] = 0.5
    sheared = Geometry((2, 2, 2), affine)
    assert sheared.voxel_volume_mm3 == pytest.approx(1.0)
    assert sheared.spacing_mm[2] == pytest.approx(np.sqrt(1.25))


def test_same_grid() -> None:
    geometry = grid(turn_deg=(5, 10, 15))
    assert geometry.difference(geometry) is None
    for part, same in ((0.9, True), (1.1, False)):
        moved = geometry.affine_ras.copy()
        moved[0, 3] += part * SAME_GRID_VOXELS * min(geometry.spacing_mm)
        assert (geometry.difference(Geometry(geometry.shape, moved)) is None) is same
    assert geometry.difference(grid(turn_deg=(5, 10, 15)), tolerance_voxels=0.0) is None


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_grid_is_another_grid(axis: int) -> None:
    geometry = grid(shape=(1, 1, 1))
    # Even for one voxel, whose centre does not move.
    unlike = geometry.difference(geometry.flipped(axis))
    assert unlike == f"{geometry.describe()} against {geometry.flipped(axis).describe()}"


def test_values_cannot_be_changed() -> None:
    affine = np.eye(4)
    geometry = Geometry((2, 2, 2), affine)
    affine[0, 3] = 9.0
    assert geometry.origin_ras_mm.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine_ras[0, 0] = 2.0


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((2, 2), np.eye(4), "three positive sizes"),
        ((2, 0, 2), np.eye(4), "three positive sizes"),
        ((2, 2.5, 2), np.eye(4), "three positive sizes"),
        ((2, 2, 2), np.eye(3), "4x4"),
        ((2, 2, 2), np.full((4, 4), np.nan), "finite"),
        ((2, 2, 2), np.diag([1, 1, 1, 2.0]), "last row"),
        ((2, 2, 2), np.diag([1, 1, 0, 1.0]), "singular"),
        ((2, 2, 2), np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
    ],
)
def test_what_is_no_grid(shape: tuple[int, int, int], affine: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(shape, affine)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_micrometre_and_metre_grids_are_no_singular_ones(scale: float) -> None:
    assert Geometry((2, 2, 2), np.diag([scale, scale, scale, 1])).spacing_mm == pytest.approx((scale,) * 3)


@pytest.mark.parametrize("codes", ["RA", "RAX", "RRS", "RLS", "RASS", ""])
def test_what_is_no_orientation(codes: str) -> None:
    with pytest.raises(ValueError, match=f"found '{codes}'"):
        EXACT.oriented(codes)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="permutation"):
        EXACT.permuted((0, 0, 1))
    with pytest.raises(ValueError, match="found -1"):
        EXACT.flipped(-1)
    with pytest.raises(ValueError, match="positive numbers of mm"):
        EXACT.respaced((1.0, -1.0, 1.0))
    with pytest.raises(ValueError, match="positive numbers of mm"):
        EXACT.respaced((1.0, 1.0))
    with pytest.raises(ValueError, match="three numbers"):
        EXACT.window((0, 0, 0), (1, 1))
