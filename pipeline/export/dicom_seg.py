"""DICOM Segmentation (PS3.3 section A.51), BINARY, on the planes of the source series.

Patient, study and frame of reference are the source's; series and instance are new. Segment c is class c of the
label schema, whether it occurs or not. Frames without a voxel of their segment are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import (
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from pipeline.errors import ExportError
from pipeline.export.quiet import quiet
from pipeline.segmentation import Algorithm, Segmentation
from transforms.dicom import DicomSeries
from transforms.dicom_header import Header
from transforms.labels import CodedConcept, Label

SERIES_NUMBER_OFFSET = 1000
"""Added to the source's series number, so that viewers list the segmentation behind the study's images."""

LO_CHARACTERS, SH_CHARACTERS = 64, 16
"""The longest values of two DICOM value representations (PS3.5 section 6.2)."""

_PATIENT_GROUP = 0x0010
_STUDY_KEYWORDS = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")
_REQUIRED_KEYWORDS = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", *_STUDY_KEYWORDS)
_IMAGE_CLASSES = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}


def write_seg(target: Path, segmentation: Segmentation, series: DicomSeries) -> None:
    """Write a BINARY segmentation of `series`, whose slices are the k-planes of the label map in order.

    Raises:
        ExportError: the source lacks what a segmentation must refer to, or a label does not fit DICOM's limits.
    """
    with quiet():
        headers = [_header(found) for found in series.slices]
        identity = _take_identity(headers[0])
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


def _header(found: Header) -> Dataset:
    """A slice's elements without its pixels; what refers to the slice is there even where the file leaves it out."""
    header = dcmread(found.path, stop_before_pixels=True, force=True)
    header.SOPClassUID = found.sop_class or _IMAGE_CLASSES.get(found.modality, SecondaryCaptureImageStorage)
    header.SOPInstanceUID = found.sop_uid
    return header


def _take_identity(header: Dataset) -> Dataset:
    """Patient and study, taken out of `header`, which keeps empty values in their place.

    So no library puts them into a message, and what is not quite valid is carried over as it stands.
    """
    identity = Dataset()
    for element in [x for x in header if x.tag.group == _PATIENT_GROUP or x.keyword in _STUDY_KEYWORDS]:
        identity.add(element)
        del header[element.tag]
    for keyword in _REQUIRED_KEYWORDS:
        setattr(header, keyword, None)
        if keyword not in identity:
            setattr(identity, keyword, None)
    return identity


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
    _check_length(label.name, LO_CHARACTERS, f"the name of label {label.id}")
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
    _check_length(concept.value, SH_CHARACTERS, "the code value")
    _check_length(concept.scheme, SH_CHARACTERS, "the coding scheme")
    _check_length(concept.meaning, LO_CHARACTERS, "the code meaning")
    return hd.sr.CodedConcept(concept.value, concept.scheme, concept.meaning)


def _check_length(text: str, limit: int, what: str) -> None:
    if len(text) > limit or "\\" in text:
        raise ExportError(f"{what}, '{text}', does not fit DICOM: at most {limit} characters, no backslash")


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
        **_description(segmentation.algorithm, headers[0]),
    )


def _description(algorithm: Algorithm, source: Dataset) -> dict[str, Any]:
    volseg = version("volseg")
    return {
        "series_instance_uid": generate_uid(prefix=None),
        "sop_instance_uid": generate_uid(prefix=None),
        "series_number": SERIES_NUMBER_OFFSET + min(max(source.get("SeriesNumber") or 0, 0), 1_000_000),
        "instance_number": 1,
        "series_description": f"Segmentation by {algorithm.name}"[:LO_CHARACTERS],
        "content_label": "SEGMENTATION",
        "content_description": "Made by software, for research",
        "manufacturer": "volseg",
        "manufacturer_model_name": "volseg",
        "device_serial_number": volseg,
        "software_versions": volseg,
        # Holds the patient's name and the labels', whatever their scripts.
        "specific_character_set": "ISO_IR 192",
    }
