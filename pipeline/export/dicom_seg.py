"""DICOM Segmentation (PS3.3 sections A.51 and A.86), BINARY or LABELMAP, on the planes of the source series.

Patient, study and frame of reference are the source's; series and instance are new. In both kinds segment c is
class c of the label schema, whether it occurs or not, so that other objects name segments without asking which kind
it is; label ids with gaps would shift colours in viewers that count the segments. Frames without a voxel are left out.
Where slices with uneven gaps were interpolated onto an even grid, each slice gets the plane nearest to it.

highdicom makes the object from one plane; the frames are put in here. So the work grows with the frames that are
written and not with labels times slices, and slices may lie anywhere: frames of one file, or sheared by a gantry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from pipeline.errors import ExportError
from pipeline.export.dicom_source import (
    LO_CHARACTERS,
    SH_CHARACTERS,
    check_length,
    decimal_strings,
    description,
    frame_of_reference,
    planes_of_slices,
    referenced_instances,
    source_header,
    source_image,
    take_identity,
)
from pipeline.postprocessing import described
from pipeline.quiet import quiet
from pipeline.segmentation import Algorithm, Segmentation
from transforms.dicom import DicomSeries
from transforms.dicom_header import Header
from transforms.labels import CodedConcept, Label

SERIES_NUMBER_OFFSET = 1000
"""Added to the source's series number, so that viewers list the segmentation behind the study's images."""

ST_CHARACTERS = 1024
"""The longest short text (PS3.5 section 6.2)."""

MOST_PIXEL_BYTES = 2**32 - 2
"""The longest value that DICOM can hold (PS3.5 section 7.1.2)."""

Planes = npt.NDArray[np.uint8 | np.uint16]
Kind = hd.seg.SegmentationTypeValues


@dataclass(frozen=True)
class Frame:
    """A frame to write: the number of the source slice, and the segment on it; None for all of them."""

    k: int
    segment: int | None


def write_seg(target: Path, segmentation: Segmentation, series: DicomSeries) -> None:
    """Write a BINARY segmentation of `series`, on whose grid the label map lies.

    Raises:
        ExportError: the source lacks what a segmentation must refer to, a label does not fit DICOM's limits, or the
            frames of so many labels do not fit a file.
    """
    _write(target, segmentation, series, Kind.BINARY)


def write_labelmap(target: Path, segmentation: Segmentation, series: DicomSeries) -> None:
    """Write a LABELMAP segmentation, as `write_seg`: one frame a slice, of 8 bits, or 16 for more than 255 labels.

    Raises:
        ExportError: as for `write_seg`.
    """
    _write(target, segmentation, series, Kind.LABELMAP)


def _write(target: Path, segmentation: Segmentation, series: DicomSeries, kind: Kind) -> None:
    classes = segmentation.schema.classes_from_ids(segmentation.label_map)
    # A copy with the slices contiguous: they are encoded many times faster.
    planes = np.ascontiguousarray(classes.transpose(2, 1, 0)[planes_of_slices(series)])
    frames = list(_frames_of(planes, kind))
    _check_size(planes, frames, kind)
    with quiet():
        lead = source_header(series.slices[0])
        identity = take_identity(lead)
        _complete(lead, segmentation, series)
        segments = [_segment(n, x, segmentation) for n, x in enumerate(segmentation.schema.labels, start=1)]
        try:
            dataset = _one_frame(segmentation, segments, lead, kind)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(
                f"the source series cannot be described in a DICOM SEG ({error}); export another format, as nifti"
            ) from error
        if series.slice_positions_k is not None:
            del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
        _refer(dataset, series)
        _put_frames(dataset, frames, series)
        dataset.PixelData = _packed(planes, frames) if kind is Kind.BINARY else _stacked(planes, frames)
        for element in identity:
            dataset.add(element)
        dataset.save_as(target, enforce_file_format=True)


def _frames_of(planes: Planes, kind: Kind) -> Iterator[Frame]:
    """By segment, then by plane, those that hold something. A multi-frame object has at least one frame."""
    found = [(int(c), k) for k, plane in enumerate(planes) for c in np.flatnonzero(np.bincount(plane.ravel())) if c]
    if not found:
        yield Frame(0, 1 if kind is Kind.BINARY else None)
    elif kind is Kind.BINARY:
        yield from (Frame(k, c) for c, k in sorted(found))
    else:
        yield from (Frame(k, None) for k in sorted({k for _, k in found}))


def _check_size(planes: Planes, frames: Sequence[Frame], kind: Kind) -> None:
    bits = 1 if kind is Kind.BINARY else 8 * planes.itemsize
    size = len(frames) * planes[0].size * bits // 8
    if size > MOST_PIXEL_BYTES:
        advice = "'labelmap', which holds a frame a slice" if kind is Kind.BINARY else "'nifti'"
        raise ExportError(
            f"{len(frames)} frames of a {kind.value} DICOM SEG are {size / 2**30:.1f} GB of pixels, and DICOM holds 4: "
            f"export {advice}"
        )


def _complete(lead: Dataset, segmentation: Segmentation, series: DicomSeries) -> None:
    """Give the leading slice what highdicom copies from it.

    The gap between slices comes from their positions: SliceThickness and SpacingBetweenSlices are often wrong.
    """
    lead.FrameOfReferenceUID = frame_of_reference(series)
    lead.SliceThickness = lead.SpacingBetweenSlices = format_number_as_ds(_slice_gap_mm(segmentation))
    # The description of one slice, whatever file it comes from; the references below name the real class.
    lead.SOPClassUID = SecondaryCaptureImageStorage


def _slice_gap_mm(segmentation: Segmentation) -> float:
    """Distance between neighbouring planes, along their normal (PS3.3 section C.7.6.16.2.1)."""
    i_mm, j_mm, _ = segmentation.geometry.affine_ras[:3, :3].T
    return segmentation.geometry.voxel_volume_mm3 / float(np.linalg.norm(np.cross(i_mm, j_mm)))


def _segment(number: int, label: Label, segmentation: Segmentation) -> hd.seg.SegmentDescription:
    check_length(label.name, LO_CHARACTERS, f"the name of label {label.id}")
    found = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label.name,
        segmented_property_category=_code(label.category),
        segmented_property_type=_code(label.code),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=_algorithm(segmentation.algorithm),
        tracking_uid=generate_uid(prefix=None),
        tracking_id=label.name,
        display_color=hd.color.CIELabColor.from_rgb(*label.colour),
    )
    cleaning = segmentation.postprocessing.actions if segmentation.postprocessing else ()
    if done := [action for action in cleaning if label.name in action.labels]:
        found.SegmentDescription = f"post-processed: {described(done)}"[:ST_CHARACTERS]
    return found


@lru_cache(maxsize=1)
def _algorithm(algorithm: Algorithm) -> hd.AlgorithmIdentificationSequence:
    return hd.AlgorithmIdentificationSequence(
        name=algorithm.name[:LO_CHARACTERS],
        version=algorithm.version[:LO_CHARACTERS] or "unknown",
        family=codes.cid7162.ArtificialIntelligence,
    )


def _code(concept: CodedConcept) -> hd.sr.CodedConcept:
    check_length(concept.value, SH_CHARACTERS, "the code value")
    check_length(concept.scheme, SH_CHARACTERS, "the coding scheme")
    check_length(concept.meaning, LO_CHARACTERS, "the code meaning")
    return hd.sr.CodedConcept(concept.value, concept.scheme, concept.meaning)


def _one_frame(
    segmentation: Segmentation, segments: Sequence[hd.seg.SegmentDescription], lead: Dataset, kind: Kind
) -> Dataset:
    """The object with all that is not in its frames. The frame that it holds stands for those to come."""
    pixels = np.zeros((1, lead.Rows, lead.Columns), dtype=np.uint16)
    pixels[0, 0, 0] = 1
    dataset = hd.seg.Segmentation(
        source_images=[lead],
        pixel_array=pixels,
        segment_descriptions=segments,
        segmentation_type=kind,
        content_label="SEGMENTATION",
        content_description="Made by software, for research",
        # Holds the patient's name and the labels', whatever their scripts.
        specific_character_set="ISO_IR 192",
        **description(segmentation.algorithm, lead, what="Segmentation", number_offset=SERIES_NUMBER_OFFSET),
    )
    # highdicom describes the background as segment 0, and viewers that count the segments shift all colours by one.
    dataset.SegmentSequence = [item for item in dataset.SegmentSequence if item.SegmentNumber]
    # With one segment highdicom says among the shared groups which one it is; here each frame says it.
    dataset.SharedFunctionalGroupsSequence[0].pop("SegmentIdentificationSequence", None)
    return dataset


def _refer(dataset: Dataset, series: DicomSeries) -> None:
    """Name all files of the source, not only those with something in them."""
    dataset.SourceImageSequence = referenced_instances(series)
    dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence = referenced_instances(series)


def _put_frames(dataset: Dataset, frames: Sequence[Frame], series: DicomSeries) -> None:
    ranks = {k: rank for rank, k in enumerate(sorted({frame.k for frame in frames}), start=1)}
    places = {k: _place(series.slices[k]) for k in ranks}
    dataset.NumberOfFrames = len(frames)
    dataset.PerFrameFunctionalGroupsSequence = [_groups(frame, ranks[frame.k], places[frame.k]) for frame in frames]


def _place(found: Header) -> Dataset:
    """The functional groups of a plane: where it lies, and the source slice that lies there."""
    assert found.plane is not None  # see `check_series`
    position, derivation, groups = Dataset(), Dataset(), Dataset()
    position.ImagePositionPatient = decimal_strings(found.plane.position_lps_mm)
    derivation.SourceImageSequence = [source_image(found)]
    derivation.DerivationCodeSequence = [_code(CodedConcept(value="113076", scheme="DCM", meaning="Segmentation"))]
    groups.PlanePositionSequence, groups.DerivationImageSequence = [position], [derivation]
    return groups


def _groups(frame: Frame, rank: int, place: Dataset) -> Dataset:
    """The functional groups of a frame. Those of its plane are shared by the frames on it, since there may be many."""
    groups, content = Dataset(), Dataset()
    content.DimensionIndexValues = [rank] if frame.segment is None else [frame.segment, rank]
    groups.FrameContentSequence = [content]
    if frame.segment is not None:
        identification = Dataset()
        identification.ReferencedSegmentNumber = frame.segment
        groups.SegmentIdentificationSequence = [identification]
    for element in place:
        groups.add(element)
    return groups


def _packed(planes: Planes, frames: Sequence[Frame]) -> bytes:
    """A bit a pixel; frames follow each other without filling up bytes (PS3.5 section 8.1.1), so eight at a time."""
    parts = []
    for start in range(0, len(frames), 8):
        bits = np.stack([planes[frame.k] == frame.segment for frame in frames[start : start + 8]])
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    return _even(b"".join(parts))


def _stacked(planes: Planes, frames: Sequence[Frame]) -> bytes:
    little_endian: npt.NDArray[Any] = planes.astype(planes.dtype.newbyteorder("<"), copy=False)
    return _even(b"".join(little_endian[frame.k].tobytes() for frame in frames))


def _even(pixels: bytes) -> bytes:
    return pixels + b"\0" * (len(pixels) % 2)
