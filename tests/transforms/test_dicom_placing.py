"""Where slices lie: tilted, uneven and single ones, by hand, and with SimpleITK and NumPy as oracles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from transforms.dicom import index_series, read_series
from transforms.dicom_index import DicomSeries
from transforms.dicom_uneven import fill_planes
from transforms.errors import DicomError
from transforms.geometry import Geometry

WriteSeries = Callable[..., Path]
Edit = Callable[[Dataset, int], None]
GRID = Geometry.from_lps((6, 5, 4), np.diag([0.8, 1.25, 2.5, 1.0]))
VOXELS = np.arange(120, dtype=np.int16).reshape(GRID.shape)


def at(*positions_lps_mm: tuple[float, float, float], **elements: object) -> Edit:
    """Slices at these places, with these elements."""

    def edit(dataset: Dataset, k: int) -> None:
        dataset.ImagePositionPatient = list(positions_lps_mm[k])
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)

    return edit


def evidence(series: DicomSeries) -> dict[str, str]:
    return {finding.name: finding.evidence for finding in series.findings}


def test_a_tilted_stack_by_hand(write_series: WriteSeries) -> None:
    """1 mm along y for 3 mm along the normal: the angle whose tangent is 1/3; pixels stay where their slices say."""
    folder = write_series(GRID, VOXELS, edit=at((5, 0, 0), (5, 1, 3), (5, 2, 6), (5, 3, 9)))
    read, geometry, series = read_series(folder)
    sheared = [[0.8, 0, 0, 5], [0, 1.25, 1, 0], [0, 0, 3, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(geometry.affine_lps, sheared, atol=1e-9)
    assert evidence(series) == {
        "gantry-tilt": "the stack is tilted by 18.43 degrees against its slices; the grid is sheared like it"
    }
    assert np.array_equal(read, VOXELS)
    assert geometry.voxel_volume_mm3 == pytest.approx(0.8 * 1.25 * 3)


def test_a_real_tilted_stack(data_dir: Path) -> None:
    """Each slice of a head CT lies where its own header says, to the last pixel."""
    _, geometry, series = read_series(data_dir / "dicom_odd" / "stacks" / "tilt")
    assert [finding.name for finding in series.findings] == ["gantry-tilt"]
    assert "14.00 degrees" in series.findings[0].evidence
    for k, header in enumerate(series.slices):
        assert header.plane is not None
        plane = header.plane
        corner = np.array(plane.position_lps_mm) + 15 * (
            np.array(plane.row_cosines_lps) * plane.column_spacing_mm
            + np.array(plane.column_cosines_lps) * plane.row_spacing_mm
        )
        np.testing.assert_allclose(geometry.affine_lps[:3] @ [15, 15, k, 1], corner, atol=1e-3)


def test_gaps_are_named_and_filled_when_asked(write_series: WriteSeries) -> None:
    folder = write_series(GRID, VOXELS, edit=at((0, 0, 0), (0, 0, 2), (0, 0, 4), (0, 0, 10)))
    with pytest.raises(DicomError, match=r"2 missing where slices are 2 mm apart: 6 mm after IM\d+; --resample-uneven"):
        read_series(folder)
    read, geometry, series = read_series(folder, resample_uneven=True)
    np.testing.assert_allclose(geometry.affine_lps, np.diag([0.8, 1.25, 2.0, 1.0]), atol=1e-9)
    assert series.slice_positions_k == (0, 1, 2, 5)
    between = [VOXELS[:, :, 2] * (1 - t) + VOXELS[:, :, 3] * t for t in (1 / 3, 2 / 3)]
    expected = np.stack([*np.moveaxis(VOXELS[:, :, :3], 2, 0), *between, VOXELS[:, :, 3]], axis=2)
    np.testing.assert_allclose(read, expected, rtol=1e-6)
    assert evidence(series)["resampled"].startswith(
        "4 slices interpolated linearly onto 6 planes 2 mm apart, because of missing-slices: 2 missing"
    )


def test_an_even_stack_is_not_resampled(write_series: WriteSeries) -> None:
    read, geometry, series = read_series(write_series(GRID, VOXELS), resample_uneven=True)
    assert geometry.difference(GRID) is None
    assert series.slice_positions_k is None
    assert series.findings == ()
    assert np.array_equal(read, VOXELS)


def test_real_slices_that_are_tilted_and_uneven(data_dir: Path) -> None:
    """GE head CT: 4.22 mm along the table, one gap of 1.14, then 7.38; NumPy's interpolation as oracle."""
    folder = data_dir / "dicom_odd" / "stacks" / "tilt_uneven"
    with pytest.raises(DicomError, match=r"uneven-spacing: .*5 gaps of 6\.999 mm, 3 gaps of 4\.002 mm, one of 1\.081"):
        read_series(folder)
    read, geometry, series = read_series(folder, resample_uneven=True)
    places = series.slice_positions_k
    assert places is not None
    assert geometry.affine_lps[:3, 2] == pytest.approx([0, 0, 4.22], abs=1e-6)
    assert np.diff(places) * 4.22 == pytest.approx([4.22, 4.22, 4.22, 1.14] + [7.38] * 5, abs=1e-4)
    for header, k in zip(series.slices, places, strict=True):
        assert header.plane is not None
        np.testing.assert_allclose(geometry.affine_lps[:3] @ [0, 0, k, 1], header.plane.position_lps_mm, atol=1e-5)
    slices = alone(series)
    along = np.clip(np.arange(geometry.shape[2]), 0, places[-1])
    for i, j in ((0, 0), (7, 3), (15, 15)):
        np.testing.assert_allclose(read[i, j], np.interp(along, places, slices[:, j, i]), rtol=1e-5, atol=1e-3)


def alone(series: DicomSeries) -> np.ndarray:
    """Each slice as SimpleITK reads it, padding as the gate gives it, (n, rows, columns)."""
    stack = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0] for path in series.paths]).astype(float)
    stack[stack <= -1500] = series.background
    return stack


@pytest.mark.parametrize("places", [(0.0, 0.25, 1.0, 3.6), (0.0, 1.0), (0.0, 2.5)])
def test_filling_planes(places: tuple[float, ...]) -> None:
    """NumPy's interp column by column; it holds the last value too."""
    slices = np.random.default_rng(3).normal(size=(len(places), 2, 3))
    planes = np.empty((5, 2, 3), dtype=np.float32)
    asked: list[int] = []

    def read(n: int) -> np.ndarray:
        asked.append(n)
        return slices[n]

    fill_planes(planes, read, places)
    expected = [[np.interp(range(5), places, slices[:, r, c]) for c in range(3)] for r in range(2)]
    np.testing.assert_allclose(planes, np.moveaxis(np.array(expected), 2, 0), rtol=1e-6)
    assert asked == sorted(set(asked))


@pytest.mark.parametrize("places", [(), (0.5, 1.0), (0.0, 2.0, 1.0), (0.0, 0.0)])
def test_places_that_make_no_sense(places: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending places"):
        fill_planes(np.empty((2, 1, 1), dtype=np.float32), lambda n: np.zeros((1, 1)), places)


def test_gaps_beyond_reason_are_not_filled(write_series: WriteSeries) -> None:
    """A stray slice 10 m away would make 4,000 planes of four slices."""
    folder = write_series(GRID, VOXELS, edit=at((0, 0, 0), (0, 0, 2.5), (0, 0, 5), (0, 0, 10000)))
    with pytest.raises(DicomError, match="missing-slices"):
        read_series(folder, resample_uneven=True)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ImagePositionPatient", ["0", "0", "1e308"]),
        ("ImagePositionPatient", ["-1e99", "0", "0"]),
        ("PixelSpacing", ["1e-300", "1e-300"]),
        ("PixelSpacing", ["1e300", "1"]),
        ("ImageOrientationPatient", ["1e200", "0", "0", "0", "1", "0"]),
    ],
)
def test_numbers_of_no_patient(write_series: WriteSeries, keyword: str, value: list[str]) -> None:
    folder = write_series(GRID, VOXELS, edit=lambda dataset, k: setattr(dataset, keyword, value) if k < 2 else None)
    for resample in (False, True):
        with pytest.raises(
            DicomError, match=r"absurd-position: IM\d+, IM\d+ has a position or a spacing beyond 100000"
        ):
            read_series(folder, resample_uneven=resample)


@pytest.mark.parametrize("depth", ["1e300", "1e-300"])
def test_one_slice_of_no_depth(write_series: WriteSeries, depth: str) -> None:
    (series,) = index_series(write_series(GRID, VOXELS, edit=tag("SliceThickness", depth), slices=[1]))
    assert series.geometry is None


def test_two_slices_with_others_between_them(write_series: WriteSeries) -> None:
    """5 mm apart, where the scanner says that slices are 2.5 mm apart."""
    folder = write_series(GRID, VOXELS, edit=tag("SpacingBetweenSlices", "2.5"), slices=[0, 2])
    read, geometry, _ = read_series(folder, resample_uneven=True)
    assert geometry.shape == (6, 5, 3)
    np.testing.assert_allclose(read[:, :, 1], (VOXELS[:, :, 0] + VOXELS[:, :, 2]) / 2)


def test_two_slices_nearer_than_the_tag_says(write_series: WriteSeries) -> None:
    """Nothing can be missing between them, so the positions decide as ever."""
    _, geometry, series = read_series(
        write_series(GRID, VOXELS, edit=tag("SpacingBetweenSlices", "6.5"), slices=[0, 1]), resample_uneven=True
    )
    assert geometry.difference(GRID.window((0, 0, 0), (6, 5, 2))) is None
    assert [finding.name for finding in series.findings] == ["slice-spacing-tag"]


def tag(keyword: str, value: object) -> Edit:
    return lambda dataset, k: setattr(dataset, keyword, value)


@pytest.mark.parametrize(
    ("elements", "depth_mm"),
    [
        ({"SliceThickness": "4"}, 4.0),
        ({"SpacingBetweenSlices": "3"}, 3.0),
        ({"SliceThickness": "4", "SpacingBetweenSlices": "3"}, 4.0),
        ({"SliceThickness": "", "SpacingBetweenSlices": "3"}, 3.0),
        ({"SliceThickness": "0"}, None),
        ({}, None),
    ],
)
def test_one_slice(write_series: WriteSeries, elements: dict[str, str], depth_mm: float | None) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)

    (series,) = index_series(write_series(GRID, VOXELS, edit=edit, slices=[2]))
    assert [finding.name for finding in series.findings] == ["single-slice"]
    if depth_mm is None:
        assert series.geometry is None
    else:
        assert series.geometry is not None
        one_deep = [[0.8, 0, 0, 0], [0, 1.25, 0, 0], [0, 0, depth_mm, 5], [0, 0, 0, 1]]
        np.testing.assert_allclose(series.geometry.affine_lps, one_deep, atol=1e-9)


def test_positions_against_the_instance_numbers(write_series: WriteSeries) -> None:
    """Table positions that fall while the files are numbered upwards."""
    folder = write_series(GRID, VOXELS, edit=at((0, 0, 7.5), (0, 0, 5), (0, 0, 2.5), (0, 0, 0)))
    read, geometry, series = read_series(folder)
    assert geometry.difference(GRID) is None
    assert np.array_equal(read, VOXELS[:, :, ::-1])
    assert series.findings == ()
