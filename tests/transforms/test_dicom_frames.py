"""Multi-frame objects: every frame at its place, with its own scale, from shared and own functional groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.legacy import LegacyConvertedEnhancedMRImage
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.pixels import compress
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import EnhancedMRImageStorage, NuclearMedicineImageStorage, RLELossless

from tests.transforms.conftest import slice_dataset
from transforms.dicom import index_series, read_series
from transforms.dicom_frames import KINDS, MAX_FRAMES, Plane
from transforms.dicom_header import Header, read_headers
from transforms.errors import DicomError
from transforms.geometry import Geometry

WriteSeries = Callable[..., Path]
GRID = Geometry.from_lps((6, 5, 4), np.array([[0.8, 0, 0, -3], [0, 1.25, 0, 7], [0, 0, 2.5, 40], [0, 0, 0, 1.0]]))
VALUES = np.arange(120, dtype=np.int16).reshape(GRID.shape)


def group(**sequences: dict[str, object]) -> Dataset:
    """A functional group: sequences of one item each."""
    dataset = Dataset()
    for name, values in sequences.items():
        item = Dataset()
        for keyword, value in values.items():
            setattr(item, keyword, value)
        setattr(dataset, name, Sequence([item]))
    return dataset


def enhanced(order: tuple[int, ...] = (0, 1, 2, 3)) -> Dataset:
    """The phantom's slices as frames of an enhanced MR object, in any order, each with its own slope."""
    dataset = slice_dataset(GRID, VALUES, 0)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(dataset, keyword)
    dataset.SOPClassUID, dataset.NumberOfFrames = EnhancedMRImageStorage, len(order)
    dataset.SharedFunctionalGroupsSequence = Sequence(
        [
            group(
                PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
                PixelMeasuresSequence={"PixelSpacing": [1.25, 0.8], "SliceThickness": 2},
                MREchoSequence={"EffectiveEchoTime": 12.5},
                MRImageFrameTypeSequence={"FrameType": ["ORIGINAL", "PRIMARY", "M", "NONE"]},
            )
        ]
    )
    dataset.PerFrameFunctionalGroupsSequence = Sequence(
        [
            group(
                PlanePositionSequence={"ImagePositionPatient": [-3, 7, 40 + 2.5 * k]},
                PixelValueTransformationSequence={"RescaleSlope": k + 1, "RescaleIntercept": -k, "RescaleType": "US"},
                FrameContentSequence={"TemporalPositionIndex": 1, "StackID": "1", "InStackPositionNumber": k + 1},
            )
            for k in order
        ]
    )
    dataset.PixelData = b"".join(VALUES[:, :, k].T.tobytes() for k in order)
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path


def headers_of(path: Path) -> tuple[Header, ...]:
    return read_headers(path, salt=b"")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1)])
@pytest.mark.parametrize("compressed", [False, True])
def test_frames_by_hand(tmp_path: Path, order: tuple[int, ...], compressed: bool) -> None:
    dataset = enhanced(order)
    if compressed:
        compress(dataset, RLELossless, generate_instance_uid=False)
    voxels, geometry, series = read_series(save(dataset, tmp_path / "a.dcm"))
    assert GRID.difference(geometry) is None
    assert np.array_equal(voxels, VALUES * (np.arange(4) + 1.0) - np.arange(4))
    assert [header.frame for header in series.slices] == [order.index(k) + 1 for k in range(4)]
    assert [finding.name for finding in series.findings] == ["slice-rescale"]


def test_a_frame_is_known_by_its_groups_first(tmp_path: Path) -> None:
    dataset = enhanced()
    dataset.EchoTime, dataset.RescaleSlope, dataset.PixelSpacing = "99", "99", [9, 9]
    dataset.PerFrameFunctionalGroupsSequence[2].MREchoSequence = group(a={"EffectiveEchoTime": 80.0}).a
    headers = headers_of(save(dataset, tmp_path / "a.dcm"))
    assert [dict(header.kinds)["echo time"] for header in headers] == [b"12.5", b"12.5", b"80", b"12.5"]
    assert [header.slope for header in headers] == [1, 2, 3, 4]
    assert headers[1].plane == Plane((-3, 7, 42.5), (1, 0, 0), (0, 1, 0), 1.25, 0.8)
    assert headers[1].thickness_mm == 2
    assert headers[1].image_type == ("ORIGINAL", "PRIMARY", "M", "NONE")
    assert dict(headers[1].kinds)["temporal position"] == b"1"


def test_what_tells_volumes_apart_is_found_in_single_slices_too(write_series: WriteSeries) -> None:
    """The same words and the same text for the same value, whichever way an object says it."""

    def diffusion(dataset: Dataset, k: int) -> None:
        dataset.DiffusionBValue, dataset.EchoTime = 1000.0, "12.5"

    (single, *_) = headers_of(next(write_series(GRID, VALUES, edit=diffusion).iterdir()))
    dataset = enhanced()
    dataset.SharedFunctionalGroupsSequence[0].MRDiffusionSequence = group(a={"DiffusionBValue": 1000.0}).a
    (many, *_) = headers_of(save(dataset, single.path.with_name("enhanced")))
    for word in ("b-value", "echo time"):
        assert dict(single.kinds)[word] == dict(many.kinds)[word] != b""


def test_every_keyword_is_one() -> None:
    places = [keyword for kinds in KINDS.values() for place in kinds for keyword in place]
    assert [keyword for keyword in places if tag_for_keyword(keyword) is None] == []


def test_highdicoms_conversion_reads_like_its_source(write_series: WriteSeries, tmp_path: Path) -> None:
    """A legacy converted object, written by a library that shares nothing with this one."""

    def complete(dataset: Dataset, k: int) -> None:
        dataset.InstanceNumber, dataset.AcquisitionNumber, dataset.SliceThickness = k + 1, 1, "2.5"
        dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = dataset.StudyID = ""
        dataset.PatientSex = dataset.ReferringPhysicianName = dataset.Manufacturer = ""
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "2", "-5", "US"

    folder = write_series(GRID, VALUES, edit=complete)
    converted = LegacyConvertedEnhancedMRImage(
        [pydicom.dcmread(path) for path in sorted(folder.iterdir())],
        series_instance_uid="1.2.7",
        series_number=1,
        sop_instance_uid="1.2.8",
        instance_number=1,
    )
    converted.save_as(tmp_path / "converted.dcm")
    voxels, geometry, series = read_series(tmp_path / "converted.dcm")
    expected, grid, _ = read_series(folder)
    assert len(series.slices) == 4
    assert geometry.difference(grid) is None
    assert np.array_equal(voxels, expected)


def test_philips_frames_equal_dicom2nifti(data_dir: Path) -> None:
    """Four times of eight slices in one file, each with the slope that its own group names."""
    folder = data_dir / "dicom_odd" / "enhanced_fmri"
    theirs = nib.loadsave.load(folder / "dicom2nifti.nii.gz")
    assert isinstance(theirs, nib.nifti1.Nifti1Image)
    expected = np.asarray(theirs.dataobj, dtype=np.float32)
    listed = index_series(folder / "frames.dcm")
    assert len(listed) == expected.shape[3] == 4
    for time, series in enumerate(listed):
        voxels, geometry, _ = read_series(folder / "frames.dcm", series=str(time + 1))
        assert {dict(header.kinds)["temporal position"] for header in series.slices} == {str(time + 1).encode()}
        # Both grids hold the same voxels, each in its own order of axes.
        turned = nib.nifti1.Nifti1Image(expected[..., time], theirs.affine)
        ours = nib.funcs.as_closest_canonical(nib.nifti1.Nifti1Image(voxels, geometry.affine_ras))
        closest = nib.funcs.as_closest_canonical(turned)
        np.testing.assert_allclose(ours.affine, closest.affine, atol=1e-3)
        np.testing.assert_allclose(ours.get_fdata(), closest.get_fdata(), atol=1e-4)


def test_hyperfine_frames_equal_simpleitk(data_dir: Path) -> None:
    path = data_dir / "dicom_odd" / "enhanced_hyperfine" / "frames.dcm"
    voxels, geometry, series = read_series(path)
    theirs = sitk.ReadImage(str(path))
    assert np.array_equal(voxels.transpose(2, 1, 0), sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(geometry.spacing_mm, theirs.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(geometry.affine_lps[:3, 3], theirs.GetOrigin(), atol=1e-6)
    assert series.findings == ()


class TestRefused:
    """Objects whose frames cannot be told apart, each by its name and before memory is touched."""

    def test_no_functional_groups(self, data_dir: Path) -> None:
        path = data_dir / "dicom_odd" / "mr_frames" / "emri_small.dcm"
        with pytest.raises(DicomError, match=r"multi-frame: emri_small\.dcm: 10 frames, and nothing says where each"):
            read_series(path)

    @pytest.mark.parametrize("count", [3, 5, 1])
    def test_groups_of_another_number(self, tmp_path: Path, count: int) -> None:
        dataset = enhanced()
        dataset.NumberOfFrames = count
        with pytest.raises(DicomError, match=rf"multi-frame: a\.dcm: {count} frames, but functional groups of 4"):
            read_series(save(dataset, tmp_path / "a.dcm"))

    @pytest.mark.parametrize("count", [10_000, MAX_FRAMES, 2**31 - 1])
    def test_absurd_promises(self, tmp_path: Path, count: int) -> None:
        """65,535 x 65,535 pixels in so many frames would be 86 TB and more."""
        dataset = slice_dataset(GRID, VALUES, 0)
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = count, 65_535, 65_535
        path = save(dataset, tmp_path / "a.dcm")
        assert len(headers_of(path)) == 1
        with pytest.raises(DicomError, match=rf"multi-frame: a\.dcm: {count} frames"):
            read_series(path)

    def test_absurd_frames_that_are_described(self, tmp_path: Path) -> None:
        dataset = enhanced()
        dataset.Rows, dataset.Columns = 65_535, 65_535
        with pytest.raises(DicomError, match=r"too-large: 17179344900 voxels"):
            read_series(save(dataset, tmp_path / "a.dcm"))

    def test_a_frame_without_a_place(self, tmp_path: Path) -> None:
        dataset = enhanced()
        del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
        dataset.ImagePositionPatient = [0, 0, 0]
        with pytest.raises(DicomError, match="no-position"):
            read_series(save(dataset, tmp_path / "a.dcm"))


def test_thousands_of_frames(tmp_path: Path) -> None:
    """One pass: each functional group is parsed once."""
    dataset = enhanced()
    dataset.PerFrameFunctionalGroupsSequence = Sequence(
        [
            group(PlanePositionSequence={"ImagePositionPatient": [0, 0, k]}, FrameContentSequence={"StackID": "1"})
            for k in range(3000)
        ]
    )
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = 3000, 1, 1
    dataset.PixelData = np.arange(3000, dtype="<i2").tobytes()
    voxels, geometry, _ = read_series(save(dataset, tmp_path / "a.dcm"))
    assert voxels.ravel().tolist() == list(range(3000))
    assert geometry.shape == (1, 1, 3000)


class TestNuclearMedicine:
    """A reconstructed volume of one file, whose detector names the first slice (PS3.3 C.8.4.10)."""

    @staticmethod
    def volume(step_mm: float) -> Dataset:
        dataset = slice_dataset(GRID, VALUES, 0)
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
            delattr(dataset, keyword)
        dataset.SOPClassUID, dataset.Modality, dataset.NumberOfFrames = NuclearMedicineImageStorage, "NM", 4
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"]
        dataset.FrameIncrementPointer, dataset.SliceVector = Tag("SliceVector"), [1, 2, 3, 4]
        dataset.SpacingBetweenSlices = step_mm
        detector = {"ImagePositionPatient": [-3, 7, 40], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        dataset.DetectorInformationSequence = group(a=detector).a
        dataset.PixelData = VALUES.transpose(2, 1, 0).tobytes()
        return dataset

    def test_slices_follow_the_normal(self, tmp_path: Path) -> None:
        voxels, geometry, _ = read_series(save(self.volume(2.5), tmp_path / "a.dcm"))
        assert GRID.difference(geometry) is None
        assert np.array_equal(voxels, VALUES)

    def test_a_negative_step_goes_against_it(self, tmp_path: Path) -> None:
        voxels, geometry, _ = read_series(save(self.volume(-2.5), tmp_path / "a.dcm"))
        assert geometry.affine_lps[:3, 3].tolist() == [-3, 7, 40 - 3 * 2.5]
        assert np.array_equal(voxels, VALUES[:, :, ::-1])

    @pytest.mark.parametrize("keyword", ["SliceVector", "FrameIncrementPointer", "SpacingBetweenSlices"])
    def test_what_is_not_said_is_not_guessed(self, tmp_path: Path, keyword: str) -> None:
        dataset = self.volume(2.5)
        delattr(dataset, keyword)
        with pytest.raises(DicomError, match="4 frames, and nothing says where each one lies"):
            read_series(save(dataset, tmp_path / "a.dcm"))

    def test_projections_are_no_volume(self, tmp_path: Path) -> None:
        dataset = self.volume(2.5)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "TOMO", "EMISSION"]
        with pytest.raises(DicomError, match="multi-frame"):
            read_series(save(dataset, tmp_path / "a.dcm"))
