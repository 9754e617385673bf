"""Stored values of every kind: right in each transfer syntax, refused where they cannot be, the twin as oracle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import compress, pixel_array
from pydicom.uid import JPEGLSLossless, RLELossless

from transforms.dicom import index_series, read_series, read_voxels
from transforms.dicom_decoders import JPEG_2000_LOSSLESS, JPEG_LOSSLESS, JPEG_LS, RLE, Sample, decode
from transforms.dicom_header import Header, read_headers
from transforms.dicom_pixels import fill_slices
from transforms.errors import DicomError
from transforms.geometry import Geometry

WriteSeries = Callable[..., Path]
Edit = Callable[[Dataset, int], None]
CT, NATIVE_CT = "ct_slice/1.2.840.10008.{}.dcm", "ct_slice/1.2.840.10008.1.2.1.99.dcm"
GRID = Geometry.from_lps((6, 5, 4), np.diag([0.8, 1.25, 2.5, 1.0]))
VALUES = np.arange(120, dtype=np.int16).reshape(GRID.shape)


@pytest.fixture
def odd(data_dir: Path) -> Path:
    return data_dir / "dicom_odd"


def header_of(path: Path) -> Header:
    return read_headers(path, salt=b"")[0]


def read_frames(path: Path) -> np.ndarray:
    """All frames (K, rows, columns) of a file, in the order in which they are stored."""
    header = header_of(path)
    frames = [replace(header, frame=n + 1) for n in range(header.frames)]
    stack = np.empty((len(frames), header.rows, header.columns), dtype=np.float32)
    fill_slices(stack, frames, background=0.0)
    return stack


@pytest.mark.parametrize(
    ("packed", "twin"),
    [
        (CT.format("1.2.4.57"), NATIVE_CT),
        ("mr_frames/emri_small_RLE.dcm", "mr_frames/emri_small.dcm"),
        ("mr_frames/emri_small_jpeg_2k_lossless.dcm", "mr_frames/emri_small.dcm"),
        ("mr_frames/emri_small_jpeg_ls_lossless.dcm", "mr_frames/emri_small.dcm"),
        ("mr_slice/jpeg.dcm", "mr_slice/rle.dcm"),
        ("mr_slice/jpegls.dcm", "mr_slice/rle.dcm"),
        ("mr_slice/j2k.dcm", "mr_slice/rle.dcm"),
    ],
)
def test_lossless_code_equals_its_twin(odd: Path, packed: str, twin: str) -> None:
    values = read_frames(odd / packed)
    assert np.ptp(values) > 200
    assert np.array_equal(values, read_frames(odd / twin))


def test_native_values_by_hand(odd: Path) -> None:
    """Ten frames of 12-bit values lie at the end of the file, without anything done to them."""
    path = odd / "mr_frames" / "emri_small.dcm"
    raw = np.frombuffer(path.read_bytes()[-10 * 64 * 64 * 2 :], "<u2").reshape(10, 64, 64)
    assert np.array_equal(read_frames(path), raw)


def test_deflated_values(odd: Path) -> None:
    path = odd / NATIVE_CT
    (header,) = read_headers(path, salt=b"")
    assert header.pixels is not None
    assert header.pixels.deflated_from is not None
    assert np.array_equal(read_frames(path)[0], pydicom.dcmread(path).pixel_array - 1024.0)


@pytest.mark.parametrize(
    ("syntax", "largest_hu"), [("1.2.4.50", 2 * 32.13), ("1.2.4.51", 36.0), ("1.2.4.81", 1.0), ("1.2.4.91", 5.0)]
)
def test_lossy_code_is_near_its_twin_and_reported(
    odd: Path, capfd: pytest.CaptureFixture[str], syntax: str, largest_hu: float
) -> None:
    """JPEG baseline keeps 8 bits of a slope of 32.12 HU; near-lossless JPEG-LS was allowed to be off by one."""
    path = odd / CT.format(syntax)
    difference = np.abs(read_frames(path) - read_frames(odd / NATIVE_CT))
    assert 0 < difference.max() <= largest_hu
    assert difference.mean() < largest_hu * 0.7
    (series,) = index_series(path)
    (lossy,) = [finding for finding in series.findings if finding.name == "lossy"]
    assert (lossy.outcome, path.name in lossy.evidence) == ("mend", True)
    # GDCM's decoder complains on standard error about 12 bits before it decodes them.
    assert capfd.readouterr() == ("", "")


def test_a_header_may_say_that_its_values_were_lossy(write_series: WriteSeries) -> None:
    (series,) = index_series(
        write_series(GRID, VALUES, edit=lambda dataset, k: setattr(dataset, "LossyImageCompression", "01"))
    )
    assert [(finding.name, finding.outcome) for finding in series.findings] == [("lossy", "mend")]


@pytest.mark.parametrize(("syntax", "name"), [("1.2.4.53", "Process 6 and 8"), ("1.2.4.55", "Process 10 and 12")])
def test_syntaxes_without_a_decoder_are_named(odd: Path, syntax: str, name: str) -> None:
    with pytest.raises(
        DicomError, match=rf"transfer-syntax: no decoder for JPEG .*{name}\) \(1\.2\.840\.10008\.{syntax}\)"
    ):
        read_series(odd / CT.format(syntax))


def test_frames_in_fragments_without_a_table(odd: Path) -> None:
    """Eleven fragments, two frames: each begins with a JPEG marker. The slope is that of the functional groups."""
    path = odd / "ct_slice" / "two_frames_in_fragments.dcm"
    headers = read_headers(path, salt=b"")
    assert [header.frame for header in headers] == [1, 2]
    assert [header.pixels.fragments for header in headers if header.pixels] == [11, 11]
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert np.array_equal(read_frames(path), theirs)
    with pytest.raises(DicomError, match=r"colour: .* stand for colours of a palette"):
        read_series(path)


def test_colours_are_refused(odd: Path) -> None:
    with pytest.raises(DicomError, match=r"colour: IM-0001-0001-0001.dcm, IM-0001-0002-0001.dcm has RGB"):
        read_series(odd / "rgb")


def test_mixed_syntaxes_make_one_volume(write_series: WriteSeries) -> None:
    def pack(dataset: Dataset, k: int) -> None:
        if k < 2:
            compress(dataset, (JPEGLSLossless, RLELossless)[k], generate_instance_uid=False)

    voxels, _, series = read_series(write_series(GRID, VALUES - 60, edit=pack))
    assert np.array_equal(voxels, VALUES - 60)
    assert len({header.transfer_syntax for header in series.slices}) == 3
    assert series.findings == ()


def test_a_jpeg_2000_stream_of_the_wrong_sign() -> None:
    """13-bit signed values that were written as unsigned ones: pydicom's own test file and reading."""
    path = Path(str(get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False)))
    (header,) = read_headers(path, salt=b"")
    stack = np.empty((1, header.rows, header.columns), dtype=np.float32)
    fill_slices(stack, [replace(header, padding=None)], background=0.0)
    dataset = pydicom.dcmread(path)
    stored = pixel_array(dataset, raw=True)
    assert stored.min() == -2000
    assert np.array_equal(stack[0], stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept))


@pytest.mark.parametrize(
    "name",
    [
        "JPEG2000.dcm",
        "JPEGLSNearLossless_08.dcm",
        "JPEGLSNearLossless_16.dcm",
        "MR_small_bigendian.dcm",
        "image_dfl.dcm",
    ],
)
def test_pydicoms_own_oddities(name: str) -> None:
    path = Path(str(get_testdata_file(name, download=False)))
    dataset = pydicom.dcmread(path)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    headers = [replace(header_of(path), padding=None)]
    stack = np.empty((1, headers[0].rows, headers[0].columns), dtype=np.float32)
    fill_slices(stack, headers, background=0.0)
    assert np.array_equal(stack[0], pixel_array(dataset, raw=True) * slope + intercept)


class TestDamage:
    """Files that are not what their headers say."""

    def test_a_compressed_file_cut_short(self, odd: Path) -> None:
        """pydicom gives an empty dataset for it, and no error."""
        path = odd / "mr_frames" / "emri_small_jpeg_2k_lossless_too_short.dcm"
        with pytest.warns(UserWarning, match="End of file reached"):
            assert "PixelData" not in pydicom.dcmread(path)
        with pytest.raises(DicomError, match=f"truncated: {path.name} ends before its pixels do"):
            read_series(path)

    def test_fewer_fragments_than_frames(self, odd: Path, tmp_path: Path) -> None:
        dataset = pydicom.dcmread(odd / "enhanced_hyperfine" / "frames.dcm")
        compress(dataset, RLELossless)
        frames = list(generate_frames(dataset.PixelData, number_of_frames=8))
        dataset.save_as(tmp_path / "whole.dcm")
        assert read_series(tmp_path / "whole.dcm")[1].shape == (112, 138, 8)
        dataset.PixelData = encapsulate(frames[:-1])
        dataset.save_as(tmp_path / "short.dcm")
        with pytest.raises(DicomError, match=r"truncated: short.dcm holds fewer pixels than its header promises"):
            read_series(tmp_path / "short.dcm")

    def test_fewer_native_values_than_frames(self, odd: Path, tmp_path: Path) -> None:
        dataset = pydicom.dcmread(odd / "enhanced_hyperfine" / "frames.dcm")
        dataset.PixelData = dataset.PixelData[: -138 * 112 * 2]
        dataset.save_as(tmp_path / "short.dcm")
        with pytest.raises(DicomError, match=r"truncated: short.dcm holds fewer pixels than its header promises"):
            read_series(tmp_path / "short.dcm")

    def test_fragments_that_belong_to_no_frame(self, odd: Path, tmp_path: Path) -> None:
        dataset = pydicom.dcmread(odd / "enhanced_hyperfine" / "frames.dcm")
        compress(dataset, RLELossless)
        frames = list(generate_frames(dataset.PixelData, number_of_frames=8))
        dataset.PixelData = encapsulate([*frames, frames[0]], has_bot=False)
        dataset.save_as(tmp_path / "more.dcm")
        with pytest.raises(DicomError, match="9 pieces of compressed pixel data cannot be told apart into 8 frames"):
            read_series(tmp_path / "more.dcm")

    def test_pixels_of_another_kind_than_the_syntax(self, write_series: WriteSeries) -> None:
        def mislabel(dataset: Dataset, k: int) -> None:
            if k == 1:
                dataset.file_meta.TransferSyntaxUID = RLELossless

        folder = write_series(GRID, VALUES)
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
        with pytest.raises(
            DicomError, match=r"transfer-syntax: IM000.* names RLE Lossless .*, but its pixel data are not"
        ):
            read_series(folder)

    def test_a_file_that_changed_since_it_was_indexed(self, write_series: WriteSeries) -> None:
        folder = write_series(GRID, VALUES)
        (series,) = index_series(folder)
        path = folder / "IM001"
        path.write_bytes(path.read_bytes() + b"\0\0")
        with pytest.raises(DicomError, match=r"IM001: .* the file has changed since it was indexed"):
            read_voxels(series)

    @pytest.mark.parametrize("name", ["jpeg", "jpegls", "j2k"])
    def test_a_codestream_of_another_size(self, odd: Path, tmp_path: Path, name: str) -> None:
        """A decoder is never asked for more than the header promises."""
        dataset = pydicom.dcmread(odd / "mr_slice" / f"{name}.dcm")
        dataset.Rows = 400
        dataset.save_as(tmp_path / "a.dcm")
        with pytest.raises(DicomError, match=r"holds 256 rows of 256 pixels .* the header promises 400 rows of 256"):
            read_frames(tmp_path / "a.dcm")

    @pytest.mark.parametrize(
        ("name", "syntax"),
        [("jpeg", JPEG_LOSSLESS), ("jpegls", JPEG_LS), ("j2k", JPEG_2000_LOSSLESS), ("rle", RLE)],
    )
    def test_damaged_code_is_an_error_or_other_values(self, odd: Path, name: str, syntax: str) -> None:
        """Seeded damage; no decoder may crash, hang, or answer with another number of values."""
        dataset = pydicom.dcmread(odd / "mr_slice" / f"{name}.dcm")
        code = next(generate_frames(dataset.PixelData, number_of_frames=1))
        sample, draw = Sample(256, 256, 16, signed=False), np.random.default_rng(15)
        refused, start_s = 0, time.monotonic()
        for _ in range(25):
            damaged = bytearray(code)
            for place in draw.integers(0, 200 if draw.random() < 0.7 else len(code), size=draw.integers(1, 5)):
                damaged[place] = draw.integers(256)
            try:
                values = decode(bytes(damaged), syntax, sample)
            except DicomError:
                refused += 1
            else:
                assert (values.shape, values.dtype) == ((256, 256), np.dtype("<u2"))
        assert refused > 0
        assert time.monotonic() - start_s < 60


class TestInverted:
    """MONOCHROME1 (PS3.3 C.7.6.3.1.2) is a matter of display: only values without a unit are mirrored."""

    @staticmethod
    def edit(modality: str, *, signed: bool = False, pad: int | None = None) -> Edit:
        def edit(dataset: Dataset, k: int) -> None:
            dataset.PhotometricInterpretation, dataset.Modality = "MONOCHROME1", modality
            dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, int(signed)
            dataset.RescaleSlope, dataset.RescaleIntercept = "2", "10"
            if pad is not None:
                dataset.add_new("PixelPaddingValue", "US", pad)

        return edit

    def test_arbitrary_units_are_mirrored(self, write_series: WriteSeries) -> None:
        """12 bits: a stored 0 was shown brightest, as 4095 is afterwards; the slope comes last (PS3.3 C.11.1)."""
        voxels, _, series = read_series(write_series(GRID, VALUES, edit=self.edit("MR")))
        assert np.array_equal(voxels, (4095 - VALUES) * 2.0 + 10)
        assert [str(finding) for finding in series.findings] == [
            "monochrome1: IM000, IM001, IM002 and 1 more shows low values bright; stored values were mirrored"
        ]

    def test_signed_values_are_mirrored_about_their_middle(self, write_series: WriteSeries) -> None:
        voxels, _, _ = read_series(write_series(GRID, VALUES - 60, edit=self.edit("MR", signed=True)))
        assert np.array_equal(voxels, (-1.0 - (VALUES - 60)) * 2 + 10)

    def test_padding_is_known_before_mirroring(self, write_series: WriteSeries) -> None:
        voxels, _, _ = read_series(write_series(GRID, VALUES, edit=self.edit("MR", pad=7)))
        assert voxels[VALUES == 7].tolist() == [0.0]
        assert np.array_equal(voxels[VALUES != 7], (4095 - VALUES[VALUES != 7]) * 2.0 + 10)

    @pytest.mark.parametrize("modality", ["CT", "PT"])
    def test_measurements_are_kept(self, write_series: WriteSeries, modality: str) -> None:
        voxels, _, series = read_series(write_series(GRID, VALUES, edit=self.edit(modality)))
        assert np.array_equal(voxels, VALUES * 2.0 + 10)
        assert [finding.name for finding in series.findings] == ["monochrome1"]
        assert series.findings[0].evidence.endswith("values are measurements and were kept")


def test_a_private_scale_is_reported_and_not_applied(write_series: WriteSeries) -> None:
    def scale(dataset: Dataset, k: int) -> None:
        dataset.RescaleSlope = "3"
        block = dataset.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", 0.125)

    voxels, _, series = read_series(write_series(GRID, VALUES, edit=scale))
    assert np.array_equal(voxels, VALUES * 3.0)
    assert [finding.name for finding in series.findings] == ["private-scaling"]


def test_a_place_where_float_values_would_be(write_series: WriteSeries) -> None:
    def float_pixels(dataset: Dataset, k: int) -> None:
        del dataset.PixelData
        dataset.FloatPixelData = VALUES[:, :, k].T.astype("<f4").tobytes()

    with pytest.raises(DicomError, match=r"no-pixel-data: IM000, .* promises an image and holds no whole numbers"):
        read_series(write_series(GRID, VALUES, edit=float_pixels))


def test_bytes_in_big_endian_words_are_refused(tmp_path: Path) -> None:
    """They would lie in pairs the other way round (PS3.5 8.1.1)."""
    shutil.copy(Path(str(get_testdata_file("MR_small_bigendian.dcm", download=False))), tmp_path / "a.dcm")
    (header,) = read_headers(tmp_path / "a.dcm", salt=b"")
    assert header.pixels is not None
    assert header.pixels.is_words
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(DicomError, match=r"pixel-format: a.dcm: 8 bits stored of 8 allocated"):
        read_series(tmp_path / "a.dcm")
