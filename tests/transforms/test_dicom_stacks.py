"""One SeriesInstanceUID -> its volumes: each phantom holds what tells its volumes apart, so each voxel is known."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset

from transforms.dicom import index_series, read_series
from transforms.dicom_index import DicomSeries
from transforms.errors import DicomError
from transforms.geometry import Geometry

WriteSeries = Callable[..., Path]
Edit = Callable[[Dataset, int], None]
GRID = Geometry.from_lps((6, 5, 4), np.diag([0.8, 1.25, 2.5, 1.0]))
CORONAL = Geometry.from_lps((6, 5, 4), [[0.8, 0, 0, 0], [0, 0, 2.5, 0], [0, -1.25, 0, 0], [0, 0, 0, 1]])
VOXELS = np.arange(120, dtype=np.int16).reshape(GRID.shape)


@pytest.fixture
def write_parts(write_series: WriteSeries) -> Callable[..., Path]:
    """Several volumes with one SeriesInstanceUID; volume n has the values VOXELS + 1000 n and the edits of part n."""

    def write(
        parts: Sequence[dict[str, object] | Edit],
        *,
        grids: Sequence[Geometry] | None = None,
        slices: Sequence[Sequence[int]] | None = None,
    ) -> Path:
        for n, part in enumerate(parts):

            def edit(dataset: Dataset, k: int, n: int = n, part: dict[str, object] | Edit = part) -> None:
                dataset.SOPInstanceUID = f"1.2.3.{n}.{k}"
                if callable(part):
                    part(dataset, k)
                else:
                    for keyword, value in part.items():
                        setattr(dataset, keyword, value)

            write_series(
                GRID if grids is None else grids[n],
                VOXELS + 1000 * n,
                folder=f"series/{n}",
                edit=edit,
                slices=None if slices is None else slices[n],
            )
        return (write_series(GRID, VOXELS, folder="series", slices=[])).resolve()

    return write


def found(folder: Path) -> list[tuple[str, int]]:
    """Name and first value / 1000 of each volume."""
    return [(s.stack, round(read_series(folder, series=str(n))[0].min() // 1000)) for n, s in listed(folder)]


def listed(folder: Path) -> list[tuple[int, DicomSeries]]:
    return list(enumerate(index_series(folder), start=1))


def problems(folder: Path) -> list[str]:
    return [str(problem) for _, series in listed(folder) for problem in series.problems]


def elements(**values: object) -> dict[str, object]:
    return values


TOLD_APART: list[tuple[list[dict[str, object]], list[tuple[str, int]]]] = [
    ([elements(EchoNumbers=2), elements(EchoNumbers=1)], [("echo 1", 1), ("echo 2", 0)]),
    ([elements(EchoTime="30"), elements(EchoTime="4.76")], [("echo time 4.76 ms", 1), ("echo time 30 ms", 0)]),
    (
        [elements(TemporalPositionIdentifier=n) for n in (10, 9, 1)],
        [("temporal position 1", 2), ("temporal position 9", 1), ("temporal position 10", 0)],
    ),
    (
        [elements(DiffusionBValue=b) for b in (1000.0, 0.0, 500.0)],
        [("b-value 0", 1), ("b-value 500", 2), ("b-value 1000", 0)],
    ),
    (
        [elements(TriggerTime="0"), elements(TriggerTime="27.5")],
        [("trigger time 0 ms", 0), ("trigger time 27.5 ms", 1)],
    ),
    (
        [elements(InversionTime="2200"), elements(InversionTime="150")],
        [("inversion time 150 ms", 1), ("inversion time 2200 ms", 0)],
    ),
    (
        [elements(ImageType=["ORIGINAL", "PRIMARY", part, "FFE"]) for part in ("P_FFE", "M_FFE")],
        [("magnitude", 1), ("phase", 0)],
    ),
    (
        [elements(ImageType=["DERIVED", "PRIMARY", *part]) for part in (["DIFFUSION", "ADC"], ["WATER"])],
        [("diffusion adc", 0), ("water", 1)],
    ),
    ([elements(AcquisitionNumber=7), elements(AcquisitionNumber=3)], [("acquisition 3", 1), ("acquisition 7", 0)]),
    ([elements(AcquisitionTime="101502.5"), elements(AcquisitionTime="091500")], [("pass 1", 1), ("pass 2", 0)]),
    # The tag that comes first tells them apart, and what goes with it is not named.
    (
        [elements(EchoNumbers=1, EchoTime="4"), elements(EchoNumbers=2, EchoTime="8")],
        [("echo 1", 0), ("echo 2", 1)],
    ),
    (
        [elements(EchoNumbers=e, TemporalPositionIdentifier=t) for t in (1, 2) for e in (1, 2)],
        [
            ("echo 1, temporal position 1", 0),
            ("echo 1, temporal position 2", 2),
            ("echo 2, temporal position 1", 1),
            ("echo 2, temporal position 2", 3),
        ],
    ),
    # One image without diffusion weighting, two directions with it.
    (
        [
            elements(DiffusionBValue=0.0),
            elements(DiffusionBValue=800.0, DiffusionGradientOrientation=[1.0, 0.0, 0.0]),
            elements(DiffusionBValue=800.0, DiffusionGradientOrientation=[0.0, 1.0, 0.0]),
        ],
        [("b-value 0", 0), ("b-value 800, gradient direction 1", 2), ("b-value 800, gradient direction 2", 1)],
    ),
]


@pytest.mark.parametrize(("parts", "expected"), TOLD_APART, ids=[expected[0][0] for _, expected in TOLD_APART])
def test_volumes_told_apart_by_a_tag(
    write_parts: Callable[..., Path], parts: list[dict[str, object]], expected: list[tuple[str, int]]
) -> None:
    folder = write_parts(parts)
    assert found(folder) == expected
    for number, series in listed(folder):
        read, geometry, _ = read_series(folder, series=f"1.2.2#{number}")
        assert geometry.difference(GRID) is None
        assert np.array_equal(read, VOXELS + 1000 * expected[number - 1][1])
        (split,) = series.findings
        assert split.evidence.startswith(f"one of {len(parts)} volumes in its series, told apart by ")
        assert series.stack_number == number


def test_trigger_times_that_differ_in_each_slice(write_parts: Callable[..., Path]) -> None:
    """A beating heart: each place has its own times, their order makes the phases."""

    def phase(number: int) -> Edit:
        return lambda dataset, k: setattr(dataset, "TriggerTime", f"{30 * number + k + 1}")

    folder = write_parts([phase(1), phase(0), phase(2)])
    assert found(folder) == [("phase 1", 1), ("phase 2", 0), ("phase 3", 2)]


@pytest.mark.parametrize("in_order", [True, False])
def test_instance_numbers_count_only_volume_after_volume(write_parts: Callable[..., Path], in_order: bool) -> None:
    """Numbers that run through one volume and then the next are an order of passes; any others are a guess."""

    def number(part: int) -> Edit:
        return lambda dataset, k: setattr(dataset, "InstanceNumber", 4 * part + k + 1 if in_order else 2 * k + part + 1)

    folder = write_parts([number(0), number(1)])
    if in_order:
        assert found(folder) == [("pass 1", 0), ("pass 2", 1)]
        assert "the order of instance numbers" in index_series(folder)[0].findings[0].evidence
    else:
        (problem,) = problems(folder)
        assert problem.startswith("same-position: 8 slices at 4 positions")
        assert "nothing in the headers tells them apart" in problem


def test_parts_of_a_series_at_other_places(write_parts: Callable[..., Path]) -> None:
    """Chest, then abdomen, one slice of which repeats the chest's last: each is a stack of its own."""
    parts = [elements(AcquisitionNumber=1), elements(AcquisitionNumber=2)]
    folder = write_parts(parts, slices=[[0, 1, 2], [2, 3]])
    assert [(s.stack, s.slice_count, s.problems) for _, s in listed(folder)] == [
        ("acquisition 1", 3, ()),
        ("acquisition 2", 2, ()),
    ]
    # With a gap in one part nothing is told apart: it might not be a part at all.
    folder = write_parts(parts, slices=[[0, 1, 3], [2, 3]])
    shutil.rmtree(folder / "0")
    write_parts([parts[0]], slices=[[0, 1, 3]])
    assert [name.partition(":")[0] for name in problems(folder)] == ["same-position"]


def test_one_place_again_and_again(write_parts: Callable[..., Path], data_dir: Path) -> None:
    """A bolus being watched: told apart by acquisition, and still no volumes."""
    (problem,) = problems(data_dir / "dicom_odd" / "stacks" / "one_place")
    assert problem.startswith("same-position: 4 slices at 1 positions")
    folder = write_parts([elements(AcquisitionNumber=n) for n in range(3)], slices=[[1]] * 3)
    assert problems(folder)[0].startswith("same-position: 3 slices at 1 positions")


def test_the_same_pixels_under_another_identifier(write_series: WriteSeries) -> None:
    """A slice that was sent twice; a slice with other pixels at its place is asked about."""

    def again(dataset: Dataset, k: int) -> None:
        dataset.SOPInstanceUID += ".7"

    folder = write_series(GRID, VOXELS)
    write_series(GRID, VOXELS, folder="series/again", edit=again, slices=[2])
    read, _, series = read_series(folder)
    assert np.array_equal(read, VOXELS)
    assert [str(finding) for finding in series.findings] == [
        "duplicate: slices with the same pixels at the same place dropped: IM000"
    ]
    write_series(GRID, VOXELS + 1, folder="series/again", edit=again, slices=[2])
    with pytest.raises(DicomError, match="same-position: 5 slices at 4 positions"):
        read_series(folder)


def test_positions_that_rounding_moved(write_parts: Callable[..., Path]) -> None:
    """The second echo was written with 0.04 mm less: the same places, since slices are 2.5 mm apart."""

    def rounded(dataset: Dataset, k: int) -> None:
        dataset.EchoNumbers = 2
        dataset.ImagePositionPatient = [0.0, 0.0, 2.5 * k - 0.04]

    assert found(write_parts([elements(EchoNumbers=1), rounded])) == [("echo 1", 0), ("echo 2", 1)]


FRAMES: list[tuple[list[dict[str, object]], list[Geometry], list[str], str]] = [
    ([{}, {}], [GRID, CORONAL], ["axial", "coronal"], "orientation"),
    (
        [{}, {}],
        [GRID, Geometry.from_lps((5, 6, 4), GRID.affine_lps)],
        ["6x5", "5x6"],
        "matrix",
    ),
    (
        [{}, {}],
        [GRID, Geometry.from_lps((6, 5, 4), np.diag([0.9, 1.25, 2.5, 1.0]))],
        ["0.8x1.25 mm", "0.9x1.25 mm"],
        "pixel spacing",
    ),
    ([{}, {"FrameOfReferenceUID": "1.2.9"}], [GRID, GRID], ["part 1", "part 2"], "frame of reference"),
    ([{"StackID": "1"}, {"StackID": "B"}], [GRID, GRID], ["part 1", "part 2"], "stack"),
]


@pytest.mark.parametrize(("parts", "grids", "names", "word"), FRAMES, ids=[row[3] for row in FRAMES])
def test_volumes_told_apart_by_where_they_lie(
    write_parts: Callable[..., Path],
    parts: list[dict[str, object]],
    grids: list[Geometry],
    names: list[str],
    word: str,
) -> None:
    folder = write_parts(parts, grids=[Geometry((6, 5, 4), g.affine_ras) if g.shape[0] == 6 else g for g in grids])
    series = index_series(folder)
    assert sorted(s.stack for s in series) == sorted(names)
    for volume in series:
        assert volume.problems == ()
        assert volume.slice_count == 4
        assert volume.findings[0].evidence == f"one of 2 volumes in its series, told apart by {word}"
        assert volume.geometry is not None
        assert any(volume.geometry.difference(grid) is None for grid in grids)


def test_a_planning_image_among_the_slices(write_parts: Callable[..., Path]) -> None:
    """It is a volume of its own, named on both, and never chosen where the others are."""
    scout = elements(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SliceThickness="3")
    folder = write_parts([{}, scout], grids=[GRID, CORONAL], slices=[range(4), [1]])
    image, planning = index_series(folder)
    assert (image.stack, planning.stack) == ("", "localizer")
    assert [finding.name for finding in image.findings] == ["localizer"]
    assert [finding.name for finding in planning.findings] == ["localizer", "single-slice"]
    assert planning.is_localizer
    assert np.array_equal(read_series(folder)[0], VOXELS)
    assert read_series(folder, series="1.2.2#2")[0].shape == (6, 5, 1)
    # By itself it is what there is.
    shutil.rmtree(folder / "0")
    assert read_series(folder)[2].is_localizer


def test_a_radial_scan_is_refused_as_one(write_series: WriteSeries) -> None:
    """A hundred slices around one axis: no stack, and no hundred volumes."""

    def turn(dataset: Dataset, k: int) -> None:
        angle = np.pi * k / 100
        dataset.ImageOrientationPatient = [np.cos(angle), np.sin(angle), 0, 0, 0, -1]
        dataset.ImagePositionPatient = [0, 0, 0]

    geometry = Geometry.from_lps((6, 5, 100), GRID.affine_lps)
    (series,) = index_series(write_series(geometry, np.zeros(geometry.shape, dtype=np.int16), edit=turn))
    assert [str(problem) for problem in series.problems] == [
        "scattered-slices: 100 slices with 100 values of orientation: pictures, not a stack"
    ]


def test_what_cannot_be_one_series(write_parts: Callable[..., Path]) -> None:
    folder = write_parts([{}, elements(PatientID="another")])
    (series,) = index_series(folder)
    assert [str(problem) for problem in series.problems] == [
        "mixed-series: one SeriesInstanceUID, but the patient differs between its files"
    ]
    assert "another" not in repr(series)


REAL = [
    ("orientations", [("sagittal 0.32x0.32 mm", (16, 16, 2)), ("axial 0.556x0.556 mm", (16, 16, 2))]),
    ("magnitude_phase", [("magnitude", (16, 16, 4)), ("phase", (16, 16, 4))]),
    ("fmri", [("pass 1", (64, 64, 4)), ("pass 2", (64, 64, 4))]),
]


@pytest.mark.parametrize(("name", "expected"), REAL, ids=[name for name, _ in REAL])
def test_real_series(data_dir: Path, name: str, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    series = index_series(data_dir / "dicom_odd" / "stacks" / name)
    assert [(s.stack, s.geometry.shape if s.geometry else ()) for s in series] == expected


def test_an_fmri_as_dicom2nifti_reads_it(data_dir: Path) -> None:
    """Voxel by voxel at the same place in the patient, and each pass at its time."""
    stacks = data_dir / "dicom_odd" / "stacks"
    theirs = nib.load(stacks / "fmri_dicom2nifti.nii.gz")
    for time in range(2):
        read, geometry, _ = read_series(stacks / "fmri", series=str(time + 1))
        ijk = np.argwhere(np.ones(geometry.shape, dtype=bool))
        places = np.linalg.solve(theirs.affine, np.c_[geometry.ras_from_ijk(ijk), np.ones(len(ijk))].T)[:3].T
        np.testing.assert_allclose(places, np.rint(places), atol=1e-3)
        voxels = np.asanyarray(theirs.dataobj)[..., time]
        assert np.array_equal(voxels[tuple(np.rint(places).astype(int).T)], read.ravel())
