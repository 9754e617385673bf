"""DICOM series that are refused: each fault by its name, with evidence, on one line, and never with an identity."""

from __future__ import annotations

import hmac
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import compress
from pydicom.uid import UID, RLELossless

from transforms.dicom import index_series, read_series
from transforms.dicom_checks import kind_findings
from transforms.dicom_header import is_dicom, read_headers
from transforms.errors import DicomError
from transforms.geometry import Geometry

WriteSeries = Callable[..., Path]
Edit = Callable[[Dataset, int], None]
IDENTITY = ("Nightingale", "Florence", "1820")
GRID = Geometry.from_lps((6, 5, 4), np.diag([0.8, 1.25, 2.5, 1.0]))
VOXELS = np.arange(120, dtype=np.int16).reshape(GRID.shape)


def tag(keyword: str, value: object, *, only: int | None = None) -> Edit:
    """Set one element in every slice, or in slice `only`."""

    def edit(dataset: Dataset, k: int) -> None:
        if only is None or k == only:
            setattr(dataset, keyword, value)

    return edit


def without(keyword: str, *, only: int | None = None) -> Edit:
    def edit(dataset: Dataset, k: int) -> None:
        if only is None or k == only:
            delattr(dataset, keyword)

    return edit


def at(*positions_lps_mm: tuple[float, float, float]) -> Edit:
    def edit(dataset: Dataset, k: int) -> None:
        dataset.ImagePositionPatient = list(positions_lps_mm[k])

    return edit


def both(*edits: Edit) -> Edit:
    def edit(dataset: Dataset, k: int) -> None:
        for one in edits:
            one(dataset, k)

    return edit


def undecodable(dataset: Dataset, k: int) -> None:
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.53")
    dataset.PixelData = encapsulate([dataset.PixelData])
    dataset["PixelData"].is_undefined_length = True


def lookup_table(dataset: Dataset, k: int) -> None:
    dataset.ModalityLUTSequence = [Dataset()]


def malformed_slope(dataset: Dataset, k: int) -> None:
    dataset.add_new("RescaleSlope", "LO", "steep")


PART_ECHO = both(at((0, 0, 0), (0, 0, 0), (0, 0, 5), (0, 0, 10)), tag("EchoTime", "90", only=1))
REFUSED: list[tuple[str, Edit | None, list[int] | None, str]] = [
    ("multi-frame", tag("NumberOfFrames", 12), None, "IM000.*: 12 frames, and nothing says where each one lies"),
    ("multi-frame", tag("NumberOfFrames", 2**31 - 1), None, "2147483647 frames, expected 1 to 131072"),
    ("multi-frame", tag("NumberOfFrames", 0), None, "0 frames, expected 1 to"),
    ("mosaic", tag("ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), None, "side by side"),
    ("colour", tag("PhotometricInterpretation", "RGB"), None, "RGB"),
    ("colour", tag("PhotometricInterpretation", "PALETTE COLOR", only=2), None, "PALETTE COLOR"),
    ("colour", tag("SamplesPerPixel", 3), None, "one grey value"),
    ("segmentation", tag("SOPClassUID", "1.2.840.10008.5.1.4.1.1.66.4"), None, "segmentation object"),
    ("no-pixels", without("Rows", only=3), None, "holds no image"),
    ("mixed-series", tag("StudyInstanceUID", "1.2.99", only=1), None, "StudyInstanceUID differs"),
    ("mixed-series", tag("Modality", "PT", only=1), None, "Modality differs"),
    ("mixed-series", tag("PatientID", "1820-0513", only=1), None, "the patient differs"),
    ("damaged-file", both(without("SeriesInstanceUID"), without("Rows")), None, "and 1 more names no series"),
    ("modality-lut", lookup_table, None, "lookup table"),
    ("rescale", tag("RescaleSlope", "0", only=0), None, "zero or no number"),
    ("rescale", malformed_slope, None, "zero or no number"),
    ("pixel-format", tag("HighBit", 14), None, "16 bits stored of 16 allocated, high bit 14"),
    ("pixel-format", both(tag("BitsAllocated", 12), tag("BitsStored", 12)), None, "12 bits stored of 12"),
    ("transfer-syntax", undecodable, None, "Spectral Selection"),
    ("no-position", without("ImagePositionPatient", only=2), None, "missing or malformed in IM"),
    ("no-position", tag("ImagePositionPatient", [1.0, 2.0], only=2), None, "missing or malformed in IM"),
    ("no-position", without("ImageOrientationPatient"), None, "and 1 more"),
    ("no-position", tag("PixelSpacing", [0.8, 0.0]), None, "PixelSpacing is missing or malformed"),
    ("not-orthonormal", tag("ImageOrientationPatient", [1, 0, 0, 0.01, 1, 0]), None, "off by 0.01"),
    ("not-orthonormal", tag("ImageOrientationPatient", [0, 0, 0, 0, 1, 0], only=1), None, "off by 1"),
    ("same-position", PART_ECHO, None, "4 slices at 3 positions, .*they differ in echo time"),
    ("same-position", at(*[(0, 0, 0)] * 4), None, "4 slices at 1 positions, .*nothing in the headers"),
    ("single-slice", None, [2], "unknown thickness"),
    ("gantry-tilt", at((0, 0, 0), (0, 4, 3), (0, 8, 6), (0, 12, 9)), None, r"53\.13 degrees .*more than any scanner"),
    ("shifted-slices", at((0, 0, 0), (1, 0, 3), (0, 0, 6), (0, 0, 9)), None, "by up to 1 mm"),
    ("missing-slices", None, [0, 1, 3], r"1 missing where slices are 3\.75 mm apart|1 missing where"),
    (
        "missing-slices",
        at((0, 0, 0), (0, 0, 3), (0, 0, 6), (0, 0, 15)),
        None,
        "2 missing where slices are 3 mm apart: 9 mm",
    ),
    ("uneven-spacing", at((0, 0, 0), (0, 0, 3), (0, 0, 7), (0, 0, 10)), None, "3 to 4 mm apart"),
    (
        "uneven-spacing",
        tag("SpacingBetweenSlices", "2.5"),
        [0, 2],
        "two slices 5 mm apart, but SpacingBetweenSlices is 2.5",
    ),
]


def assert_one_clear_line(error: DicomError) -> None:
    message = str(error)
    assert "\n" not in message
    assert not any(part in message for part in IDENTITY)


@pytest.mark.parametrize(
    ("name", "edit", "slices", "evidence"), REFUSED, ids=[f"{n}-{row[0]}" for n, row in enumerate(REFUSED)]
)
def test_refused_by_name(
    write_series: WriteSeries,
    capfd: pytest.CaptureFixture[str],
    name: str,
    edit: Edit | None,
    slices: list[int] | None,
    evidence: str,
) -> None:
    folder = write_series(GRID, VOXELS, edit=edit, slices=slices)
    (series,) = index_series(folder)
    assert name in [problem.name for problem in series.problems]
    assert series.geometry is None
    with pytest.raises(DicomError, match=f"not readable: .*{name}: .*{evidence}|1: .*{name}") as refused:
        read_series(folder, series="1")
    assert_one_clear_line(refused.value)
    assert capfd.readouterr() == ("", "")


def test_the_phantom_itself_is_right(write_series: WriteSeries) -> None:
    """Without an edit every case above would be read."""
    read, geometry, series = read_series(write_series(GRID, VOXELS))
    assert geometry.difference(GRID) is None
    assert np.array_equal(read, VOXELS)
    assert series.problems == ()


def test_two_slices_are_a_volume(write_series: WriteSeries) -> None:
    read, geometry, _ = read_series(write_series(GRID, VOXELS, edit=tag("SpacingBetweenSlices", "2.5"), slices=[1, 2]))
    assert geometry.difference(GRID.window((0, 0, 1), (6, 5, 2))) is None
    assert np.array_equal(read, VOXELS[:, :, 1:3])


def test_one_file_of_a_series_is_not_taken_for_all(write_series: WriteSeries) -> None:
    folder = write_series(GRID, VOXELS)
    with pytest.raises(
        DicomError, match=r"IM001: MR series 'phantom' is not readable: single-slice: .*give the folder"
    ):
        read_series(folder / "IM001")


@pytest.mark.parametrize(("drift_mm", "name"), [(0.05, None), (0.2, "gantry-tilt")])
def test_rounded_positions_are_no_tilt(write_series: WriteSeries, drift_mm: float, name: str | None) -> None:
    """A tenth of a pixel side is 0.08 mm here."""
    positions = [(0.0, drift_mm * k / 3, 2.5 * k) for k in range(4)]
    (series,) = index_series(write_series(GRID, VOXELS, edit=at(*positions)))
    assert [finding.name for finding in series.findings] == ([] if name is None else [name])


@pytest.mark.parametrize(("off_mm", "name"), [(0.1, None), (0.15, "uneven-spacing")])
def test_rounded_distances_are_even(write_series: WriteSeries, off_mm: float, name: str | None) -> None:
    """A twentieth of the slice distance is 0.125 mm here."""
    positions = [(0.0, 0.0, 2.5 * k + off_mm * (k == 1)) for k in range(4)]
    (series,) = index_series(write_series(GRID, VOXELS, edit=at(*positions)))
    assert [finding.name for finding in series.findings] == ([] if name is None else [name])


def test_an_image_too_large_for_memory(write_series: WriteSeries) -> None:
    """What the header promises is refused before memory is asked for."""
    folder = write_series(GRID, VOXELS, edit=both(tag("Rows", 65535), tag("Columns", 65535)))
    with pytest.raises(DicomError, match=r"too-large: 17179344900 voxels, .*; truncated: IM"):
        read_series(folder)


def test_copies_that_differ_are_not_dropped(write_series: WriteSeries) -> None:
    folder = write_series(GRID, VOXELS)
    write_series(GRID, VOXELS + 1, folder="series/again", slices=[1])
    with pytest.raises(DicomError, match="same-position: 5 slices at 4 positions"):
        read_series(folder)


def test_a_header_cut_short_condemns_its_folder(write_series: WriteSeries) -> None:
    folder = write_series(GRID, VOXELS)
    (folder / "IM002").write_bytes((folder / "IM002").read_bytes()[:300])
    with pytest.raises(DicomError, match=r"damaged-file: IM002 names no series and no image size: cut short"):
        read_series(folder)
    # In a folder of its own it stands for itself, and the rest is read.
    (folder / "other").mkdir()
    shutil.move(folder / "IM002", folder / "other")
    (series, orphan) = index_series(folder)
    assert [problem.name for problem in series.problems] in ([], ["missing-slices"])
    assert orphan.describe() == "damaged files, 0 slices, no SeriesInstanceUID (not readable: damaged-file)"


def test_pixels_cut_short(write_series: WriteSeries, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_series(GRID, VOXELS)
    (folder / "IM002").write_bytes((folder / "IM002").read_bytes()[:-20])
    with pytest.raises(DicomError, match="truncated: IM002 ends before its pixels do; fetch it again"):
        read_series(folder)
    assert capfd.readouterr() == ("", "")


def test_compressed_pixels_cut_short(write_series: WriteSeries, capfd: pytest.CaptureFixture[str]) -> None:
    """pydicom gives an empty dataset and a warning for such a file, no error."""

    def pack(dataset: Dataset, k: int) -> None:
        compress(dataset, RLELossless, generate_instance_uid=False)

    folder = write_series(GRID, VOXELS, edit=pack)
    (folder / "IM002").write_bytes((folder / "IM002").read_bytes()[:-20])
    with pytest.raises(DicomError, match="truncated: IM002 ends before its pixels do; fetch it again"):
        read_series(folder)
    assert capfd.readouterr() == ("", "")


def test_another_matrix_than_promised(write_series: WriteSeries) -> None:
    """The header of a compressed slice promises other sizes than its stream holds."""

    def pack(dataset: Dataset, k: int) -> None:
        compress(dataset, RLELossless, generate_instance_uid=False)
        dataset.Rows = 40

    with pytest.raises(DicomError, match=r"the pixels in RLE Lossless .* cannot be decoded"):
        read_series(write_series(GRID, VOXELS, edit=pack))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match="nowhere: no such file or folder"):
        read_series(tmp_path / "nowhere")
    with pytest.raises(DicomError, match="no DICOM image series; found no DICOM files"):
        read_series(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DicomError, match="found no DICOM files"):
        read_series(tmp_path / "notes.txt")


def test_a_parser_fault_quotes_nothing(write_series: WriteSeries) -> None:
    """Bytes of a damaged header may be a name, so the parser's words are not passed on."""
    folder = write_series(GRID, VOXELS)
    content = (folder / "IM002").read_bytes()
    (folder / "IM002").write_bytes(content.replace(b"\x20\x00\x32\x00DS", b"\x20\x00\x32\x00SQ"))
    faults: list[DicomError] = []
    for path in folder.iterdir():
        try:
            assert read_headers(path, salt=b"") != ()
        except DicomError as fault:
            faults.append(fault)
    for fault in faults:
        assert_one_clear_line(fault)
        assert fault.__cause__ is None


ODD_FILES = sorted(Path(get_testdata_file("CT_small.dcm", download=False) or "").parent.glob("*.dcm"))


def test_pydicoms_odd_files(capfd: pytest.CaptureFixture[str]) -> None:
    """Files of other makers: each is listed or condemned without a word on the terminal."""
    assert len(ODD_FILES) > 50
    for path in ODD_FILES:
        for series in index_series(path):
            assert series.problems or series.slice_count == 1 or series.slices[0].frame, path.name
            for finding in series.findings:
                assert "\n" not in str(finding)
    assert capfd.readouterr() == ("", "")


def test_damage_anywhere_is_a_dicom_error(data_dir: Path, tmp_path: Path) -> None:
    """Seeded damage to a real file: a header, a refusal, or other pixels; nothing else."""
    content = (data_dir / "dicom_hippocrop" / "14.dcm").read_bytes()
    draw = np.random.default_rng(20)
    outcomes = {"header": 0, "refused": 0}
    path = tmp_path / "damaged.dcm"
    for _ in range(400):
        damaged = bytearray(content)
        for place in draw.integers(132, 1400, size=draw.integers(1, 6)):
            damaged[place] = draw.integers(256)
        path.write_bytes(bytes(damaged[: draw.integers(200, len(damaged))] if draw.random() < 0.3 else damaged))
        try:
            headers = read_headers(path, salt=b"") if is_dicom(path) else ()
        except DicomError:
            outcomes["refused"] += 1
            continue
        outcomes["header"] += 1
        if headers:
            assert isinstance(kind_findings(headers), list)
            with suppress(DicomError):
                assert read_series(path)[0].size
    assert min(outcomes.values()) > 0


def test_the_patient_is_known_by_a_salted_hash_alone(write_series: WriteSeries) -> None:
    def others(dataset: Dataset, k: int) -> None:
        dataset.PatientID, dataset.PatientBirthDate = ("", "1820-0512 ", "7", "")[k], "18200512"
        dataset.PatientName = "" if k == 3 else "Nightingale^Florence"
        dataset.PatientBirthDate = "" if k == 3 else "18200512"

    paths = sorted(write_series(GRID, VOXELS).iterdir())
    (first, *rest) = [read_headers(path, salt=b"salt")[0] for path in paths]
    assert pydicom.dcmread(first.path).PatientName == "Nightingale^Florence"
    assert not any(part in repr(first) for part in IDENTITY)
    # HMAC-SHA256 as any implementation gives it; the identifier comes first, then who issued it.
    assert first.patient_key == hmac.new(b"salt", b"1820-0512\0", "sha256").hexdigest()[:12]
    assert {header.patient_key for header in rest} == {first.patient_key}
    assert read_headers(first.path, salt=b"pepper")[0].patient_key != first.patient_key
    folder = write_series(GRID, VOXELS, edit=others, folder="others")
    headers = sorted((read_headers(path, salt=b"salt")[0] for path in folder.iterdir()), key=lambda h: h.sop_uid)
    by_name, padded, other, nobody = [header.patient_key for header in headers]
    assert padded == first.patient_key
    assert len({by_name, padded, other}) == 3
    assert nobody == ""
