"""What every DICOM object that volseg makes takes from its source series: identity, study, equipment, numbers.

The objects are highdicom's or pydicom's own; patient and study are taken out before a library sees them and put
back afterwards, so that no library puts them into a message and what is not quite valid is carried over as it is.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.uid import (
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from pipeline.errors import ExportError
from pipeline.segmentation import Algorithm
from transforms.dicom_header import Header

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


def source_header(found: Header) -> Dataset:
    """A slice's elements without its pixels; what refers to the slice is there even where the file leaves it out."""
    header = dcmread(found.path, stop_before_pixels=True, force=True)
    header.SOPClassUID = found.sop_class or _IMAGE_CLASSES.get(found.modality, SecondaryCaptureImageStorage)
    header.SOPInstanceUID = found.sop_uid
    return header


def take_identity(header: Dataset) -> Dataset:
    """Patient and study, taken out of `header`, which keeps empty values in their place."""
    identity = Dataset()
    for element in [x for x in header if x.tag.group == _PATIENT_GROUP or x.keyword in _STUDY_KEYWORDS]:
        identity.add(element)
        del header[element.tag]
    for keyword in _REQUIRED_KEYWORDS:
        setattr(header, keyword, None)
        if keyword not in identity:
            setattr(identity, keyword, None)
    return identity


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
