"""DICOM series that are read: the right voxel at the right place, for any orientation and any order of files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.pixels import compress
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from scipy.spatial.transform import Rotation

from transforms.dicom import DicomSeries, choose_series, index_series, read_series
from transforms.errors import DicomError
from transforms.geometry import Geometry

WriteSeries = Callable[..., Path]
ORIENTATIONS = ("LPS", "LAI", "RPI", "PIR", "PSL", "AIL", "LIA", "RSA", "LSP")


def grid(codes: str = "LPS", turn_deg: tuple[float, float, float] = (7, -12, 20)) -> Geometry:
    """Oblique, with pixels that are not square."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix() * (0.8, 1.25, 2.5)
    affine[:3, 3] = (-31.5, 12.25, 104.0)
    return Geometry((6, 5, 4), affine).oriented(codes)


def phantom(geometry: Geometry) -> np.ndarray:
    """Each voxel has its own value."""
    return np.arange(-40, np.prod(geometry.shape) - 40, dtype=np.int16).reshape(geometry.shape)


def gdcm_series(folder: Path) -> tuple[np.ndarray, Geometry]:
    """SimpleITK's reading of the only series in a folder."""
    reader = sitk.ImageSeriesReader()
    (series,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), Geometry.from_lps(image.GetSize(), affine)


def finding_names(series: DicomSeries) -> list[str]:
    return [finding.name for finding in series.findings]


def assert_read(folder: Path, geometry: Geometry, voxels: np.ndarray) -> DicomSeries:
    """Read the folder and compare with a right-handed grid and its voxels, to the last bit."""
    read, found, series = read_series(folder)
    assert read.dtype == np.float32
    assert found.shape == geometry.shape
    np.testing.assert_allclose(found.affine_ras, geometry.affine_ras, atol=1e-6)
    assert np.array_equal(read, voxels.astype(np.float32))
    return series


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("turn_deg", [(0, 0, 0), (7, -12, 20)])
def test_any_orientation(write_series: WriteSeries, codes: str, turn_deg: tuple[float, float, float]) -> None:
    geometry = grid(codes, turn_deg)
    voxels = phantom(geometry)
    folder = write_series(geometry, voxels)
    # Slices are read along their normal, so that a left-handed grid comes back with k reversed.
    if np.linalg.det(geometry.affine_lps[:3, :3]) < 0:
        geometry, voxels = geometry.flipped(2), voxels[:, :, ::-1]
    series = assert_read(folder, geometry, voxels)
    assert series.findings == ()
    theirs, their_grid = gdcm_series(folder)
    assert geometry.difference(their_grid) is None
    assert np.array_equal(voxels, theirs)


def test_value_at_a_place_by_hand(write_series: WriteSeries) -> None:
    """A coronal slice: columns run left (0.5 mm), rows down (2 mm), slices 3 mm apart; one bright pixel."""
    affine_lps = np.array([[0.5, 0, 0, 10], [0, 0, 3, 20], [0, -2, 0, 30], [0, 0, 0, 1.0]])
    geometry = Geometry.from_lps((4, 3, 2), affine_lps)
    voxels = np.zeros((4, 3, 2), dtype=np.int16)
    voxels[3, 1, 1] = 500
    read, found, _ = read_series(write_series(geometry, voxels))
    (place,) = found.ras_from_ijk(np.argwhere(read == 500))
    assert place.tolist() == pytest.approx([-(10 + 3 * 0.5), -(20 + 3), 30 - 2])


def test_misleading_tags_do_not_count(write_series: WriteSeries) -> None:
    def mislead(dataset: Dataset, k: int) -> None:
        dataset.SliceThickness = "7.5"
        dataset.SpacingBetweenSlices = "-2.5"
        dataset.SliceLocation = str(-k)

    geometry = grid()
    series = assert_read(write_series(geometry, phantom(geometry), edit=mislead), geometry, phantom(geometry))
    assert finding_names(series) == ["slice-spacing-tag"]
    assert series.findings[0].evidence == "SpacingBetweenSlices is -2.5, positions are 2.5 mm apart"


def test_bare_headers_are_enough(write_series: WriteSeries) -> None:
    def strip(dataset: Dataset, k: int) -> None:
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "SOPClassUID", "ImageType", "InstanceNumber"):
            delattr(dataset, keyword)
        dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.SliceThickness = ""

    geometry = grid()
    assert_read(write_series(geometry, phantom(geometry), edit=strip), geometry, phantom(geometry))


def test_identifiers_that_an_anonymiser_removed(write_series: WriteSeries) -> None:
    def strip(dataset: Dataset, k: int) -> None:
        dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = (
            dataset.SOPClassUID,
            "1",
        )
        for keyword in (
            "SeriesInstanceUID",
            "SOPInstanceUID",
            "SOPClassUID",
            "StudyInstanceUID",
            "FrameOfReferenceUID",
        ):
            setattr(dataset, keyword, "")

    geometry = grid()
    series = assert_read(write_series(geometry, phantom(geometry), edit=strip), geometry, phantom(geometry))
    assert finding_names(series) == ["no-series-uid"]
    assert series.describe() == "MR 'phantom', 4 slices, no SeriesInstanceUID"


def test_long_decimal_strings(write_series: WriteSeries) -> None:
    """DS of more than 16 characters, which pydicom warns about."""
    geometry = grid()
    folder = write_series(geometry, phantom(geometry))
    for path in folder.iterdir():
        content = path.read_bytes()
        dataset = pydicom.dcmread(path)
        place = content.find(b"\x20\x00\x32\x00DS")
        old = content[place + 8 : place + 8 + int.from_bytes(content[place + 6 : place + 8], "little")]
        new = "\\".join(f"{float(x):.18f}" for x in dataset.ImagePositionPatient).encode()
        new += b" " * (len(new) % 2)
        head = content[: place + 6] + len(new).to_bytes(2, "little") + new
        path.write_bytes(head + content[place + 8 + len(old) :])
    assert_read(folder, geometry, phantom(geometry))


def test_rescaling_slice_by_slice(write_series: WriteSeries) -> None:
    def rescale(dataset: Dataset, k: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{0.5 + k}", f"{-10 * k}"

    geometry = grid()
    stored = phantom(geometry)
    expected = stored * (0.5 + np.arange(4)) - 10 * np.arange(4)
    folder = write_series(geometry, stored, edit=rescale)
    series = assert_read(folder, geometry, expected)
    assert str(series.findings[0]) == "slice-rescale: slopes from 0.5 to 3.5, applied slice by slice"
    theirs, _ = gdcm_series(folder)
    np.testing.assert_allclose(expected, theirs)


@pytest.mark.parametrize(("modality", "background"), [("CT", -1024.0), ("MR", 0.0), ("PT", 0.0)])
def test_padding_becomes_background(write_series: WriteSeries, modality: str, background: float) -> None:
    def pad(dataset: Dataset, k: int) -> None:
        dataset.Modality, dataset.RescaleIntercept = modality, "-24"
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    geometry = grid()
    stored = phantom(geometry)
    stored[0, :, :] = -2000
    expected = stored.astype(np.float32) - 24
    expected[0, :, :] = background
    series = assert_read(write_series(geometry, stored, edit=pad), geometry, expected)
    assert series.background == background
    assert finding_names(series) == ["padding"]


def test_a_range_of_padding(write_series: WriteSeries) -> None:
    def pad(dataset: Dataset, k: int) -> None:
        dataset.add_new("PixelPaddingValue", "SS", -2000)
        dataset.add_new("PixelPaddingRangeLimit", "SS", -1990)

    geometry = grid()
    stored = phantom(geometry)
    stored[0, 0, :] = (-2001, -2000, -1990, -1989)
    expected = stored.copy()
    expected[0, 0, 1:3] = 0
    series = assert_read(write_series(geometry, stored, edit=pad), geometry, expected)
    assert "PixelPaddingValue -2000 to -1990 becomes" in series.findings[0].evidence


def test_padding_beyond_the_stored_bits(write_series: WriteSeries) -> None:
    """12 bits stored of 16, unsigned, padded with 63536: what -2000 looks like there."""
    geometry = grid()
    values = (phantom(geometry) + 40).astype(np.uint16)
    stored = values.copy()
    stored[0, :, :] = 63536
    values[0, :, :] = 0

    def pad(dataset: Dataset, k: int) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
        dataset.add_new("PixelPaddingValue", "US", 63536)

    assert_read(write_series(geometry, stored.view(np.int16), edit=pad), geometry, values)


def test_padding_among_measured_values_is_kept(write_series: WriteSeries) -> None:
    def pad(dataset: Dataset, k: int) -> None:
        dataset.Modality = "CT"
        dataset.add_new("PixelPaddingValue", "SS", 0)

    geometry = grid()
    series = assert_read(write_series(geometry, phantom(geometry), edit=pad), geometry, phantom(geometry))
    assert finding_names(series) == ["padding-kept"]


@pytest.mark.parametrize("signed", [True, False])
def test_bits_above_the_stored_ones_are_ignored(write_series: WriteSeries, signed: bool) -> None:
    """12 bits stored of 16, with an overlay in the rest (PS3.5 8.1.1)."""
    geometry = grid()
    values = phantom(geometry) if signed else phantom(geometry) + 40
    stored = ((values & 0x0FFF) | 0x5000).astype(np.int16)

    def narrow(dataset: Dataset, k: int) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, int(signed)

    assert_read(write_series(geometry, stored, edit=narrow), geometry, values)


@pytest.mark.parametrize("bits", [8, 32])
def test_other_depths(write_series: WriteSeries, bits: int) -> None:
    geometry = grid()
    values = phantom(geometry) + 40

    def deepen(dataset: Dataset, k: int) -> None:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
            bits,
            bits,
            bits - 1,
            0,
        )
        dataset.PixelData = values[:, :, k].T.astype(f"<u{bits // 8}").tobytes()

    assert_read(write_series(geometry, values, edit=deepen), geometry, values)


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless],
    ids=lambda uid: uid.name,
)
def test_transfer_syntaxes(write_series: WriteSeries, syntax: pydicom.uid.UID) -> None:
    geometry = grid()
    folder = write_series(geometry, phantom(geometry), edit=encoded(syntax))
    assert_read(folder, geometry, phantom(geometry))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_without_preamble(write_series: WriteSeries, syntax: pydicom.uid.UID) -> None:
    geometry = grid()
    folder = write_series(geometry, phantom(geometry), edit=encoded(syntax))
    for path in folder.iterdir():
        content = path.read_bytes()
        # Preamble and magic, then the group length (12 bytes), which counts the rest of the meta information.
        path.write_bytes(content[132 + 12 + int.from_bytes(content[140:144], "little") :])
    assert_read(folder, geometry, phantom(geometry))


def encoded(syntax: pydicom.uid.UID) -> Callable[[Dataset, int], None]:
    """Write the phantom's slices in another transfer syntax."""

    def edit(dataset: Dataset, k: int) -> None:
        if syntax.is_encapsulated:
            compress(dataset, syntax, generate_instance_uid=False)
        elif not syntax.is_little_endian:
            dataset.add_new("PixelData", "OW", np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes())
        dataset.file_meta.TransferSyntaxUID = syntax

    return edit


def test_cosines_that_are_rounded(write_series: WriteSeries) -> None:
    def rounded(dataset: Dataset, k: int) -> None:
        dataset.ImageOrientationPatient = [f"{float(x):.3f}" for x in dataset.ImageOrientationPatient]

    geometry = grid()
    read, found, series = read_series(write_series(geometry, phantom(geometry), edit=rounded))
    assert finding_names(series) == ["cosines-rounded"]
    np.testing.assert_allclose(found.direction_ras.T @ found.direction_ras, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(found.affine_ras, geometry.affine_ras, atol=2e-3)
    assert np.array_equal(read, phantom(geometry))


def test_copies_of_a_slice_are_dropped(write_series: WriteSeries) -> None:
    geometry = grid()
    folder = write_series(geometry, phantom(geometry))
    (folder / "sub").mkdir()
    shutil.copy(folder / "IM002", folder / "sub" / "copy of IM002")
    series = assert_read(folder, geometry, phantom(geometry))
    assert finding_names(series) == ["duplicate"]
    assert series.slice_count == 4


def test_planning_images_are_set_aside(write_series: WriteSeries) -> None:
    def localise(dataset: Dataset, k: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        dataset.SOPInstanceUID += ".9"

    geometry, across = grid(), grid("PIR")
    folder = write_series(geometry, phantom(geometry))
    write_series(across, phantom(across), edit=localise, slices=[0], folder="series/scout")
    series = assert_read(folder, geometry, phantom(geometry))
    assert [str(finding) for finding in series.findings] == [
        "localizer: planning images set aside as a stack of their own: IM000"
    ]


def test_what_else_lies_in_the_folder(write_series: WriteSeries) -> None:
    geometry = grid()
    folder = write_series(geometry, phantom(geometry))
    (folder / "readme.txt").write_text("not an image")
    (folder / "empty").touch()
    (folder / "broken link").symlink_to(folder / "nowhere")
    directory = Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.9"
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    assert_read(folder, geometry, phantom(geometry))


def test_the_index_does_not_depend_on_names(write_series: WriteSeries) -> None:
    geometry = grid()
    folder = write_series(geometry, phantom(geometry))
    (first,) = index_series(folder)
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        path.rename(folder / f"{number:03d}.dcm")
    (second,) = index_series(folder)
    uids = [[header.sop_uid for header in series.slices] for series in (first, second)]
    assert uids[0] == uids[1] == [f"1.2.3.{1000 + k}" for k in range(4)]
    assert first.geometry is not None
    assert second.geometry is not None
    assert np.array_equal(first.geometry.affine_ras, second.geometry.affine_ras)


def test_choosing_one_of_several(write_series: WriteSeries) -> None:
    def named(uid: str, number: int, description: str) -> Callable[[Dataset, int], None]:
        def edit(dataset: Dataset, k: int) -> None:
            dataset.SeriesInstanceUID, dataset.SeriesNumber = uid, number
            dataset.SeriesDescription = description

        return edit

    geometry = grid()
    for n, (uid, number) in enumerate((("1.9.31", 7), ("1.9.3", 2), ("1.8", 4))):
        write_series(geometry, phantom(geometry) + n, folder=f"study/{n}", edit=named(uid, number, f"scan {n}"))
    folder = write_series(geometry, phantom(geometry), folder="study/report", edit=make_report)
    folder = folder.parent
    with pytest.raises(DicomError) as asked:
        read_series(folder)
    assert str(asked.value) == (
        f"{folder}: 3 image series, name one by number or SeriesInstanceUID: "
        "1: MR 'scan 1', 4 slices, 1.9.3; 2: MR 'scan 2', 4 slices, 1.8; 3: MR 'scan 0', 4 slices, 1.9.31; "
        "4: SR 'report', 4 slices, 1.7 (not readable: no-pixels)"
    )
    for choice, offset in (("1", 1), ("3", 0), ("1.8", 2), ("1.9.31", 0), ("1.9.3", 1), ("1.", None), ("9", None)):
        if offset is None:
            with pytest.raises(DicomError, match=r"'(1\.|9)': 1: MR 'scan 1'"):
                read_series(folder, series=choice)
        else:
            assert read_series(folder, series=choice)[0].min() == -40 + offset
    # What is no image need not be told apart from the one that is.
    shutil.rmtree(folder / "0")
    shutil.rmtree(folder / "1")
    assert read_series(folder)[2].description == "scan 2"


def make_report(dataset: Dataset, k: int) -> None:
    dataset.SeriesInstanceUID, dataset.SeriesNumber, dataset.Modality = "1.7", 9, "SR"
    dataset.SeriesDescription = "report"
    for keyword in ("PixelData", "Rows", "Columns"):
        delattr(dataset, keyword)


def test_choosing_by_the_beginning_of_an_identifier(write_series: WriteSeries) -> None:
    geometry = grid()
    listed = index_series(write_series(geometry, phantom(geometry)))
    assert choose_series(listed, series="1.2", folder=Path()) is listed[0]
    with pytest.raises(DicomError, match=r"no series has the number or identifier '1\.3'"):
        choose_series(listed, series="1.3", folder=Path())


@pytest.mark.parametrize("characters", [("ISO_IR 100", "Schädel quer"), ("ISO_IR 192", "頭部 T1")])
def test_descriptions_are_decoded(write_series: WriteSeries, characters: tuple[str, str]) -> None:
    def describe(dataset: Dataset, k: int) -> None:
        dataset.SpecificCharacterSet, dataset.SeriesDescription = characters

    geometry = grid()
    (series,) = index_series(write_series(geometry, phantom(geometry), edit=describe))
    assert series.description == characters[1]


def test_a_real_series(data_dir: Path) -> None:
    folder = data_dir / "dicom_hippocrop"
    read, geometry, series = read_series(folder)
    assert geometry.shape == (34, 50, 40)
    assert geometry.axis_codes == "LPS"
    assert (series.modality, series.description, series.slice_count) == ("MR", "HippoCrop", 40)
    assert series.findings == ()
    theirs, their_grid = gdcm_series(folder)
    assert geometry.difference(their_grid) is None
    assert np.array_equal(read, theirs)
    (k,) = [k for k, path in enumerate(series.paths) if path.name == "14.dcm"]
    slice_14 = pydicom.dcmread(folder / "14.dcm")
    assert np.array_equal(read[:, :, k].T, slice_14.pixel_array)
    assert geometry.affine_lps[:3, :] @ [0, 0, k, 1] == pytest.approx(slice_14.ImagePositionPatient)
