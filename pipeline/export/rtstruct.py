"""DICOM RT Structure Set (PS3.3 section A.19.3): closed planar contours on the slices of the source series.

Contours run along the edges between pixels: they enclose all of each pixel of the label, to its border half a pixel
from its centre, and holes are joined to the contour around them by a bridge of no width (`pipeline.export.contours`).
They lie on each slice's own plane, so oblique stacks and tilted gantries need nothing else.

ROI c is class c of the label schema, whether it occurs or not; one that does not occur has no contours (Contour
Sequence is of type 3, PS3.3 section C.8.8.6), so that an empty result is a valid object too. The file is Implicit VR
Little Endian, whose values may be longer than 64 KiB, as those of long contours are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ImplicitVRLittleEndian, RTStructureSetStorage

from pipeline.errors import ExportError
from pipeline.export.contours import outlines
from pipeline.export.dicom_source import (
    LO_CHARACTERS,
    SH_CHARACTERS,
    check_length,
    description,
    frame_of_reference,
    sop_class,
    source_header,
    take_identity,
)
from pipeline.quiet import quiet
from pipeline.segmentation import Algorithm, Segmentation
from transforms.dicom import DicomSeries
from transforms.dicom_header import Header, Plane
from transforms.labels import CodedConcept, Label

Floats = npt.NDArray[np.float64]

SERIES_NUMBER_OFFSET = 2000
"""Added to the source's series number, so that viewers list the structures behind the study's images."""

CONVENTION = (
    "Contours run along the edges between pixels of the referenced images (level 0.5 of each mask). "
    "Holes are joined to the contour around them by a bridge of no width (keyhole)."
)
"""What StructureSetDescription says."""

PIXEL_PART = 1e-3
"""Coordinates are rounded to this part of a pixel's side or finer, and to 1e-4 mm or finer."""

DS_CHARACTERS = 16
"""The longest decimal string (PS3.5 section 6.2)."""

ANATOMICAL_STRUCTURE = ("91723000", "SCT")
"""The category whose ROIs are organs; any other type of ROI would be a clinical statement."""

# The retired Detached Study Management class, which RT objects name for a study (PS3.3 section C.8.8.5.4).
_STUDY_CLASS = UID("1.2.840.10008.3.1.2.3.1")
_KEYWORDS = {
    "series_instance_uid": "SeriesInstanceUID",
    "sop_instance_uid": "SOPInstanceUID",
    "series_number": "SeriesNumber",
    "instance_number": "InstanceNumber",
    "series_description": "SeriesDescription",
    "manufacturer": "Manufacturer",
    "manufacturer_model_name": "ManufacturerModelName",
    "device_serial_number": "DeviceSerialNumber",
    "software_versions": "SoftwareVersions",
}


def write_rtstruct(target: Path, segmentation: Segmentation, series: DicomSeries) -> None:
    """Write the outlines of all labels on the slices of `series`, which are the k-planes of the label map in order.

    Raises:
        ExportError: the source lacks what a structure set must refer to, or a label does not fit DICOM's limits.
    """
    with quiet():
        lead = source_header(series.slices[0])
        lead.FrameOfReferenceUID = frame_of_reference(series)
        dataset = _about(lead, segmentation, series)
        dataset.StructureSetROISequence = [_roi(n, x, lead, segmentation) for n, x in _numbered(segmentation)]
        dataset.RTROIObservationsSequence = [_observation(n, label) for n, label in _numbered(segmentation)]
        dataset.ROIContourSequence = _contours(segmentation, series)
        dataset.save_as(target, enforce_file_format=True)


def _numbered(segmentation: Segmentation) -> Sequence[tuple[int, Label]]:
    return list(enumerate(segmentation.schema.labels, start=1))


def _about(lead: Dataset, segmentation: Segmentation, series: DicomSeries) -> Dataset:
    """Everything but the ROIs."""
    now = datetime.now()
    dataset = take_identity(lead)
    # Holds the patient's name and the labels', whatever their scripts.
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = RTStructureSetStorage
    made = description(segmentation.algorithm, lead, what="Structures", number_offset=SERIES_NUMBER_OFFSET)
    for argument, value in made.items():
        setattr(dataset, _KEYWORDS[argument], value)
    dataset.InstanceCreationDate = dataset.StructureSetDate = f"{now:%Y%m%d}"
    dataset.InstanceCreationTime = dataset.StructureSetTime = f"{now:%H%M%S}"
    dataset.Modality, dataset.OperatorsName, dataset.ApprovalStatus = "RTSTRUCT", None, "UNAPPROVED"
    for keyword in ("StudyInstanceUID", "StudyDescription", "FrameOfReferenceUID", "PositionReferenceIndicator"):
        if keyword in lead:
            dataset.add(lead[keyword])
    dataset.setdefault("PositionReferenceIndicator", None)
    dataset.StructureSetLabel, dataset.StructureSetDescription = "SEGMENTATION", CONVENTION
    dataset.ReferencedFrameOfReferenceSequence = [_frame_of_reference(lead, series)]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def _frame_of_reference(lead: Dataset, series: DicomSeries) -> Dataset:
    """Study, series and slices that contours are drawn on (PS3.3 section C.8.8.5)."""
    listed = Dataset()
    listed.SeriesInstanceUID = lead.SeriesInstanceUID
    listed.ContourImageSequence = [_reference(found) for found in series.slices]
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, lead.StudyInstanceUID
    study.RTReferencedSeriesSequence = [listed]
    frame = Dataset()
    frame.FrameOfReferenceUID = lead.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _reference(found: Header) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class(found), found.sop_uid
    if found.frame is not None:
        item.ReferencedFrameNumber = found.frame
    return item


def _roi(number: int, label: Label, lead: Dataset, segmentation: Segmentation) -> Dataset:
    check_length(label.name, LO_CHARACTERS, f"the name of label {label.id}")
    item = Dataset()
    item.ROINumber, item.ROIName = number, label.name
    item.ReferencedFrameOfReferenceUID = lead.FrameOfReferenceUID
    item.ROIGenerationAlgorithm = "AUTOMATIC"
    item.ROIDerivationAlgorithmIdentificationSequence = [_algorithm(segmentation.algorithm)]
    return item


def _algorithm(algorithm: Algorithm) -> Dataset:
    """Algorithm Identification Macro (PS3.3 section 10.16)."""
    item = Dataset()
    item.AlgorithmFamilyCodeSequence = [
        _code(CodedConcept(value="123109", scheme="DCM", meaning="Artificial Intelligence"))
    ]
    item.AlgorithmName = algorithm.name[:LO_CHARACTERS]
    item.AlgorithmVersion = algorithm.version[:LO_CHARACTERS] or "unknown"
    return item


def _observation(number: int, label: Label) -> Dataset:
    item = Dataset()
    item.ObservationNumber = item.ReferencedROINumber = number
    is_organ = (label.category.value, label.category.scheme) == ANATOMICAL_STRUCTURE
    item.SegmentedPropertyCategoryCodeSequence = [_code(label.category)]
    item.RTROIIdentificationCodeSequence = [_code(label.code)]
    item.RTROIInterpretedType, item.ROIInterpreter = "ORGAN" if is_organ else None, None
    return item


def _code(concept: CodedConcept) -> Dataset:
    check_length(concept.value, SH_CHARACTERS, "the code value")
    check_length(concept.scheme, SH_CHARACTERS, "the coding scheme")
    check_length(concept.meaning, LO_CHARACTERS, "the code meaning")
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = concept.value, concept.scheme, concept.meaning
    return item


def _contours(segmentation: Segmentation, series: DicomSeries) -> list[Dataset]:
    """An item an ROI; its contours in the order of the slices."""
    by_label: dict[int, list[bytes]] = {label.id: [] for label in segmentation.schema.labels}
    for k, found in enumerate(series.slices):
        if found.plane is None:
            raise ExportError(f"slice {k + 1} of the source series has no position")
        for outline in outlines(segmentation.label_map[:, :, k]):
            contours = by_label[outline.label]
            contours.append(_contour(len(contours) + 1, outline.points_ij, found, found.plane))
    items = []
    for number, label in _numbered(segmentation):
        item = Dataset()
        item.ReferencedROINumber, item.ROIDisplayColor = number, list(label.colour)
        if by_label[label.id]:
            # Encoded here, as bytes to pydicom: its objects take minutes for a large structure set.
            item.add_new("ContourSequence", "OB", b"".join(by_label[label.id]))
        items.append(item)
    return items


def _contour(number: int, points_ij: Floats, found: Header, plane: Plane) -> bytes:
    """An encoded item of a ContourSequence."""
    step_mm = PIXEL_PART * min(plane.row_spacing_mm, plane.column_spacing_mm)
    reference = _uid("ReferencedSOPClassUID", sop_class(found)) + _uid("ReferencedSOPInstanceUID", found.sop_uid)
    if found.frame is not None:
        reference += _text("ReferencedFrameNumber", str(found.frame))
    return _item(
        _element("ContourImageSequence", _item(reference))
        + _text("ContourGeometricType", "CLOSED_PLANAR")
        + _text("NumberOfContourPoints", str(len(points_ij)))
        + _text("ContourNumber", str(number))
        + _text("ContourData", decimal_strings(_on_plane(points_ij, plane), step_mm=step_mm))
    )


def _on_plane(points_ij: Floats, plane: Plane) -> Floats:
    """(N, 2) pixel indices to (N, 3) LPS+ mm (PS3.3 equation C.7.6.2.1-1)."""
    along_row = np.asarray(plane.row_cosines_lps) * plane.column_spacing_mm
    down_column = np.asarray(plane.column_cosines_lps) * plane.row_spacing_mm
    return np.asarray(points_ij @ np.stack([along_row, down_column]) + plane.position_lps_mm)


def decimal_strings(values_mm: Floats, *, step_mm: float) -> str:
    """Decimal strings, separated as DICOM values are, rounded to `step_mm` or finer.

    Raises:
        ExportError: a number needs more than 16 characters.
    """
    decimals = max(4, math.ceil(-math.log10(step_mm)))
    # Adding zero turns -0 into 0.
    numbers = (np.round(values_mm.ravel(), decimals) + 0.0).tolist()
    texts = [f"{number:.{decimals}f}" for number in numbers]
    if max(map(len, texts)) > DS_CHARACTERS:
        raise ExportError(
            f"a coordinate, '{max(texts, key=len)}' mm, does not fit DICOM: at most {DS_CHARACTERS} characters; "
            "export another format, as nifti"
        )
    return "\\".join(texts)


# Implicit VR Little Endian (PS3.5 sections 7.1.3 and 7.5): tag, length, value of even length.


def _element(keyword: str, value: bytes) -> bytes:
    tag = Tag(keyword)
    return struct.pack("<HHI", tag.group, tag.element, len(value)) + value


def _text(keyword: str, text: str) -> bytes:
    return _element(keyword, text.encode("ascii") + b" " * (len(text) % 2))


def _uid(keyword: str, uid: str) -> bytes:
    return _element(keyword, uid.encode("ascii") + b"\0" * (len(uid) % 2))


def _item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
