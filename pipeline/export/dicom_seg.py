"""DICOM Segmentation (PS3.3 section A.51), BINARY, on the planes of the source series.

Patient, study and frame of reference are the source's; series and instance are new. Segment c is class c of the
label schema, whether it occurs or not. Frames without a voxel of their segment are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from pydicom.valuerep import format_number_as_ds

from pipeline.errors import ExportError
from pipeline.export.dicom_source import (
    LO_CHARACTERS,
    SH_CHARACTERS,
    check_length,
    description,
    source_header,
    take_identity,
)
from pipeline.export.quiet import quiet
from pipeline.segmentation import Algorithm, Segmentation
from transforms.dicom import DicomSeries
from transforms.labels import CodedConcept, Label

SERIES_NUMBER_OFFSET = 1000
"""Added to the source's series number, so that viewers list the segmentation behind the study's images."""


def write_seg(target: Path, segmentation: Segmentation, series: DicomSeries) -> None:
    """Write a BINARY segmentation of `series`, whose slices are the k-planes of the label map in order.

    Raises:
        ExportError: the source lacks what a segmentation must refer to, or a label does not fit DICOM's limits.
    """
    with quiet():
        headers = [source_header(found) for found in series.slices]
        identity = take_identity(headers[0])
        _align(headers, segmentation)
        segments = [_segment(n, x, segmentation) for n, x in enumerate(segmentation.schema.labels, start=1)]
        try:
            dataset = _build(segmentation, segments, headers)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(
                f"the source series cannot be described in a DICOM SEG ({error}); export another format, as nifti"
            ) from error
        for element in identity:
            dataset.add(element)
        dataset.save_as(target, enforce_file_format=True)


def _align(headers: Sequence[Dataset], segmentation: Segmentation) -> None:
    """Give all slices what they share, in the words that highdicom copies from.

    The gap between slices comes from their positions: SliceThickness and SpacingBetweenSlices are often wrong.
    """
    lead = headers[0]
    if not lead.get("FrameOfReferenceUID"):
        raise ExportError(
            "the source series has no FrameOfReferenceUID for a DICOM SEG to share; export another format, as nifti"
        )
    gap_mm = format_number_as_ds(_slice_gap_mm(segmentation))
    for header in headers:
        header.ImageOrientationPatient = lead.ImageOrientationPatient
        header.SliceThickness = header.SpacingBetweenSlices = gap_mm


def _slice_gap_mm(segmentation: Segmentation) -> float:
    """Distance between neighbouring planes, along their normal (PS3.3 section C.7.6.16.2.1)."""
    i_mm, j_mm, _ = segmentation.geometry.affine_ras[:3, :3].T
    return segmentation.geometry.voxel_volume_mm3 / float(np.linalg.norm(np.cross(i_mm, j_mm)))


def _segment(number: int, label: Label, segmentation: Segmentation) -> hd.seg.SegmentDescription:
    check_length(label.name, LO_CHARACTERS, f"the name of label {label.id}")
    return hd.seg.SegmentDescription(
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


def _build(
    segmentation: Segmentation, segments: Sequence[hd.seg.SegmentDescription], headers: Sequence[Dataset]
) -> Dataset:
    # Slices that are contiguous are encoded many times faster.
    planes = np.ascontiguousarray(segmentation.schema.classes_from_ids(segmentation.label_map).transpose(2, 1, 0))
    # A multi-frame object has at least one frame, so an empty result is the first plane, a frame a segment.
    is_empty = not planes.any()
    count = 1 if is_empty else len(headers)
    return hd.seg.Segmentation(
        source_images=headers[:count],
        further_source_images=headers[count:],
        pixel_array=planes[:count],
        segment_descriptions=segments,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        omit_empty_frames=not is_empty,
        content_label="SEGMENTATION",
        content_description="Made by software, for research",
        # Holds the patient's name and the labels', whatever their scripts.
        specific_character_set="ISO_IR 192",
        **description(segmentation.algorithm, headers[0], what="Segmentation", number_offset=SERIES_NUMBER_OFFSET),
    )
