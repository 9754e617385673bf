"""Any header: the gate refuses it, or the volume is what an independent reading of the same header makes of it."""

from __future__ import annotations

import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from transforms.dicom import read_series
from transforms.errors import DicomError

ROWS, COLUMNS, SLICES = 3, 4, 3
OFF_MM = 0.5

NUMBER = st.one_of(
    st.floats(-500, 500).map(lambda x: f"{x:.6g}"),
    st.sampled_from(["0", "1", "-1", "", "1e999", "nan", "-0", "1,5", "0.0000000001", "99999999999999999999", "x"]),
)


def numbers(count: int) -> st.SearchStrategy[str]:
    """Decimal strings, of the right number of values or not."""
    exact = st.lists(NUMBER, min_size=count, max_size=count)
    return st.one_of(exact, exact, st.lists(NUMBER, max_size=count + 2)).map("\\".join)


COSINES = st.one_of(
    st.sampled_from(["1\\0\\0\\0\\1\\0", "0\\1\\0\\0\\0\\-1", "0.8\\0.6\\0\\-0.6\\0.8\\0", "1\\0\\0\\1\\0\\0"]),
    numbers(6),
)
POSITION = st.one_of(st.tuples(*[st.integers(-9, 9)] * 3).map(lambda p: "\\".join(map(str, p))), numbers(3))
CHANGES: dict[str, tuple[str, st.SearchStrategy[Any]]] = {
    "ImagePositionPatient": ("DS", POSITION),
    "ImageOrientationPatient": ("DS", COSINES),
    "PixelSpacing": ("DS", st.one_of(st.just("2\\0.5"), numbers(2))),
    "SpacingBetweenSlices": ("DS", numbers(1)),
    "SliceThickness": ("DS", numbers(1)),
    "RescaleSlope": ("DS", st.one_of(st.just("2.5"), numbers(1))),
    "RescaleIntercept": ("DS", st.one_of(st.just("-7"), numbers(1))),
    "Rows": ("US", st.sampled_from([0, 1, 3, 4, 65535])),
    "Columns": ("US", st.sampled_from([0, 1, 4, 5, 65535])),
    "NumberOfFrames": ("IS", st.sampled_from(["1", "0", "-1", "2", "2147483647", "10000", ""])),
    "BitsAllocated": ("US", st.sampled_from([0, 1, 8, 12, 16, 32, 64])),
    "BitsStored": ("US", st.sampled_from([0, 8, 12, 16, 17])),
    "HighBit": ("US", st.sampled_from([0, 7, 11, 15])),
    "PixelRepresentation": ("US", st.sampled_from([0, 1, 2])),
    "SamplesPerPixel": ("US", st.sampled_from([0, 1, 3])),
    "InstanceNumber": ("IS", numbers(1).filter(lambda text: "1e999" not in text)),  # pydicom cannot write that
    "EchoTime": ("DS", numbers(1)),
    "ImageType": ("CS", st.sampled_from(["ORIGINAL\\PRIMARY\\M", "ORIGINAL\\PRIMARY\\LOCALIZER", "", "DERIVED"])),
    "PixelPaddingValue": ("US", st.sampled_from([0, 5, 65535])),
}


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, Any, int | None]]:
    """Some elements, each replaced in one slice or in all."""
    keywords = draw(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=3, unique=True))
    return [(word, draw(CHANGES[word][1]), draw(st.sampled_from([None, None, *range(SLICES)]))) for word in keywords]


def written(folder: Path, changes: list[tuple[str, Any, int | None]]) -> Path:
    """Three slices, 2 mm apart, with the changes."""
    for k in range(SLICES):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, f"1.2.3.{k + 1}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.1", "1.2.2", "1.2.4"
        dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MR", "MONOCHROME2", 1
        dataset.Rows, dataset.Columns = ROWS, COLUMNS
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 2 * k], [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [1, 1]
        dataset.PixelData = (np.arange(ROWS * COLUMNS, dtype="<u2") + 100 * k).tobytes()
        for keyword, value, where in changes:
            if where in (None, k):
                dataset[keyword] = _raw(keyword, value)
        dataset.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    return folder


def _raw(keyword: str, value: Any) -> RawDataElement:
    """An element of these very bytes, which no library has judged."""
    vr = CHANGES[keyword][0]
    content = struct.pack("<H", value) if vr == "US" else value.encode() + b" " * (len(value) % 2)
    return RawDataElement(Tag(keyword), vr, len(content), content, 0, False, True)


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(edits())
def test_refused_or_right(changes: list[tuple[str, Any, int | None]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        with pydicom.config.disable_value_validation():
            folder = written(Path(name), changes)
        try:
            voxels, geometry, series = read_series(folder)
        except DicomError:
            event("refused")
            return
        event("read")
        assert voxels.shape == geometry.shape
        assert np.isfinite(voxels).all()
        for k, header in enumerate(series.slices):
            _assert_slice(header.path, voxels[:, :, k], geometry.affine_lps, k)


def _assert_slice(path: Path, voxels: np.ndarray, affine_lps: np.ndarray, k: int) -> None:
    """Each pixel of a slice lies and measures what its own header says (PS3.3 C.7.6.2.1.1 and C.11.1)."""
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        position = np.array([float(x) for x in dataset.ImagePositionPatient])
        row, column = np.array([float(x) for x in dataset.ImageOrientationPatient]).reshape(2, 3)
        between_rows, between_columns = (float(x) for x in dataset.PixelSpacing)
        for i, j in ((0, 0), (dataset.Columns - 1, 0), (0, dataset.Rows - 1)):
            said = position + i * between_columns * row + j * between_rows * column
            assert np.linalg.norm(affine_lps[:3] @ (i, j, k, 1) - said) < OFF_MM * min(between_rows, between_columns)
        slope, intercept = (float(dataset.get(word) or absent) for word, absent in _RESCALE)
        stored = _stored(dataset)
        measured = stored * slope + intercept
        padding = dataset.get("PixelPaddingValue")
        expected = measured if padding is None else np.where(stored == padding, 0.0, measured)
        assert np.allclose(voxels, expected.T, rtol=1e-6)


def _stored(dataset: Dataset) -> np.ndarray:
    """The pixels' numbers, taken from their bits one by one (PS3.5 8.1.1)."""
    size, bits = dataset.BitsAllocated // 8, dataset.BitsStored
    content = dataset.PixelData[: dataset.Rows * dataset.Columns * size]
    numbers = []
    for start in range(0, len(content), size):
        number = int.from_bytes(content[start : start + size], "little") & ((1 << bits) - 1)
        is_negative = dataset.PixelRepresentation == 1 and number >> (bits - 1)
        numbers.append(number - (1 << bits) if is_negative else number)
    return np.array(numbers, dtype=np.float64).reshape(dataset.Rows, dataset.Columns)


_RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
