"""Reads a DICOM RT Structure Set with pydicom alone, and fills its contours: a pixel belongs to a contour when its
centre lies within by the even-odd rule.

Places are judged twice. Each contour must follow the edges between pixels of the slice that it names, by that
slice's own header. And the pixels inside, found on the segmentation's grid, must be the label's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread

from pipeline.errors import ExportError
from pipeline.export.spans import counted, voxels
from pipeline.export.verify import Piece, Verification, compare, indices_of
from pipeline.export.verify_links import check_links
from pipeline.quiet import quiet
from pipeline.segmentation import Segmentation
from transforms.dicom import DicomSeries
from transforms.geometry import Geometry
from transforms.labels import CodedConcept, Label

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PLACING_VOXELS = 0.45
"""How far a contour's plane and centre may lie from the grid's. The grid idealises the slices' own numbers
(directions made orthonormal, slices evenly spaced); half a voxel or more is an error."""

BORDER_PIXELS = 0.02
"""How far a contour's points may lie from the corners of pixels, and from the slice's plane."""

DS_CHARACTERS = 16
FEWEST_POINTS = 4
"""A contour encloses at least one pixel."""

_PIECE_SPANS = 50_000


def verify_rtstruct(path: Path, segmentation: Segmentation, series: DicomSeries) -> Verification:
    """Compare a structure set with what was to be written: links, ROIs, references, contours.

    Raises:
        ExportError: anything differs.
    """
    with quiet():
        dataset = dcmread(path)
        check_links(dataset, series)
        _check_chain(dataset, series)
        labels = _check_rois(dataset, segmentation)
        pieces = _pieces(dataset, labels, _slices(series), segmentation.geometry)
        return compare(pieces, segmentation, reader="pydicom", placing_voxels=PLACING_VOXELS)


def _check_chain(dataset: Dataset, series: DicomSeries) -> None:
    """One frame of reference, study and series, and all of its slices in order."""
    # A source may have no frame of reference; the file must.
    if dataset.FrameOfReferenceUID != (series.slices[0].frame_of_reference or dataset.FrameOfReferenceUID):
        raise ExportError("its FrameOfReferenceUID is not the source's")
    [frame] = dataset.ReferencedFrameOfReferenceSequence
    [study] = frame.RTReferencedStudySequence
    [listed] = study.RTReferencedSeriesSequence
    frames = {frame.FrameOfReferenceUID, *(x.ReferencedFrameOfReferenceUID for x in dataset.StructureSetROISequence)}
    if frames != {dataset.FrameOfReferenceUID}:
        raise ExportError("its ROIs have another frame of reference")
    if study.ReferencedSOPInstanceUID != dataset.StudyInstanceUID:
        raise ExportError("it refers to another study")
    if series.series_uid and listed.SeriesInstanceUID != series.series_uid:
        raise ExportError("it does not refer to the source series")
    if [_named(item) for item in listed.ContourImageSequence] != [(x.sop_uid, x.frame) for x in series.slices]:
        raise ExportError("it does not name the slices of the source series in order")


def _named(item: Dataset) -> tuple[str, int | None]:
    """A slice as it is referred to: the file, and the frame of a file of several."""
    frame = item.get("ReferencedFrameNumber")
    return str(item.ReferencedSOPInstanceUID), None if frame is None else int(frame)


def _check_rois(dataset: Dataset, segmentation: Segmentation) -> dict[int, Label]:
    """Names, codes and colours are the schema's, in its order. Gives labels by ROI number."""
    labels = {int(item.ROINumber): item.ROIName for item in dataset.StructureSetROISequence}
    if tuple(labels.values()) != segmentation.schema.names:
        raise ExportError("its ROIs are not the schema's labels in order")
    found = dict(zip(labels, segmentation.schema.labels, strict=True))
    contours = {int(item.ReferencedROINumber): item for item in dataset.ROIContourSequence}
    observations = {int(item.ReferencedROINumber): item for item in dataset.RTROIObservationsSequence}
    if not list(found) == list(contours) == list(observations):
        raise ExportError("its contours or observations are not those of its ROIs")
    for number, label in found.items():
        observed = observations[number]
        is_right = (
            [int(v) for v in contours[number].ROIDisplayColor] == list(label.colour)
            and _is_code(observed.RTROIIdentificationCodeSequence[0], label.code)
            and _is_code(observed.SegmentedPropertyCategoryCodeSequence[0], label.category)
        )
        if not is_right:
            raise ExportError(f"ROI {number} has another code or colour than the schema")
    return found


def _is_code(item: Dataset, concept: CodedConcept) -> bool:
    found = (item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning)
    return found == (concept.value, concept.scheme, concept.meaning)


@dataclass(frozen=True, eq=False)
class _Slice:
    """A source slice by its own header: `into_pixels` takes mm from its first pixel's centre to (i, j, above it)."""

    k: int
    first_lps_mm: Floats
    into_pixels: Floats
    pixel_mm2: float


Slices = dict[tuple[str, int | None], _Slice]


def _slices(series: DicomSeries) -> Slices:
    found: Slices = {}
    for k, header in enumerate(series.slices):
        if (plane := header.plane) is None:
            raise ExportError("it refers to a slice without a place")
        row, column = np.asarray(plane.row_cosines_lps), np.asarray(plane.column_cosines_lps)
        sides_mm = plane.column_spacing_mm, plane.row_spacing_mm
        # Row and column are only nearly at right angles, so indices are solved for.
        steps_mm = np.stack([row * sides_mm[0], column * sides_mm[1], np.cross(row, column) * min(sides_mm)], axis=1)
        into_pixels: Floats = np.asarray(np.linalg.inv(steps_mm), dtype=np.float64)
        area_mm2 = sides_mm[0] * sides_mm[1]
        found[header.sop_uid, header.frame] = _Slice(k, np.asarray(plane.position_lps_mm), into_pixels, area_mm2)
    return found


@dataclass(frozen=True, eq=False)
class _Contours:
    """The contours of an ROI, points one after the other: indices (N, 3) on the grid, each point's contour and the
    point that follows it, and what the contours enclose together.
    """

    points_ijk: Floats
    owner: Ints
    following: Ints
    slices_k: Ints
    """By contour: the slice that it names."""
    area_mm2: float
    offset_ijk: Floats
    """How far the points lie beside corners of pixels on the grid, on average."""


def _pieces(dataset: Dataset, labels: dict[int, Label], slices: Slices, geometry: Geometry) -> Iterator[Piece]:
    for roi in dataset.ROIContourSequence:
        if "ContourSequence" not in roi:
            continue
        label = labels[int(roi.ReferencedROINumber)]
        contours = _read(roi.ContourSequence, label, slices, geometry)
        spans = _spans(contours)
        count = int((spans[:, 3] - spans[:, 2]).sum())
        volume_mm3 = contours.area_mm2 * _slice_gap_mm(geometry) / max(count, 1)
        for start in range(0, len(spans), _PIECE_SPANS):
            points_ijk = voxels(spans[start : start + _PIECE_SPANS]) + contours.offset_ijk
            yield Piece(label.id, points_ijk @ geometry.affine_lps[:3, :3].T + geometry.affine_lps[:3, 3], volume_mm3)


def _slice_gap_mm(geometry: Geometry) -> float:
    i_mm, j_mm, _ = geometry.affine_lps[:3, :3].T
    return geometry.voxel_volume_mm3 / float(np.linalg.norm(np.cross(i_mm, j_mm)))


def _read(items: Sequence[Dataset], label: Label, slices: Slices, geometry: Geometry) -> _Contours:
    points_mm, on_slice, named = [], [], []
    for item in items:
        [reference] = item.ContourImageSequence
        found = slices.get(_named(reference))
        if found is None:
            raise ExportError(f"a contour of '{label.name}' names a slice that is not the source's")
        named.append(found)
        points_mm.append(_points_lps_mm(item, label))
        on_slice.append((points_mm[-1] - found.first_lps_mm) @ found.into_pixels.T)
    own_ij = np.concatenate(on_slice)
    if np.abs(own_ij[:, :2] % 1.0 - 0.5).max() > BORDER_PIXELS or np.abs(own_ij[:, 2]).max() > BORDER_PIXELS:
        raise ExportError(f"a contour of '{label.name}' does not follow the edges between pixels of its slice")
    lengths = np.array([len(points) for points in points_mm])
    owner, slices_k = np.repeat(np.arange(len(named)), lengths), np.array([found.k for found in named])
    ends = np.cumsum(lengths)
    following = np.arange(1, len(owner) + 1)
    following[ends - 1] = ends - lengths
    # Shoelace formula; holes count against what surrounds them, because they are run through the other way.
    begin, end = own_ij, own_ij[following]
    pixels = np.abs(np.add.reduceat(begin[:, 0] * end[:, 1] - begin[:, 1] * end[:, 0], ends - lengths)) / 2
    area_mm2 = float(pixels @ np.array([found.pixel_mm2 for found in named]))
    points_ijk = indices_of(np.concatenate(points_mm), geometry)
    beside_ijk = np.column_stack([points_ijk[:, :2] % 1.0 - 0.5, points_ijk[:, 2] - slices_k[owner]])
    if np.abs(beside_ijk).max() > PLACING_VOXELS:
        raise ExportError(f"a contour of '{label.name}' does not lie on the slice that it names")
    return _Contours(points_ijk, owner, following, slices_k, area_mm2, beside_ijk.mean(axis=0))


def _points_lps_mm(item: Dataset, label: Label) -> Floats:
    """(N, 3), from the bytes: pydicom's own numbers take many times longer."""
    texts = bytes(item.get_item("ContourData").value).split(b"\\")
    points = np.array(texts, dtype=np.float64).reshape(-1, 3)
    is_right = (
        item.ContourGeometricType == "CLOSED_PLANAR"
        and len(points) == int(item.NumberOfContourPoints) >= FEWEST_POINTS
        and max(map(len, texts)) <= DS_CHARACTERS
    )
    if not is_right:
        raise ExportError(f"a contour of '{label.name}' is no closed polygon of decimal strings")
    return points


def _spans(contours: _Contours) -> Ints:
    """(N, 4): slice k, row j, and the first column i inside and the first one after, for all contours.

    Along a row, each crossing of a contour enters or leaves it.
    """
    begin, end = contours.points_ijk[:, :2], contours.points_ijk[contours.following, :2]
    low, high = (np.ceil(f(begin[:, 1], end[:, 1])).astype(np.int64) for f in (np.minimum, np.maximum))
    # Rows low, ..., high - 1 are crossed: a point that lies on a row belongs to what is below it.
    edge, j = counted(low, high)
    part = (j - begin[edge, 1]) / (end[edge, 1] - begin[edge, 1])
    i = begin[edge, 0] + part * (end[edge, 0] - begin[edge, 0])
    owner = contours.owner[edge]
    order = np.lexsort((i, j, owner))
    # A closed contour crosses a row an even number of times.
    enter, leave = order[0::2], order[1::2]
    columns = np.ceil(i).astype(np.int64)
    return np.stack([contours.slices_k[owner[enter]], j[enter], columns[enter], columns[leave]], axis=1)
