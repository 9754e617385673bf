"""nnU-Net's way onto a grid, in worlds worked out by hand; its own results are in tests/pipeline/interop."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_fill_holes
from scipy.spatial.transform import Rotation

from transforms.geometry import Geometry
from transforms.intensity_spec import Normalisation
from transforms.placing import (
    axis_across,
    body_of,
    kept_spacing,
    nearest_planes,
    nonzero_box,
    place,
    placed_grid,
    put_back,
    resize_as,
    resized_shape,
    written_mm,
)
from transforms.placing_spec import Placing, Resizing

AS_IT_IS = Normalisation(kind="none")


def grid(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Geometry:
    return Geometry(shape, np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0]))


def test_the_box_is_around_what_any_channel_shows() -> None:
    channels = torch.zeros(2, 6, 7, 8)
    channels[0, 1, 2, 3] = 5
    channels[1, 4, 2, 6] = -5
    assert nonzero_box(channels) == ((1, 2, 3), (4, 1, 4))


def test_nothing_to_see_is_refused() -> None:
    with pytest.raises(ValueError, match="every voxel is 0"):
        nonzero_box(torch.zeros(1, 3, 3, 3))


@pytest.mark.parametrize("seed", range(6))
def test_holes_are_those_that_scipy_fills(seed: int) -> None:
    channels = torch.from_numpy((np.random.default_rng(seed).random((2, 9, 8, 7)) < 0.45).astype(np.float32))
    expected = binary_fill_holes((channels != 0).any(dim=0).numpy())
    assert (body_of(channels).numpy() == expected).all()


def test_a_body_without_any_0_has_no_holes() -> None:
    assert bool(body_of(torch.ones(1, 2, 2, 2)).all())


def test_sides_are_whole_voxels_and_halves_go_to_the_even_one() -> None:
    """5 voxels of 1.5 mm are 7.5 of 1 mm, 3 are 4.5, and nothing is less than one voxel."""
    assert resized_shape(grid((5, 3, 1), (1.5, 1.5, 1.0)), (1.0, 1.0, 9.0)) == (8, 4, 1)


@pytest.mark.parametrize("mm", [4.5, 0.9, 0.7421875, 0.48828125, 1 / 3, 3.0])
def test_a_spacing_is_what_the_header_said(mm: float) -> None:
    """A NIfTI has single precision and loses more in an oblique affine; text headers have doubles."""
    single = float(np.float32(mm))
    turn = np.deg2rad(10.0)
    length = float(np.linalg.norm(np.float32([0, single * np.sin(turn), single * np.cos(turn)]).astype(np.float64)))
    assert written_mm(length) == pytest.approx(single, rel=1e-7 if mm == 1 / 3 else 0)
    assert written_mm(single) == pytest.approx(single, rel=1e-7 if mm == 1 / 3 else 0)
    assert written_mm(mm * (1 + 1e-15)) == pytest.approx(mm, rel=1e-7 if mm == 1 / 3 else 0)


@pytest.mark.parametrize(
    ("separate", "from_mm", "to_mm", "expected"),
    [
        (None, (0.8, 0.8, 2.4), (1.0, 1.0, 1.0), None),
        (None, (0.8, 0.8, 2.5), (1.0, 1.0, 1.0), 2),
        (None, (1.0, 1.0, 1.0), (4.0, 1.0, 1.0), 0),
        (None, (4.0, 1.0, 1.0), (1.0, 1.0, 4.0), 0),
        (None, (0.2, 1.25, 1.25000000001), (1.0, 1.0, 1.0), None),
        (True, (1.0, 1.1, 1.0), (1.0, 1.0, 1.0), 1),
        (True, (1.0, 1.0, 1.0), (4.0, 1.0, 1.0), None),
        (False, (0.8, 0.8, 8.0), (1.0, 1.0, 1.0), None),
    ],
)
def test_when_slices_are_resized_by_themselves(
    separate: bool | None,
    from_mm: tuple[float, float, float],
    to_mm: tuple[float, float, float],
    expected: int | None,
) -> None:
    assert axis_across(Resizing(order=3, separate=separate), from_mm, to_mm) == expected


def test_the_nearest_of_two_slices_is_the_one_after() -> None:
    assert nearest_planes(4, 2).tolist() == [1, 3]
    assert nearest_planes(2, 4).tolist() == [0, 0, 1, 1]
    assert nearest_planes(5, 3).tolist() == [0, 2, 4]


def test_a_spline_stays_within_the_values_of_its_slice() -> None:
    """A step rings; nowhere above 1 in the first slice, nowhere above 10 in the second."""
    step = torch.zeros(1, 8, 6, 2)
    step[:, 4:, :, 0] = 1
    step[:, 4:, :, 1] = 10
    found = resize_as(step, (16, 6, 2), Resizing(order=3), across=2)
    assert found.amax((0, 1, 2)).tolist() == [1.0, 10.0]
    together = resize_as(step, (16, 6, 2), Resizing(order=3), across=None)
    assert together[..., 0].max() > 1.0
    assert together.max() == 10.0


def test_a_world_by_hand() -> None:
    """Eight voxels of 2 mm, the outer two of 0 at both ends: four are left, and become eight of 1 mm between them."""
    source = grid((8, 3, 3), (2.0, 1.0, 1.0))
    channels = torch.zeros(1, 8, 3, 3)
    channels[:, 2:6] = torch.tensor([1.0, 3.0, 5.0, 7.0])[:, None, None]
    placing = Placing(image=Resizing(order=1, separate=False), scores=Resizing(order=1, separate=False))
    placed = place(channels, source, placing, axis_codes="RAS", spacing_mm=(1.0, 1.0, 1.0), normalisations=[AS_IT_IS])
    assert placed.image[0, :, 1, 1].tolist() == pytest.approx([1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7])
    assert placed.grid.spacing_mm == (1.0, 1.0, 1.0)
    # The first of the new voxels lies a quarter of an old one before the centre of the first that is left.
    assert placed.grid.origin_ras_mm.tolist() == pytest.approx([-3.5, 0, 0])
    assert placed.field is placed.box
    assert put_back(torch.ones(1, 4, 3, 3), placed.field, placed.box, source)[0, :, 0, 0].tolist() == [
        0, 0, 1, 1, 1, 1, 0, 0,
    ]  # fmt: skip


def test_thick_slices_go_back_by_the_nearest() -> None:
    """Two slices of 8 mm become four of 4 mm; each of the two gets the classes of the one after its centre."""
    source = grid((4, 4, 2), (1.0, 1.0, 8.0))
    placed = place(
        torch.arange(1.0, 33.0).reshape(1, 4, 4, 2),
        source,
        Placing(),
        axis_codes="RAS",
        spacing_mm=(2.0, 2.0, 4.0),
        normalisations=[AS_IT_IS],
    )
    assert (placed.grid.shape, placed.field.shape, placed.box.shape) == ((2, 2, 4), (4, 4, 4), (4, 4, 2))
    assert placed.image[0, 0, 0, 0] == placed.image[0, 0, 0, 1] != placed.image[0, 0, 0, 2]
    classes = torch.arange(4).expand(1, 4, 4, 4)
    assert put_back(classes, placed.field, placed.box, source)[0, 0, 0].tolist() == [1, 3]


def test_slices_of_a_kept_axis_stay() -> None:
    source = grid((9, 8, 5), (1.0, 1.0, 3.0))
    placing = Placing(kept_axis=2)
    placed = place(
        torch.rand(1, 9, 8, 5) + 1, source, placing, axis_codes="RAS", spacing_mm=(2, 2, 7), normalisations=[AS_IT_IS]
    )
    assert placed.grid.shape == (4, 4, 5)
    assert placed.grid.spacing_mm[2] == 3.0


def test_axes_are_stored_ones_unless_reoriented() -> None:
    source = grid((9, 8, 5), (1.0, 1.0, 3.0))
    channels = torch.rand(1, 9, 8, 5) + 1
    for reorients, first in ((False, channels), (True, channels.flip(1, 2))):
        placing = Placing(reorients=reorients)
        placed = place(
            channels, source, placing, axis_codes="RAS", spacing_mm=source.spacing_mm, normalisations=[AS_IT_IS]
        )
        assert torch.equal(placed.image, first)
        assert placed.grid.axis_codes == ("RAS" if reorients else "LPS")
        assert not placed.grid.difference(placed_grid(source, placing, axis_codes="RAS", spacing_mm=(1, 1, 3)))


def leaning(codes: str) -> Geometry:
    """Slices 3 mm apart that lean by 20 degrees, with axes along `codes`."""
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[1, 2] = 3 * np.tan(np.deg2rad(20))
    return Geometry((7, 6, 5), affine).oriented(codes)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL", "PIR"])
def test_slices_that_lean_are_turned_voxel_by_voxel_and_so_are_their_classes(codes: str) -> None:
    """As nnU-Net's readers: nibabel turns the same voxels, and no class number comes out that did not go in."""
    source = leaning(codes)
    assert source.is_sheared
    channels = torch.arange(1.0, 7 * 6 * 5 + 1).reshape(1, *source.shape)
    image = nib.Nifti1Image(channels[0].numpy(), source.affine_ras)
    turned = nib.funcs.as_closest_canonical(image)
    spacing_mm = (1.0, 1.0, float(np.linalg.norm(turned.affine[:3, 2])))
    placing = Placing(reorients=True)
    placed = place(channels, source, placing, axis_codes="RAS", spacing_mm=spacing_mm, normalisations=[AS_IT_IS])
    np.testing.assert_array_equal(placed.image[0], np.asarray(turned.dataobj))
    np.testing.assert_allclose(placed.grid.affine_ras, turned.affine, atol=1e-9)
    assert not placed.grid.difference(placed_grid(source, placing, axis_codes="RAS", spacing_mm=spacing_mm))
    classes = (placed.image % 5).to(torch.uint8)
    found = put_back(classes, placed.field, placed.box, source)
    assert found.dtype == torch.uint8
    assert torch.equal(found, (channels % 5).to(torch.uint8))


def test_classes_are_never_averaged_on_the_way_back() -> None:
    source = leaning("RAS")
    upright = source.orthogonal()
    with pytest.raises(ValueError, match="cannot be copied"):
        put_back(torch.ones(1, *upright.shape, dtype=torch.uint8), upright, upright, source)


@pytest.mark.parametrize("thin_mm", [0.4, 0.5, 0.7, 1.0, 2.0])
def test_voxels_three_times_as_long_are_resized_as_their_header_says(thin_mm: float) -> None:
    """A header's 3 mm are not more than three times its 1 mm, however the affine's single precision is turned."""
    header_mm = np.array([thin_mm, thin_mm, 3 * thin_mm], dtype=np.float32).astype(np.float64)
    expected = 2 if header_mm[2] / header_mm[0] > 3 else None
    coarse_mm = (2 * thin_mm, 2 * thin_mm, 3 * thin_mm)
    channels = torch.from_numpy(np.random.default_rng(0).random((1, 6, 6, 8)).astype(np.float32) + 1)
    image = resize_as(channels, (3, 3, 8), Resizing(order=3), across=expected)
    for direction in Rotation.random(40, rng=0).as_matrix():
        affine = np.eye(4)
        affine[:3, :3] = np.float32(direction * header_mm)
        source = Geometry((6, 6, 8), affine)
        placed = place(channels, source, Placing(), axis_codes="RAS", spacing_mm=coarse_mm, normalisations=[AS_IT_IS])
        assert torch.equal(placed.image, image)
        fine_mm = (thin_mm, thin_mm, 2 * thin_mm)
        back = place(channels, source, Placing(), axis_codes="RAS", spacing_mm=fine_mm, normalisations=[AS_IT_IS])
        assert back.field.shape == ((6, 6, 12) if expected == 2 else (6, 6, 8))


def test_a_kept_axis_has_the_spacing_of_the_header() -> None:
    for direction in Rotation.random(20, rng=1).as_matrix():
        affine = np.eye(4)
        affine[:3, :3] = np.float32(direction * (1.0, 1.0, 3.0))
        found = kept_spacing((1.0, 1.0, 9.0), Geometry((4, 4, 4), affine), Placing(kept_axis=2))
        assert found == (1.0, 1.0, 3.0)
