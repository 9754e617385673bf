"""What every DICOM object that volseg makes takes from its source series: identity, study, equipment, numbers.

The objects are highdicom's or pydicom's own; patient and study are taken out before a library sees them and put
back afterwards, so that no library puts them into a message and what is not quite valid is carried over as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from pydicom import Dataset, dcmread
from pydicom.config import RAISE
from pydicom.datadict import keyword_for_tag
from pydicom.tag import BaseTag
from pydicom.uid import (
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds, validate_value

from pipeline.errors import ExportError
from pipeline.segmentation import Algorithm
from transforms.dicom import DicomSeries
from transforms.dicom_header import Header

LO_CHARACTERS, SH_CHARACTERS = 64, 16
"""The longest values of two DICOM value representations (PS3.5 section 6.2)."""

_PATIENT_GROUP = 0x0010
_STUDY_KEYWORDS = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")
_REQUIRED_KEYWORDS = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", *_STUDY_KEYWORDS)
_REMOVED = "PatientIdentityRemoved"
_METHODS = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")
_SOURCE_FOR_PROCESSING = ("121322", "Source image for image processing operation")
"""PS3.16 CID 7202."""
_FRAME_GROUPS = (
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DimensionIndexSequence",
    "DimensionOrganizationSequence",
    "DimensionOrganizationType",
    "NumberOfFrames",
)
_IMAGE_CLASSES = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}


def check_series(series: DicomSeries) -> None:
    """Refuse a source that a DICOM object cannot refer to.

    Raises:
        ExportError: a slice has no place or no identifier, or shares it with another file.
    """
    files = {(found.sop_uid, found.path) for found in series.slices}
    is_shared = len({uid for uid, _ in files}) < len(files)
    for found in series.slices:
        missing = [
            *(["position"] if found.plane is None else []),
            *([] if found.sop_uid else ["SOPInstanceUID"]),
            *(["SOPInstanceUID of its own"] if is_shared else []),
            *([] if found.series_uid else ["SeriesInstanceUID"]),
            *([] if found.study_uid else ["StudyInstanceUID"]),
        ]
        if missing:
            raise ExportError(
                f"{found.path} has no {missing[0]} for a DICOM object to refer to; export another format, as nifti"
            )


def source_header(found: Header) -> Dataset:
    """A slice's elements without its pixels; what refers to the slice is there even where the file leaves it out.

    A frame of a multi-frame file is described as if it were a file of its own: the functional groups are left out.
    """
    assert found.plane is not None  # see `check_series`
    header = dcmread(found.path, stop_before_pixels=True, force=True)
    header.SOPClassUID, header.SOPInstanceUID = sop_class(found), found.sop_uid
    if found.frame is not None:
        for keyword in _FRAME_GROUPS:
            header.pop(keyword, None)
    plane = found.plane
    header.ImagePositionPatient = decimal_strings(plane.position_lps_mm)
    header.ImageOrientationPatient = decimal_strings((*plane.row_cosines_lps, *plane.column_cosines_lps))
    header.PixelSpacing = decimal_strings((plane.row_spacing_mm, plane.column_spacing_mm))
    return header


def sop_class(found: Header) -> str:
    """The SOP class of a slice's file; where the file names none, the modality's."""
    return found.sop_class or str(_IMAGE_CLASSES.get(found.modality, SecondaryCaptureImageStorage))


def decimal_strings(numbers: Iterable[float]) -> list[str]:
    """DS values of at most 16 characters, as precise as that allows (PS3.5 section 6.2)."""
    return [format_number_as_ds(float(number)) for number in numbers]


def frame_of_reference(series: DicomSeries) -> str:
    """The source's FrameOfReferenceUID; one made from its SeriesInstanceUID where it has none.

    Objects that give positions need one (PS3.3 section C.7.4.1). A new one claims nothing about other series: it says
    that the positions count from where the source's own do. All objects made from one series share it, and viewers
    find the source by the references to its slices.
    """
    # A UID made from a UUID (PS3.5 section B.2), and that from the series.
    return series.slices[0].frame_of_reference or f"2.25.{uuid5(NAMESPACE_OID, series.series_uid).int}"


def planes_of_slices(series: DicomSeries) -> list[int]:
    """For each source slice the plane of the label map that lies nearest to it: with even gaps, its own."""
    if series.slice_positions_k is None:
        return list(range(len(series.slices)))
    # Half-way between two planes, the first of them.
    return [math.ceil(position - 0.5) for position in series.slice_positions_k]


def referenced_instances(series: DicomSeries) -> list[Dataset]:
    """An item of a ReferencedInstanceSequence for each of the source's files, in slice order."""
    classes = {found.sop_uid: sop_class(found) for found in series.slices}
    return [_reference(class_uid, uid) for uid, class_uid in classes.items()]


def source_image(found: Header) -> Dataset:
    """An item of a SourceImageSequence (PS3.3 section C.7.6.16.2.6): the file, and the frame of a multi-frame one."""
    item = _reference(sop_class(found), found.sop_uid)
    if found.frame is not None:
        item.ReferencedFrameNumber = found.frame
    item.SpatialLocationsPreserved = "YES"
    purpose = Dataset()
    purpose.CodeValue, purpose.CodeMeaning = _SOURCE_FOR_PROCESSING
    purpose.CodingSchemeDesignator = "DCM"
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def _reference(class_uid: str, instance_uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = class_uid, instance_uid
    return item


def take_identity(header: Dataset) -> Dataset:
    """Patient and study, taken out of `header`, which keeps empty values in their place.

    What says who it is stays as it is; other facts, as an age, are left out where DICOM does not allow their values.
    Where the identity was removed, DICOM wants to know how (PS3.3 section C.7.1.1).
    """
    identity = Dataset()
    for tag in sorted(header.keys()):
        if tag.group != _PATIENT_GROUP and keyword_for_tag(tag) not in (*_STUDY_KEYWORDS, _REMOVED, *_METHODS):
            continue
        if keyword_for_tag(tag) in _REQUIRED_KEYWORDS or _is_valid(header, tag):
            identity.add(header[tag])
        del header[tag]
    for keyword in _REQUIRED_KEYWORDS:
        setattr(header, keyword, None)
        if keyword not in identity:
            setattr(identity, keyword, None)
    if identity.get(_REMOVED) == "YES" and not any(x in identity for x in _METHODS):
        identity.DeidentificationMethod = "not stated by the source"
    return identity


def _is_valid(header: Dataset, tag: BaseTag) -> bool:
    try:
        element = header[tag]
        if element.is_empty:
            return False
        for value in element.value if element.VM > 1 else [element.value]:
            if element.VR != "SQ":
                validate_value(element.VR, getattr(value, "original_string", value), RAISE)
    except (NotImplementedError, TypeError, ValueError):
        return False
    return True


def description(algorithm: Algorithm, source: Dataset, *, what: str, number_offset: int) -> dict[str, Any]:
    """The arguments of highdicom's objects that say who made this one, as what, and in which new series.

    `number_offset` is added to the source's series number, so that viewers list results behind the study's images.
    """
    volseg = version("volseg")
    return {
        "series_instance_uid": generate_uid(prefix=None),
        "sop_instance_uid": generate_uid(prefix=None),
        "series_number": number_offset + min(max(source.get("SeriesNumber") or 0, 0), 1_000_000),
        "instance_number": 1,
        "series_description": f"{what} by {algorithm.name}"[:LO_CHARACTERS],
        "manufacturer": "volseg",
        "manufacturer_model_name": "volseg",
        "device_serial_number": volseg,
        "software_versions": volseg,
    }


def check_length(text: str, limit: int, what: str) -> None:
    """Refuse a text that a DICOM value cannot hold.

    Raises:
        ExportError: it is too long or has a backslash, which separates values.
    """
    if len(text) > limit or "\\" in text:
        raise ExportError(f"{what}, '{text}', does not fit DICOM: at most {limit} characters, no backslash")
