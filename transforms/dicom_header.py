"""What the gate needs from one DICOM file's header, read without pixels and without trusting anything.

Values are parsed from their raw bytes: pydicom's own conversion warns about what real files hold (decimal
strings over 16 characters, empty numbers). No tag that identifies a patient is read.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.tag import Tag

from transforms.errors import DicomError

Triple = tuple[float, float, float]
Text = tuple[str, ...]
Numbers = tuple[float, ...]

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
"""Media Storage Directory: a DICOMDIR, whatever it is called (PS3.10)."""

PARSE_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    BytesLengthException,
    InvalidDicomError,
    struct.error,
    zlib.error,
)
"""What pydicom and its decoders raise on damaged input."""

NATIVE_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
"""Implicit and explicit VR little endian, explicit VR big endian: pixels are not compressed (PS3.5)."""

_PREAMBLE = 128
_DESCRIPTION_LENGTH = 64
# A file without a preamble begins with one of these groups' first elements, and those are short.
_LAST_FIRST_ELEMENT, _LAST_FIRST_LENGTH = 0x0070, 1024
_KINDS = {
    "AcquisitionNumber": "acquisition",
    "AcquisitionTime": "acquisition time",
    "DiffusionBValue": "b-value",
    "DiffusionGradientOrientation": "gradient direction",
    "EchoNumbers": "echo",
    "EchoTime": "echo time",
    "ImageType": "image type",
    "InstanceNumber": "instance number",
    "InversionTime": "inversion time",
    "StackID": "stack",
    "TemporalPositionIdentifier": "temporal position",
    "TriggerTime": "trigger time",
}
_TAGS = {
    keyword: Tag(keyword)
    for keyword in (
        *_KINDS,
        *("Modality", "SeriesDescription", "SeriesNumber", "SpecificCharacterSet"),
        *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
        *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices"),
        "SliceThickness",
        *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
        *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
        *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
        *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    )
}
_UID = re.compile(r"[0-9.]{1,64}")
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")
_ENCODINGS = {"ISO_IR 192": "utf-8", "ISO_IR 100": "latin-1"}


@dataclass(frozen=True, slots=True)
class Plane:
    """Where the pixels of one slice lie, LPS+ mm (PS3.3 C.7.6.2).

    `row_cosines_lps` points along a row, to the next column, whose distance is `column_spacing_mm`.
    """

    position_lps_mm: Triple
    row_cosines_lps: Triple
    column_cosines_lps: Triple
    row_spacing_mm: float
    column_spacing_mm: float


@dataclass(frozen=True, slots=True)
class Header:
    """One slice without its pixels: a DICOM file, or a frame of one. What is missing or malformed is None or empty.

    `frame` is None for a file of one slice, else the number of the frame (from 1, as DICOM counts them).
    """

    path: Path
    file_bytes: int
    transfer_syntax: str
    sop_class: str
    sop_uid: str
    study_uid: str
    series_uid: str
    frame_of_reference: str
    modality: str
    description: str
    series_number: int | None
    image_type: Text
    photometric: str
    frames: int
    samples: int
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    slope: float | None
    intercept: float | None
    has_lookup_table: bool
    padding: tuple[int, int] | None
    plane: Plane | None
    slice_spacing_tag_mm: float | None
    kinds: tuple[tuple[str, bytes], ...]
    thickness_mm: float | None = None
    frame: int | None = None


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom's remarks on sloppy files from the user; the gate judges what matters by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_dicom(path: Path) -> bool:
    """Whether the first bytes are those of a DICOM file, with or without its 128-byte preamble.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_PREAMBLE + 4)
    return head[_PREAMBLE:] == b"DICM" or _starts_with_element(head[:8])


def read_header(path: Path) -> Header | None:
    """The header of a DICOM object; None for a media directory (DICOMDIR).

    Raises:
        DicomError: the file cannot be parsed.
    """
    try:
        with quiet_pydicom():
            return _parse(path)
    except PARSE_FAULTS as fault:
        # The parser's own words may quote bytes of the file, so only their kind is passed on.
        raise DicomError(f"{path}: damaged DICOM header ({type(fault).__name__})") from None


def _parse(path: Path) -> Header | None:
    dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS.values()), force=True)
    meta = _Elements(dataset.file_meta)
    if meta.uid("MediaStorageSOPClassUID") == MEDIA_DIRECTORY:
        return None
    return _header(path, meta, _Elements(dataset))


class _Elements:
    """Typed access to a dataset's raw elements: what is absent or malformed is empty."""

    def __init__(self, dataset: pydicom.Dataset) -> None:
        self._dataset = dataset

    def __contains__(self, keyword: str) -> bool:
        return _TAGS[keyword] in self._dataset

    def raw(self, keyword: str) -> tuple[bytes, bool]:
        """The bytes of an element, and whether they are little endian."""
        tag = _TAGS.get(keyword) or Tag(keyword)
        if tag not in self._dataset:
            return b"", True
        element = self._dataset.get_item(tag)
        if isinstance(element, RawDataElement):
            return element.value or b"", element.is_little_endian
        parts = [element.value] if isinstance(element.value, str) else list(element.value or [])
        return "\\".join(str(part) for part in parts).encode(), True

    def texts(self, keyword: str) -> Text:
        """The values of a string element, ASCII."""
        text = _printable(self.raw(keyword)[0].decode("ascii", errors="replace"))
        return tuple(part.strip() for part in text.split("\\")) if text else ()

    def text(self, keyword: str) -> str:
        """The first value of a string element, or an empty string."""
        return next(iter(self.texts(keyword)), "")

    def uid(self, keyword: str) -> str:
        """A UI element; empty when it is malformed, since a damaged one may have swallowed what follows it."""
        text = self.text(keyword)
        return text if _UID.fullmatch(text) else ""

    def code(self, keyword: str) -> str:
        """The first value of a CS element, upper case; empty when it is malformed."""
        text = self.text(keyword).upper()
        return text if _CODE.fullmatch(text) else ""

    def numbers(self, keyword: str) -> Numbers:
        """The values of a DS or IS element, of any length; empty unless all are finite numbers."""
        try:
            values = tuple(float(part) for part in self.texts(keyword))
        except ValueError:
            return ()
        return values if all(map(math.isfinite, values)) else ()

    def number(self, keyword: str, absent: float | None = None) -> float | None:
        """A DS or IS element of one value; None when it is malformed."""
        if not self.text(keyword):
            return absent
        values = self.numbers(keyword)
        return values[0] if len(values) == 1 else None

    def integer(self, keyword: str, *, signed: bool = False) -> int:
        """A US or SS element; 0 when absent."""
        raw, little = self.raw(keyword)
        return int.from_bytes(raw[:2], "little" if little else "big", signed=signed)

    def description(self) -> str:
        """SeriesDescription, cut to one short line; character sets beyond Latin and UTF-8 are not decoded."""
        encoding = _ENCODINGS.get(self.text("SpecificCharacterSet"), "ascii")
        text = self.raw("SeriesDescription")[0].decode(encoding, errors="replace")
        return " ".join(_printable(text).split())[:_DESCRIPTION_LENGTH]


def _header(path: Path, meta: _Elements, elements: _Elements) -> Header:
    number = elements.number("SeriesNumber")
    return Header(
        path=path,
        file_bytes=path.stat().st_size,
        transfer_syntax=meta.uid("TransferSyntaxUID"),
        sop_class=elements.uid("SOPClassUID") or meta.uid("MediaStorageSOPClassUID"),
        sop_uid=elements.uid("SOPInstanceUID") or meta.uid("MediaStorageSOPInstanceUID"),
        study_uid=elements.uid("StudyInstanceUID"),
        series_uid=elements.uid("SeriesInstanceUID"),
        frame_of_reference=elements.uid("FrameOfReferenceUID"),
        modality=elements.code("Modality"),
        description=elements.description(),
        series_number=None if number is None else int(number),
        image_type=tuple(part.upper() for part in elements.texts("ImageType")),
        photometric=elements.code("PhotometricInterpretation"),
        frames=int(elements.number("NumberOfFrames") or 1),
        samples=elements.integer("SamplesPerPixel") or 1,
        rows=elements.integer("Rows"),
        columns=elements.integer("Columns"),
        bits_allocated=elements.integer("BitsAllocated"),
        bits_stored=elements.integer("BitsStored"),
        high_bit=elements.integer("HighBit"),
        signed=elements.integer("PixelRepresentation") == 1,
        slope=elements.number("RescaleSlope", absent=1.0),
        intercept=elements.number("RescaleIntercept", absent=0.0),
        has_lookup_table="ModalityLUTSequence" in elements,
        padding=_padding(elements),
        plane=_plane(elements),
        slice_spacing_tag_mm=elements.number("SpacingBetweenSlices"),
        kinds=tuple((word, elements.raw(keyword)[0]) for keyword, word in _KINDS.items()),
        thickness_mm=elements.number("SliceThickness"),
    )


def _plane(elements: _Elements) -> Plane | None:
    position = elements.numbers("ImagePositionPatient")
    orientation = elements.numbers("ImageOrientationPatient")
    spacing = elements.numbers("PixelSpacing")
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2) or min(spacing) <= 0:
        return None
    # PixelSpacing is the distance between rows, then between columns (PS3.3 10.7.1.3).
    return Plane(_triple(position), _triple(orientation[:3]), _triple(orientation[3:]), spacing[0], spacing[1])


def _padding(elements: _Elements) -> tuple[int, int] | None:
    """Lowest and highest stored value that stand for no measurement (PS3.3 C.7.5.1.1.2)."""
    if not elements.raw("PixelPaddingValue")[0]:
        return None
    signed = elements.integer("PixelRepresentation") == 1
    value = elements.integer("PixelPaddingValue", signed=signed)
    has_range = bool(elements.raw("PixelPaddingRangeLimit")[0])
    limit = elements.integer("PixelPaddingRangeLimit", signed=signed) if has_range else value
    return min(value, limit), max(value, limit)


def _starts_with_element(head: bytes) -> bool:
    """Whether bytes without a preamble begin with an element of group 2 or 8, in either byte order."""
    if len(head) < 8:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    group, element, length = struct.unpack("<HHI", head)
    little = group in (2, 8) and element <= _LAST_FIRST_ELEMENT and (explicit or length <= _LAST_FIRST_LENGTH)
    group, element = struct.unpack(">HH", head[:4])
    return little or (group in (2, 8) and element <= _LAST_FIRST_ELEMENT and explicit)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _triple(values: Numbers) -> Triple:
    return values[0], values[1], values[2]
