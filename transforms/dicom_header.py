"""What the gate needs from one DICOM file's header, read without pixels and without trusting anything: one Header a
slice.

What identifies the patient is read only to be hashed with a salt; it never leaves this module.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sys
import zlib
from dataclasses import dataclass, replace
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from transforms.dicom_elements import PARSE_FAULTS, Elements, Text, quiet_pydicom, tag_of
from transforms.dicom_fragments import ByteFile, PixelData, find_pixels
from transforms.dicom_frames import HEADER_TAGS, Frame, Plane, read_frames
from transforms.dicom_magic import PREAMBLE, is_dicom
from transforms.dicom_scan import scan
from transforms.errors import DicomError

__all__ = [
    "NATIVE_SYNTAXES",
    "PARSE_FAULTS",
    "Header",
    "Plane",
    "is_dicom",
    "quiet_pydicom",
    "read_headers",
]

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
"""Media Storage Directory: a DICOMDIR, whatever it is called (PS3.10)."""

NATIVE_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
"""Implicit and explicit VR little endian, explicit VR big endian, deflated: pixels are not encapsulated (PS3.5)."""

MOST_INFLATED = 2**26
"""A deflated file's header must lie in so many bytes of what it unpacks to."""

# The meta information, with the transfer syntax in it, comes first.
_FIRST_BYTES = 1024
_MOST_META = 1 << 16
_KEY_LENGTH = 12
_TAGS = [
    tag_of(keyword)
    for keyword in (
        *HEADER_TAGS,
        *("Modality", "SeriesDescription", "SeriesNumber", "SpecificCharacterSet"),
        *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
        *("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate"),
        *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
        *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
        *("ModalityLUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit", "LossyImageCompression"),
    )
]

_META = ("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID")
_WANTED = {int(tag): tag for tag in (*_TAGS, *map(tag_of, _META))}


@dataclass(frozen=True, slots=True)
class Header:
    """One slice without its pixels: a DICOM file, or a frame of one. What is missing or malformed is None or empty.

    `frame` is None for a file of one slice, else the number of the frame (from 1, as DICOM counts them). A file of
    `frames` that could not be taken apart is one header too, and `frames_fault` says why. `patient_key` stands for
    the patient: 12 hexadecimal digits that mean nothing without the salt they were made with.
    """

    path: Path
    file_bytes: int
    transfer_syntax: str
    sop_class: str
    sop_uid: str
    study_uid: str
    series_uid: str
    frame_of_reference: str
    patient_key: str
    modality: str
    description: str
    series_number: int | None
    image_type: Text
    photometric: str
    has_colours: bool
    frames: int
    frames_fault: str
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
    has_private_scaling: bool
    is_lossy: bool
    padding: tuple[int, int] | None
    pixels: PixelData | None
    plane: Plane | None
    slice_spacing_tag_mm: float | None
    thickness_mm: float | None
    kinds: tuple[tuple[str, bytes], ...]
    frame: int | None = None


def read_headers(path: Path, *, salt: bytes) -> tuple[Header, ...]:
    """The slices of a DICOM object, one header each; none for a media directory (DICOMDIR).

    Args:
        path: the file.
        salt: random bytes that make `patient_key` the same for one patient in one listing, and useless elsewhere.

    Raises:
        DicomError: the file cannot be parsed.
    """
    try:
        with quiet_pydicom(), _BoundedFile(FileIO(path)) as file:
            return _parse(path, file, salt)
    except PARSE_FAULTS as fault:
        # The parser's own words may quote bytes of the file, so only their kind is passed on.
        raise DicomError(f"{path}: damaged DICOM header ({type(fault).__name__})") from None


def inflated(file: ByteFile, start: int, most: int) -> bytes:
    """The first `most` bytes of a deflated dataset (PS3.5 A.5), whose code begins at `start`.

    Raises:
        zlib.error: the file ends before that, or is damaged.
    """
    file.seek(start)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    unpacked = unpacker.decompress(file.read(), most)
    if not unpacker.eof and len(unpacked) < most:
        raise zlib.error("cut short")
    return unpacked


class _BoundedFile(BufferedReader):
    """A file that takes no memory for bytes which it does not have; a damaged length may promise 4 GiB."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        if size is not None and size > _FIRST_BYTES:
            size = min(size, max(os.fstat(self.fileno()).st_size - self.tell(), 0))
        return super().read(size)


@dataclass(frozen=True, slots=True)
class _Object:
    """A DICOM object up to its pixels."""

    meta: Elements
    dataset: Elements
    transfer_syntax: str
    pixels: PixelData | None


def _parse(path: Path, file: BinaryIO, salt: bytes) -> tuple[Header, ...]:
    start = file.read(_FIRST_BYTES)
    file.seek(0)
    parsed = _deflated(file) if DeflatedExplicitVRLittleEndian.encode() in start else _plain(file)
    if parsed.meta.uid("MediaStorageSOPClassUID") == MEDIA_DIRECTORY:
        return ()
    return _headers(path, os.fstat(file.fileno()).st_size, parsed, salt)


def _plain(file: BinaryIO) -> _Object:
    size = os.fstat(file.fileno()).st_size
    scanned = scan(file, size, _WANTED)
    if scanned is not None:
        meta = Elements(scanned.meta)
        file.seek(scanned.end)
        pixels = find_pixels(file, size, implicit=scanned.implicit, little=True)
        return _Object(meta, Elements(scanned.dataset), meta.uid("TransferSyntaxUID"), pixels)
    return _parsed(file, size)


def _parsed(file: BinaryIO, size: int) -> _Object:
    """What pydicom makes of a file."""
    file.seek(0)
    dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS), force=True)
    implicit, little = (bool(value) for value in dataset.original_encoding)
    meta = Elements.of(dataset.file_meta)
    # Files without a preamble name no transfer syntax; the parser has seen which one it is.
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    syntax = meta.uid("TransferSyntaxUID") or str(ImplicitVRLittleEndian if implicit else explicit)
    return _Object(meta, Elements.of(dataset), syntax, find_pixels(file, size, implicit=implicit, little=little))


def _deflated(file: BinaryIO) -> _Object:
    file.seek(PREAMBLE + 4)
    meta = read_dataset(BytesIO(file.read(_MOST_META)), False, True, stop_when=_is_beyond_meta)
    # Preamble and magic, then the group length (12 bytes), which counts the rest of the meta information.
    start = PREAMBLE + 4 + 12 + int(meta.FileMetaInformationGroupLength)
    unpacked = inflated(file, start, MOST_INFLATED)
    buffer = BytesIO(unpacked)
    dataset = read_dataset(buffer, False, True, stop_when=_is_pixel_data, specific_tags=list(_TAGS))
    # What lies beyond the unpacked beginning is judged when it is read.
    size = len(unpacked) if len(unpacked) < MOST_INFLATED else sys.maxsize
    pixels = find_pixels(buffer, size, implicit=False, little=True)
    placed = None if pixels is None else replace(pixels, deflated_from=start)
    return _Object(Elements.of(meta), Elements.of(dataset), str(DeflatedExplicitVRLittleEndian), placed)


def _is_beyond_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag.group != 2


def _is_pixel_data(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag in (0x7FE00008, 0x7FE00009, 0x7FE00010)


def _headers(path: Path, size: int, parsed: _Object, salt: bytes) -> tuple[Header, ...]:
    meta, elements = parsed.meta, parsed.dataset
    number = elements.number("SeriesNumber")
    promised = elements.number("NumberOfFrames", absent=1.0)
    count = 0 if promised is None else int(promised)
    frames, fault = read_frames(elements, count)
    first, *others = frames
    header = Header(
        path=path,
        file_bytes=size,
        transfer_syntax=parsed.transfer_syntax,
        sop_class=elements.uid("SOPClassUID") or meta.uid("MediaStorageSOPClassUID"),
        sop_uid=elements.uid("SOPInstanceUID") or meta.uid("MediaStorageSOPInstanceUID"),
        study_uid=elements.uid("StudyInstanceUID"),
        series_uid=elements.uid("SeriesInstanceUID"),
        frame_of_reference=elements.uid("FrameOfReferenceUID"),
        patient_key=_patient_key(elements, salt),
        modality=elements.code("Modality"),
        description=elements.description(),
        series_number=None if number is None else int(number),
        photometric=elements.code("PhotometricInterpretation"),
        frames=count,
        frames_fault=fault,
        samples=elements.integer("SamplesPerPixel") or 1,
        rows=elements.integer("Rows"),
        columns=elements.integer("Columns"),
        bits_allocated=elements.integer("BitsAllocated"),
        bits_stored=elements.integer("BitsStored"),
        high_bit=elements.integer("HighBit"),
        signed=elements.integer("PixelRepresentation") == 1,
        has_lookup_table="ModalityLUTSequence" in elements,
        has_private_scaling=first.has_private_scaling,
        is_lossy=elements.code("LossyImageCompression") == "01",
        padding=_padding(elements),
        pixels=parsed.pixels,
        frame=first.number,
        image_type=first.image_type,
        has_colours=first.has_colours,
        slope=first.slope,
        intercept=first.intercept,
        plane=first.plane,
        slice_spacing_tag_mm=first.slice_spacing_tag_mm,
        thickness_mm=first.thickness_mm,
        kinds=first.kinds,
    )
    return header, *(_of_frame(header, frame) for frame in others)


def _of_frame(header: Header, frame: Frame) -> Header:
    return replace(
        header,
        frame=frame.number,
        image_type=frame.image_type,
        has_colours=frame.has_colours,
        has_private_scaling=frame.has_private_scaling,
        slope=frame.slope,
        intercept=frame.intercept,
        plane=frame.plane,
        slice_spacing_tag_mm=frame.slice_spacing_tag_mm,
        thickness_mm=frame.thickness_mm,
        kinds=frame.kinds,
    )


def _patient_key(elements: Elements, salt: bytes) -> str:
    """The patient's identifier and who issued it, else name and birth date, hashed; empty when there is none."""
    identity = [elements.raw(keyword)[0].strip(b" \0") for keyword in ("PatientID", "IssuerOfPatientID")]
    if not identity[0]:
        identity = [elements.raw(keyword)[0].strip(b" \0") for keyword in ("PatientName", "PatientBirthDate")]
    if not any(identity):
        return ""
    return hmac.new(salt, b"\0".join(identity), hashlib.sha256).hexdigest()[:_KEY_LENGTH]


def _padding(elements: Elements) -> tuple[int, int] | None:
    """Lowest and highest stored value that stand for no measurement (PS3.3 C.7.5.1.1.2)."""
    if not elements.raw("PixelPaddingValue")[0]:
        return None
    signed = elements.integer("PixelRepresentation") == 1
    value = elements.integer("PixelPaddingValue", signed=signed)
    has_range = bool(elements.raw("PixelPaddingRangeLimit")[0])
    limit = elements.integer("PixelPaddingRangeLimit", signed=signed) if has_range else value
    return min(value, limit), max(value, limit)
