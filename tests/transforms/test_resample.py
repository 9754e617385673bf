"""Moving voxels between grids: copied to the bit where grids agree, equal to SciPy and SimpleITK where they do not."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from transforms.geometry import Geometry
from transforms.resample import Order, axis_matrix, move, move_argmax, move_classes, move_regions

CODES = ("RAS", "LPS", "RIP", "SLA", "ASR", "PIL", "LIA", "SPR")
"""Right- and left-handed ones, with every axis at every place."""


def oblique(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], codes: str = "RAS") -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (11, -17, 23), degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = (-20.0, 35.0, 4.0)
    return Geometry(shape, affine).oriented(codes)


def noise(geometry: Geometry, *, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(channels, *geometry.shape)).astype(np.float32))


def source_ijk(source: Geometry, target: Geometry) -> np.ndarray:
    """(3, I', J', K') where the centres of `target` lie in `source`, through the patient."""
    centres = np.stack(np.indices(target.shape), axis=-1).reshape(-1, 3)
    return source.ijk_from_ras(target.ras_from_ijk(centres)).T.reshape(3, *target.shape)


def scipy_move(voxels: torch.Tensor, source: Geometry, target: Geometry, order: int) -> np.ndarray:
    """With the edge's values outside."""
    last = np.asarray(source.shape).reshape(3, 1, 1, 1) - 1
    inside = np.clip(source_ijk(source, target), 0, last)
    return map_coordinates(voxels[0].double().numpy(), inside, order=order, mode="mirror")


def blob(geometry: Geometry) -> torch.Tensor:
    """A smooth bump in the middle of the grid, the same in the patient whatever the grid."""
    centre = geometry.ras_from_ijk([(np.asarray(geometry.shape) - 1) / 2])[0]
    points = geometry.ras_from_ijk(np.stack(np.indices(geometry.shape), axis=-1).reshape(-1, 3))
    values = np.exp(-(np.linalg.norm(points - centre, axis=1) ** 2) / (2 * 3.5**2))
    return torch.from_numpy(values.reshape(1, *geometry.shape).astype(np.float32))


@given(
    st.sampled_from(CODES),
    st.sampled_from(CODES),
    st.tuples(*[st.integers(-3, 3)] * 3),
    st.tuples(*[st.integers(1, 6)] * 3),
)
def test_exact_moves_copy_bits(
    source_codes: str, target_codes: str, start: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    source = oblique((3, 4, 5), (0.8, 1.1, 2.5), source_codes)
    target = source.oriented(target_codes).window(start, shape)
    voxels = torch.arange(1, 61, dtype=torch.int16).reshape(1, *source.shape)
    expected = np.full(shape, -7, np.int16)
    for ijk, there in zip(np.ndindex(shape), np.rint(source_ijk(source, target)).reshape(3, -1).T, strict=True):
        if ((there >= 0) & (there < source.shape)).all():
            expected[ijk] = voxels[0][tuple(int(n) for n in there)]
    moved = move(voxels, source, target, fill=-7)
    assert moved.dtype == torch.int16
    assert np.array_equal(moved[0].numpy(), expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.float64, torch.bool, torch.float16]
)
def test_exact_moves_keep_the_type(dtype: torch.dtype) -> None:
    source = oblique((3, 4, 5), (1, 1, 1))
    voxels = torch.arange(60).reshape(1, *source.shape).to(dtype)
    larger = source.oriented("PIL").window((-1, 0, -2), (6, 6, 7))
    there = move(voxels, source, larger, fill=1)
    assert there.dtype == dtype
    assert bool((there[0, 0].float() == 1.0).all())
    assert torch.equal(move(there, larger, source), voxels)


def test_a_window_beside_the_grid_is_all_fill() -> None:
    source = oblique((3, 4, 5), (1, 1, 1))
    assert (move(noise(source), source, source.window((9, 0, 0), (2, 2, 2)), fill=3.0) == 3.0).all()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("spacing_mm", [(0.5, 0.9, 1.3), (1.7, 2.2, 0.4)])
def test_scipy_agrees(codes: str, order: Order, spacing_mm: tuple[float, float, float]) -> None:
    source = oblique((9, 11, 7), (1.0, 0.8, 2.0), codes)
    target = source.oriented("LAS").respaced(spacing_mm)
    voxels = noise(source)
    moved = move(voxels, source, target, order=order)
    np.testing.assert_allclose(moved[0].numpy(), scipy_move(voxels, source, target, order), atol=2e-5)


def test_nearest_takes_values_that_are_there() -> None:
    source = oblique((9, 11, 7), (1.0, 0.8, 2.0), "LPI")
    # Spacings in no simple ratio, so that no centre lies half-way between two.
    target = source.oriented("RAS").respaced((0.61, 0.93, 1.37))
    voxels = noise(source)
    assert np.array_equal(
        move(voxels, source, target, order=0)[0].numpy(), scipy_move(voxels, source, target, 0).astype(np.float32)
    )


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIL", "SLA"])
def test_simpleitk_agrees(codes: str) -> None:
    source = oblique((9, 11, 7), (1.0, 0.8, 2.0), codes)
    target = source.oriented("RAI").respaced((0.7, 1.3, 1.1))
    images = []
    voxels = noise(source)
    for geometry, values in ((source, voxels[0].numpy()), (target, np.zeros(target.shape, np.float32))):
        image = sitk.GetImageFromArray(values.transpose(2, 1, 0))
        image.SetSpacing(geometry.spacing_mm)
        image.SetOrigin(geometry.affine_lps[:3, 3].tolist())
        image.SetDirection((geometry.affine_lps[:3, :3] / geometry.spacing_mm).ravel().tolist())
        images.append(image)
    theirs = sitk.GetArrayFromImage(sitk.Resample(images[0], images[1], sitk.Transform(), sitk.sitkLinear))
    there = source_ijk(source, target)
    inside = ((there >= 0) & (there <= np.asarray(source.shape).reshape(3, 1, 1, 1) - 1)).all(axis=0)
    assert inside.sum() > 100
    moved = move(voxels, source, target)[0].numpy()
    np.testing.assert_allclose(moved[inside], theirs.transpose(2, 1, 0)[inside], atol=2e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_a_ramp_stays_a_ramp(order: Order) -> None:
    """Linear functions of the patient's coordinates are kept by linear interpolation; cubic ones away from edges."""
    source = oblique((12, 12, 12), (1.0, 1.0, 1.0), "LPS")
    target = source.window((4, 4, 4), (4, 4, 4)).oriented("SAR").respaced((0.45, 0.8, 0.6))

    def ramp(geometry: Geometry) -> torch.Tensor:
        points = geometry.ras_from_ijk(np.stack(np.indices(geometry.shape), axis=-1).reshape(-1, 3))
        return torch.from_numpy((points @ [1.0, -2.0, 0.5]).reshape(1, *geometry.shape).astype(np.float32))

    moved = move(ramp(source), source, target, order=order)
    # Mirrored ends bend the cubic curve by 2 to the power of minus 2 a voxel.
    np.testing.assert_allclose(moved.numpy(), ramp(target).numpy(), atol=5e-5 if order == 1 else 2e-2)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("order", "worst"), [(1, 0.07), (3, 0.002)])
def test_there_and_back(codes: str, order: Order, worst: float) -> None:
    """Linear: the sum over the axes of spacing squared / 8 times the second derivative, 1 / 3.5 squared, is 0.067."""
    source = oblique((26, 24, 16), (1.0, 1.2, 2.0))
    target = source.oriented(codes).respaced((0.8, 0.9, 1.1))
    voxels = blob(source)
    there = move(voxels, source, target, order=order)
    np.testing.assert_allclose(there.numpy(), blob(target).numpy(), atol=worst)
    back = move(there, target, source, order=order)
    np.testing.assert_allclose(back.numpy(), voxels.numpy(), atol=worst)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_outside_by_hand(order: Order) -> None:
    """One axis of voxels at 0, 1, 2 mm: edges reach one target voxel out, then comes the fill."""
    source = Geometry((3, 1, 1), np.eye(4))
    affine = np.eye(4)
    affine[0, 0], affine[0, 3] = 0.5, -1.5
    target = Geometry((12, 1, 1), affine)
    moved = move(torch.tensor([5.0, 6.0, 8.0]).reshape(1, 3, 1, 1), source, target, order=order, fill=-9.0)
    values = moved.flatten().tolist()
    assert values[0] == -9.0
    assert values[1:4] == pytest.approx([5.0, 5.0, 5.0])
    assert values[5] == pytest.approx(6.0)
    assert values[7:10] == pytest.approx([8.0, 8.0, 8.0])
    assert values[10:] == [-9.0, -9.0]


@pytest.mark.parametrize("order", [0, 1, 3])
def test_outside_when_voxels_grow(order: Order) -> None:
    """Voxels at 0 to 4 mm seen at -2, 0, 2, 4, 6, 8 mm: one target voxel is 2 mm."""
    source = Geometry((5, 1, 1), np.eye(4))
    affine = np.diag([2.0, 1, 1, 1])
    affine[0, 3] = -2.0
    values = torch.tensor([5.0, 6.0, 8.0, 7.0, 3.0]).reshape(1, 5, 1, 1)
    moved = move(values, source, Geometry((6, 1, 1), affine), order=order, fill=-9.0)
    assert moved.flatten().tolist() == pytest.approx([5.0, 5.0, 8.0, 3.0, 3.0, -9.0], abs=1e-5)


@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.3, 3.0), st.floats(-2.0, 2.0), st.sampled_from((0, 1, 3)))
@settings(max_examples=60)
def test_weights_of_a_constant(count: int, targets: int, scale: float, offset: float, order: Order) -> None:
    """A constant stays constant: the weights of a target are 1 together, or all 0 outside."""
    sums = axis_matrix(count, targets, scale, offset, order).sum(dim=1)
    assert bool((((sums - 1.0).abs() < 1e-5) | (sums == 0.0)).all())


@pytest.mark.parametrize("codes", CODES)
def test_argmax_of_moved_scores(codes: str) -> None:
    source = oblique((8, 7, 6), (1.0, 1.5, 2.0))
    target = source.oriented(codes).respaced((0.7, 0.7, 0.9)).window((-3, -2, -1), (14, 15, 13))
    scores = noise(source, channels=4)
    moved = torch.stack([move(score[None], source, target, fill=-torch.inf)[0] for score in scores])
    expected = moved.argmax(dim=0)
    # Beyond the source every score is the same, and background comes first.
    assert bool((expected[moved.isinf().all(dim=0)] == 0).all())
    winner = move_argmax(scores, source, target)
    assert winner.dtype == torch.uint8
    assert torch.equal(winner[0].long(), expected)
    assert torch.equal(move_argmax(scores, source, target, dtype=torch.uint16), winner.to(torch.uint16))


def test_argmax_on_the_same_grid_is_exact() -> None:
    source = oblique((8, 7, 6), (1.0, 1.5, 2.0))
    scores = noise(source, channels=3)
    turned = source.oriented("PIR").window((-1, 0, 0), (6, 6, 9))
    expected = move(scores.argmax(dim=0, keepdim=True).to(torch.uint16), source, turned)
    assert torch.equal(move_argmax(scores, source, turned, dtype=torch.uint16), expected)


@pytest.mark.parametrize("codes", ["RAS", "LIA"])
def test_classes_by_share(codes: str) -> None:
    source = oblique((10, 9, 8), (1.0, 1.0, 1.0), codes)
    target = source.oriented("RAS").respaced((0.6, 0.7, 0.8))
    classes = torch.from_numpy(np.random.default_rng(4).integers(0, 3, (1, *source.shape)).astype(np.uint8))
    shares = torch.cat([move((classes == c).float(), source, target) for c in range(3)])
    assert torch.equal(move_classes(classes, source, target)[0].long(), shares.argmax(dim=0))


def test_class_numbers_are_never_averaged() -> None:
    """Between class 1 and class 3 lies no class 2."""
    source = Geometry((8, 1, 1), np.eye(4))
    classes = torch.tensor([1, 1, 3, 3, 1, 3, 0, 3], dtype=torch.uint8).reshape(1, 8, 1, 1)
    moved = move_classes(classes, source, source.respaced((0.31, 1, 1)))
    assert set(moved.unique().tolist()) == {0, 1, 3}


def test_classes_on_the_same_grid_are_copied() -> None:
    source = oblique((4, 4, 4), (1, 1, 1))
    classes = torch.arange(64, dtype=torch.uint8).reshape(1, 4, 4, 4)
    turned = source.oriented("SPL")
    assert torch.equal(move_classes(classes, source, turned), move(classes, source, turned))


def test_what_cannot_be_moved() -> None:
    source = oblique((4, 4, 4), (1, 1, 1))
    with pytest.raises(ValueError, match=r"\(3, 4, 4\) on a grid of \(4, 4, 4\)"):
        move(torch.zeros(1, 3, 4, 4), source, source)
    with pytest.raises(ValueError, match="not parallel"):
        move(torch.zeros(1, 4, 4, 4), source, Geometry((4, 4, 4), np.eye(4)))
    with pytest.raises(ValueError, match="at least one class"):
        move_argmax(torch.zeros(0, 4, 4, 4), source, source.respaced((0.5, 0.5, 0.5)))


class TestRegions:
    PROBABILITIES = torch.tensor([[0.9, 0.6, 0.5, 0.1], [0.2, 0.8, 0.9, 0.1], [0.0, 0.51, 0.4, 0.0]]).view(3, 4, 1, 1)

    def test_later_ones_paint_over_earlier_ones(self) -> None:
        """A half is not above a half: the third voxel is in the second region alone, which needs no first one."""
        grid = Geometry((4, 1, 1), np.eye(4))
        found = move_regions(self.PROBABILITIES, (2, 1, 300), grid, grid, dtype=torch.int32)
        assert found.flatten().tolist() == [2, 300, 1, 0]
        assert found.shape == (1, 4, 1, 1)

    def test_each_probability_is_interpolated_before_it_is_asked(self) -> None:
        """Half-way between voxels: 0.75, 0.55, 0.3 and 0.5, 0.85, 0.5 and 0.255, 0.455, 0.2."""
        source = Geometry((4, 1, 1), np.eye(4))
        affine = np.eye(4)
        affine[0, 3] = 0.5
        found = move_regions(self.PROBABILITIES, (2, 1, 3), source, Geometry((3, 1, 1), affine))
        assert found.flatten().tolist() == [2, 1, 0]

    def test_beyond_the_source_is_background(self) -> None:
        affine = np.eye(4)
        affine[0, 3] = -3
        source, target = Geometry((4, 1, 1), np.eye(4)), Geometry((10, 1, 1), affine)
        found = move_regions(torch.ones((1, 4, 1, 1)), (1,), source, target)
        assert found.flatten().tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]

    def test_a_region_without_a_class(self) -> None:
        grid = Geometry((4, 1, 1), np.eye(4))
        with pytest.raises(ValueError, match="3 regions that paint 2 classes"):
            move_regions(self.PROBABILITIES, (1, 2), grid, grid)
