"""Reads a DICOM SEG with pydicom alone: its links to the source, its segments, its pixels where it says they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread

from pipeline.errors import ExportError
from pipeline.export.verify import Sheet, Verification, compare, indices_of
from pipeline.quiet import quiet
from pipeline.segmentation import Segmentation
from transforms.dicom import DicomSeries
from transforms.geometry import Geometry
from transforms.labels import MAX_LABEL_ID, CodedConcept, Label

Floats = npt.NDArray[np.float64]

PLACING_VOXELS = 0.45
"""How far a pixel may lie from its voxel's centre. The grid idealises the slices' own numbers (directions made
orthonormal, slices evenly spaced); half a voxel or more is an error."""

COLOUR_STEPS = 2.0
"""How far a colour may be off after CIELab and back, in steps of 255."""

_LINKS = ("PatientID", "PatientName", "PatientBirthDate", "AccessionNumber", "StudyInstanceUID")

Array = npt.NDArray[Any]
Named = tuple[str, int | None]
"""A source slice as files refer to it: the instance, and the frame of a multi-frame one."""


def verify_seg(path: Path, segmentation: Segmentation, series: DicomSeries) -> Verification:
    """Compare a DICOM SEG, BINARY or LABELMAP, with what was to be written: links, segments, references, voxels.

    Raises:
        ExportError: anything differs.
    """
    with quiet():
        dataset = dcmread(path)
        _check_links(dataset, series)
        label_ids = _check_segments(dataset, segmentation)
        slices = _slices(series, segmentation.geometry)
        sheets = _sheets(dataset, label_ids, slices)
        expected = _on_slices(segmentation, slices)
        return compare(sheets, expected, reader="pydicom", placing_voxels=PLACING_VOXELS)


@dataclass(frozen=True, eq=False)
class _Slices:
    """The source's slices: how a file refers to each, and where each lies on the k axis of the label map's grid."""

    named: tuple[Named, ...]
    positions_k: Floats
    geometry: Geometry


def _slices(series: DicomSeries, geometry: Geometry) -> _Slices:
    named = tuple((header.sop_uid, header.frame) for header in series.slices)
    positions_k = np.arange(len(named)) if series.slice_positions_k is None else np.array(series.slice_positions_k)
    return _Slices(named, positions_k.astype(np.float64), geometry)


def _on_slices(segmentation: Segmentation, slices: _Slices) -> Segmentation:
    """The label map with the source's slices as its planes.

    Uneven gaps are left out of its grid, and of the places that are read (`_sheets`): volumes count slices there.
    """
    columns, rows, planes = segmentation.geometry.shape
    nearest = np.abs(np.arange(planes) - slices.positions_k[:, None]).argmin(axis=1)
    if np.array_equal(nearest, range(planes)):
        return segmentation
    geometry = Geometry((columns, rows, len(nearest)), segmentation.geometry.affine_ras)
    return replace(segmentation, label_map=segmentation.label_map[:, :, nearest], geometry=geometry)


def _check_links(dataset: Dataset, series: DicomSeries) -> None:
    source = dcmread(series.paths[0], stop_before_pixels=True, force=True)
    for keyword in _LINKS:
        # The values stay out of the message: they are the patient's.
        if str(dataset.get(keyword) or "") != str(source.get(keyword) or ""):
            raise ExportError(f"its {keyword} is not the source's")
    # A source may have none; the file must.
    expected = str(source.get("FrameOfReferenceUID") or dataset.FrameOfReferenceUID)
    if str(dataset.FrameOfReferenceUID) != expected or not expected:
        raise ExportError("its FrameOfReferenceUID is not the source's")
    referenced = [str(item.SeriesInstanceUID) for item in dataset.ReferencedSeriesSequence]
    if referenced != [series.series_uid]:
        raise ExportError("it does not refer to the source series")
    named = [str(x.ReferencedSOPInstanceUID) for x in dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    if sorted(named) != sorted({header.sop_uid for header in series.slices}):
        raise ExportError("it does not name every file of the source series once")


def _check_segments(dataset: Dataset, segmentation: Segmentation) -> dict[int, int]:
    """Names, codes and colours are the schema's, in its order. Gives label ids by segment number."""
    by_name = {label.name: label for label in segmentation.schema.labels}
    label_ids: dict[int, int] = {}
    for item in dataset.SegmentSequence:
        label = by_name.get(item.SegmentLabel)
        if label is None or not _describes(item, label):
            raise ExportError(f"segment {item.SegmentNumber} has another name, code or colour than the schema")
        label_ids[int(item.SegmentNumber)] = label.id
    if tuple(label_ids.values()) != segmentation.schema.ids:
        raise ExportError("its segments are not the schema's labels in order")
    return label_ids


def _describes(item: Dataset, label: Label) -> bool:
    colour = _rgb_from_lab(item.RecommendedDisplayCIELabValue)
    return (
        _is_code(item.SegmentedPropertyTypeCodeSequence[0], label.code)
        and _is_code(item.SegmentedPropertyCategoryCodeSequence[0], label.category)
        and bool(np.abs(colour - label.colour).max() <= COLOUR_STEPS)
    )


def _is_code(item: Dataset, concept: CodedConcept) -> bool:
    found = (item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning)
    return found == (concept.value, concept.scheme, concept.meaning)


def _rgb_from_lab(scaled_lab: Iterable[int]) -> Floats:
    """PS3.3 section C.10.7.1.1 integers to sRGB 0..255, with the D65 white that DICOM software uses."""
    lightness, a, b = (float(v) for v in scaled_lab)
    lightness, a, b = lightness * 100 / 65535, a * 255 / 65535 - 128, b * 255 / 65535 - 128
    y = (lightness + 16) / 116
    roots = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * (0.9505, 1.0, 1.089)
    # IEC 61966-2-1
    linear = np.linalg.solve([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], xyz)
    linear = np.clip(linear, 0.0, 1.0)
    return np.asarray(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def _sheets(dataset: Dataset, label_ids: dict[int, int], slices: _Slices) -> Iterator[Sheet]:
    shared = dataset.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    row_step_mm, column_step_mm = (float(v) for v in measures.PixelSpacing)
    cosines = np.asarray(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=np.float64)
    # Slices with uneven gaps have no one spacing.
    volume_mm3 = row_step_mm * column_step_mm * float(measures.get("SpacingBetweenSlices") or measures.SliceThickness)
    k_mm = slices.geometry.affine_lps[:3, 2]
    frames = _label_frames if dataset.SegmentationType == "LABELMAP" else _segment_frames
    for values, groups in zip(frames(dataset, label_ids), dataset.PerFrameFunctionalGroupsSequence, strict=True):
        corner_lps_mm = np.asarray(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=np.float64)
        n = _named_slice(groups, corner_lps_mm, slices)
        corner_lps_mm += (n - slices.positions_k[n]) * k_mm
        yield Sheet(values, corner_lps_mm, row_step_mm * cosines[3:], column_step_mm * cosines[:3], volume_mm3)


def _label_frames(dataset: Dataset, label_ids: dict[int, int]) -> Iterator[Array]:
    """Label ids (rows, columns) of frames whose pixels are segment numbers."""
    by_number = np.zeros(MAX_LABEL_ID + 1, dtype=np.uint16)
    by_number[list(label_ids)] = list(label_ids.values())
    count = dataset.Rows * dataset.Columns
    pixels = np.frombuffer(dataset.PixelData, dtype=f"<u{dataset.BitsAllocated // 8}")
    for frame in pixels[: count * int(dataset.NumberOfFrames)].reshape(-1, dataset.Rows, dataset.Columns):
        values = by_number[frame]
        if ((values == 0) & (frame != 0)).any():
            raise ExportError("it holds a segment that it does not describe")
        yield values


def _segment_frames(dataset: Dataset, label_ids: dict[int, int]) -> Iterator[Array]:
    """Label ids (rows, columns) of frames of packed bits, of which each says whose they are.

    One follows the other without filling up bytes (PS3.5 section 8.1.1).
    """
    count = dataset.Rows * dataset.Columns
    packed = np.frombuffer(dataset.PixelData, dtype=np.uint8)
    for n, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        start = n * count
        bits = np.unpackbits(packed[start // 8 : -(-(start + count) // 8)], bitorder="little")
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        yield bits[start % 8 :][:count].reshape(dataset.Rows, dataset.Columns) * np.uint16(label_ids[number])


def _named_slice(groups: Dataset, corner_lps_mm: Floats, slices: _Slices) -> int:
    """The number of the source slice that a frame names, which is the one that lies where the frame does."""
    k = float(indices_of(corner_lps_mm[None], slices.geometry)[0, 2])
    n = int(np.abs(slices.positions_k - k).argmin())
    named = [
        (str(image.ReferencedSOPInstanceUID), image.get("ReferencedFrameNumber"))
        for derivation in groups.DerivationImageSequence
        for image in derivation.SourceImageSequence
    ]
    if abs(k - slices.positions_k[n]) >= 0.5 or named != [slices.named[n]]:
        raise ExportError("a frame does not refer to the source slice that lies at its position")
    return n
