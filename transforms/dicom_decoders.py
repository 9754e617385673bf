"""One frame of compressed code -> its stored values, by one fixed decoder a transfer syntax.

Decoders were chosen by comparing each with the uncompressed twin of its file, the quickest right one first; several
of one syntax never stand in for each other, so a file is decoded in the same way everywhere. What a codestream
says of its own size is compared with the header before a decoder sees it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.errors import DicomError

JPEG_BASELINE, JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS, JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_LS_NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
JPEG_2000_LOSSLESS, JPEG_2000 = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
HTJ2K_LOSSLESS, HTJ2K_RPCL, HTJ2K = (f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203))
RLE = "1.2.840.10008.1.2.5"

LOSSY_SYNTAXES = (JPEG_BASELINE, JPEG_EXTENDED, JPEG_LS_NEAR, JPEG_2000, HTJ2K)
"""Syntaxes whose values may differ from those that were measured."""

_START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
_START_OF_SCAN, _SIZE = 0xDA, 0xFF51
# A header of one component: SOC, SIZ, its length, and 38 bytes of sizes (T.800 A.5.1).
_JP2_SIGNATURE, _JP2_CODE = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"
_STDERR = Lock()


@dataclass(frozen=True, slots=True)
class Sample:
    """What a header promises of one frame: its size, the bits of a value's memory, and whether values are signed."""

    rows: int
    columns: int
    bits_allocated: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its values in memory, little endian."""
        return np.dtype(f"<{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


@dataclass(frozen=True, slots=True)
class Stream:
    """What a codestream says of itself; `signed` is None where its format does not know."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool | None = None


def decode(code: bytes, syntax: str, sample: Sample) -> npt.NDArray[Any]:
    """Stored values (rows, columns) of one frame, in the memory that the header allocates to each.

    Raises:
        DicomError: the codestream is of another size than the header promises.
        Exception: the code is damaged; decoders raise what they like.
    """
    if syntax == RLE:
        return _shaped(_rle(code, sample), sample)
    stream = jpeg_2000_stream(code) if syntax in _JPEG_2000_FAMILY else jpeg_stream(code)
    _compare(stream, sample)
    values = DECODERS[syntax](code, syntax, sample, stream)
    return _shaped(values, sample)


def jpeg_stream(code: bytes) -> Stream:
    """The frame header of a JPEG or JPEG-LS stream (T.81 B.2.2, T.87 C.2.2).

    Raises:
        DicomError: there is none.
    """
    place = 2
    while code[:2] == b"\xff\xd8" and place + 10 <= len(code) and code[place] == 0xFF:
        marker = code[place + 1]
        if marker in _START_OF_FRAME:
            precision, rows, columns, components = struct.unpack(">BHHB", code[place + 4 : place + 10])
            return Stream(rows, columns, components, precision)
        if marker == _START_OF_SCAN:
            break
        # Fill bytes may stand before a marker, and some markers have no length.
        skipped = 1 if marker == 0xFF else 2
        has_length = marker != 0xFF and marker not in _NO_LENGTH
        place += skipped + (int.from_bytes(code[place + 2 : place + 4], "big") if has_length else 0)
    raise DicomError("no JPEG frame header")


def jpeg_2000_stream(code: bytes) -> Stream:
    """The image and tile sizes of a JPEG 2000 codestream (T.800 A.5.1), within a JP2 file or bare.

    Raises:
        DicomError: there are none.
    """
    start = code.find(_JP2_CODE) if code.startswith(_JP2_SIGNATURE) else 0
    head = code[start : start + 43]
    if start < 0 or len(head) < 43 or not head.startswith(_JP2_CODE):
        raise DicomError("no JPEG 2000 image size")
    right, bottom, left, top = struct.unpack(">4I", head[8:24])
    (components,) = struct.unpack(">H", head[40:42])
    depth = head[42]
    return Stream(bottom - top, right - left, components, (depth & 0x7F) + 1, bool(depth & 0x80))


def _compare(stream: Stream, sample: Sample) -> None:
    found = (stream.rows, stream.columns, stream.components)
    if found != (sample.rows, sample.columns, 1) or not 0 < stream.precision <= sample.bits_allocated:
        raise DicomError(
            f"the codestream holds {stream.rows} rows of {stream.columns} pixels of {stream.components} values of "
            f"{stream.precision} bits; the header promises {sample.rows} rows of {sample.columns} pixels of one value "
            f"of at most {sample.bits_allocated} bits"
        )


def _shaped(values: npt.NDArray[Any], sample: Sample) -> npt.NDArray[Any]:
    if values.size != sample.rows * sample.columns:
        raise DicomError(f"{values.size} values decoded where the header promises {sample.rows} x {sample.columns}")
    return values.astype(sample.dtype, copy=False).reshape(sample.rows, sample.columns)


def _rle(code: bytes, sample: Sample) -> npt.NDArray[Any]:
    from rle.utils import decode_pixel_data

    options: dict[str, Any] = {"rows": sample.rows, "columns": sample.columns, "bits_allocated": sample.bits_allocated}
    return np.frombuffer(decode_pixel_data(code, version=2, samples_per_pixel=1, **options), sample.dtype)


def _jpeg_ls(code: bytes, syntax: str, sample: Sample, stream: Stream) -> npt.NDArray[Any]:
    from jpeg_ls import decode_pixel_data

    decoded, _ = decode_pixel_data(code)
    # JPEG-LS knows no sign: the bits of negative values come back as those of large ones.
    return _as_signed(np.frombuffer(decoded, f"<u{1 if stream.precision <= 8 else 2}"), stream, sample.signed)


def _jpeg_2000(code: bytes, syntax: str, sample: Sample, stream: Stream) -> npt.NDArray[Any]:
    from openjpeg.utils import decode_pixel_data

    container = 1 if stream.precision <= 8 else 2 if stream.precision <= 16 else 4
    decoded = decode_pixel_data(code, version=2)
    values = np.frombuffer(decoded, f"<{'i' if stream.signed else 'u'}{container}")
    # Some encoders wrote the bits of signed values as unsigned ones, and the other way round.
    return values if stream.signed == sample.signed else _as_signed(values, stream, sample.signed)


def _as_signed(values: npt.NDArray[Any], stream: Stream, signed: bool) -> npt.NDArray[Any]:
    """Read the lowest `precision` bits of each value as a number with or without a sign."""
    spare = values.dtype.itemsize * 8 - stream.precision
    return (values.view(f"<{'i' if signed else 'u'}{values.dtype.itemsize}") << spare) >> spare


def _jpeg(code: bytes, syntax: str, sample: Sample, stream: Stream) -> npt.NDArray[Any]:
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(code)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((sample.columns, sample.rows, 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    bits = stream.precision
    image.SetPixelFormat(gdcm.PixelFormat(1, sample.bits_allocated, bits, bits - 1, int(sample.signed)))
    with _quiet_gdcm(gdcm):
        # Bytes that are no UTF-8 come back as lone surrogates (PEP 383).
        decoded = image.GetBuffer()
    if decoded is None:
        raise DicomError("damaged code")
    return np.frombuffer(decoded.encode("utf-8", "surrogateescape"), sample.dtype)


@contextmanager
def _quiet_gdcm(gdcm: Any) -> Iterator[None]:
    """Keep GDCM from printing: it tries 8-bit code before 12-bit, and complains of that on standard error itself."""
    for channel in (gdcm.Trace.DebugOff, gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff):
        channel()
    with _STDERR:
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(nowhere)


Decoder = Callable[[bytes, str, Sample, Stream], npt.NDArray[Any]]
_JPEG_2000_FAMILY = (JPEG_2000_LOSSLESS, JPEG_2000, HTJ2K_LOSSLESS, HTJ2K_RPCL, HTJ2K)
DECODERS: dict[str, Decoder] = {
    **dict.fromkeys((JPEG_BASELINE, JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LOSSLESS_SV1), _jpeg),
    **dict.fromkeys((JPEG_LS, JPEG_LS_NEAR), _jpeg_ls),
    **dict.fromkeys(_JPEG_2000_FAMILY, _jpeg_2000),
}

ENCAPSULATED_SYNTAXES = (*DECODERS, RLE)
"""The compressed transfer syntaxes that can be read."""
