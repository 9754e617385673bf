"""One frame of compressed code -> its stored values, by one fixed decoder a transfer syntax.

Decoders were chosen by comparing each with the uncompressed twin of its file, the quickest right one first; several
of one syntax never stand in for each other, so a file is decoded in the same way everywhere. What a codestream
says of its own size is compared with the header before a decoder sees it, and decoders run in processes of their own
(`dicom_codec`), because damaged code makes them crash and hang.
"""

from __future__ import annotations

import atexit
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.dicom_codec import ANSWER, REQUEST
from transforms.errors import DicomError

JPEG_BASELINE, JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS, JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_LS_NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
JPEG_2000_LOSSLESS, JPEG_2000 = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
HTJ2K_LOSSLESS, HTJ2K_RPCL, HTJ2K = (f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203))
RLE = "1.2.840.10008.1.2.5"

LOSSY_SYNTAXES = (JPEG_BASELINE, JPEG_EXTENDED, JPEG_LS_NEAR, JPEG_2000, HTJ2K)
"""Syntaxes whose values may differ from those that were measured."""

ENCAPSULATED_SYNTAXES = (
    *(JPEG_BASELINE, JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LOSSLESS_SV1, JPEG_LS, JPEG_LS_NEAR),
    *(JPEG_2000_LOSSLESS, JPEG_2000, HTJ2K_LOSSLESS, HTJ2K_RPCL, HTJ2K, RLE),
)
"""The compressed transfer syntaxes that can be read."""

_JPEG_LS_FAMILY = (JPEG_LS, JPEG_LS_NEAR)
_JPEG_2000_FAMILY = (JPEG_2000_LOSSLESS, JPEG_2000, HTJ2K_LOSSLESS, HTJ2K_RPCL, HTJ2K)
_START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
_START_OF_SCAN = 0xDA
_JP2_SIGNATURE, _JP2_CODE = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"


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
        DicomError: the code is damaged, or of another size than the header promises.
    """
    stream = _stream(code, syntax, sample)
    bits = (sample.bits_allocated, stream.precision, sample.signed)
    decoded = _ask(REQUEST.pack(syntax.encode(), sample.rows, sample.columns, *bits, len(code)) + code)
    container = sample.dtype
    if syntax in (*_JPEG_LS_FAMILY, *_JPEG_2000_FAMILY):
        # These give values in as much memory as they need; JPEG-LS knows no sign.
        container = np.dtype(f"<{'i' if stream.signed else 'u'}{_bytes(stream.precision)}")
    if decoded is None or len(decoded) != sample.rows * sample.columns * container.itemsize:
        raise DicomError("damaged code")
    values = np.frombuffer(decoded, container)
    if container.kind != sample.dtype.kind:
        # Some encoders wrote the bits of signed values as unsigned ones, or the other way round.
        values = _with_sign(values, stream.precision, signed=sample.signed)
    return values.astype(sample.dtype, copy=False).reshape(sample.rows, sample.columns)


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


def _stream(code: bytes, syntax: str, sample: Sample) -> Stream:
    if syntax == RLE:
        # Run lengths know nothing of themselves; their number of values is compared in the end.
        return Stream(sample.rows, sample.columns, 1, sample.bits_allocated, sample.signed)
    stream = jpeg_2000_stream(code) if syntax in _JPEG_2000_FAMILY else jpeg_stream(code)
    _compare(stream, sample)
    return stream


def _compare(stream: Stream, sample: Sample) -> None:
    found = (stream.rows, stream.columns, stream.components)
    if found != (sample.rows, sample.columns, 1) or not 0 < stream.precision <= sample.bits_allocated:
        raise DicomError(
            f"the codestream holds {stream.rows} rows of {stream.columns} pixels of {stream.components} values of "
            f"{stream.precision} bits; the header promises {sample.rows} rows of {sample.columns} pixels of one value "
            f"of at most {sample.bits_allocated} bits"
        )


def _bytes(precision: int) -> int:
    return 1 if precision <= 8 else 2 if precision <= 16 else 4


def _with_sign(values: npt.NDArray[Any], precision: int, *, signed: bool) -> npt.NDArray[Any]:
    """Read the lowest `precision` bits of each value as a number with or without a sign."""
    spare = values.dtype.itemsize * 8 - precision
    return (values.view(f"<{'i' if signed else 'u'}{values.dtype.itemsize}") << spare) >> spare


class _Codec:
    """One decoding process."""

    def __init__(self) -> None:
        # -P: what lies beside the script must not hide a library.
        command = [sys.executable, "-P", str(Path(__file__).with_name("dicom_codec.py"))]
        self.owner = os.getpid()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def decode(self, request: bytes) -> bytes | None:
        """The decoded bytes; None when the code is damaged. A process that has ended cannot be used again."""
        source, sink = self._process.stdout, self._process.stdin
        if source is None or sink is None:
            return None
        sink.write(request)
        sink.flush()
        head = source.read(ANSWER.size)
        if len(head) < ANSWER.size:
            raise BrokenPipeError
        is_right, size = ANSWER.unpack(head)
        return source.read(size) if is_right else None

    def close(self) -> None:
        """End the process."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.communicate()


_idle: list[_Codec] = []
_idle_lock = Lock()


@atexit.register
def _close_idle() -> None:
    with _idle_lock:
        for codec in _idle:
            codec.close()
        _idle.clear()


def _ask(request: bytes) -> bytes | None:
    """The answer of an idle process, or of a new one: as many as threads that ask at once. None is none."""
    with _idle_lock:
        # A forked process must not talk to its parent's.
        own = [codec for codec in _idle if codec.owner == os.getpid()]
        codec = own[-1] if own else None
        if codec is not None:
            _idle.remove(codec)
    codec = codec or _Codec()
    try:
        answer = codec.decode(request)
    except OSError:
        # It has crashed, or was too slow.
        codec.close()
        return None
    except BaseException:
        # It is in the middle of an answer that nobody waits for.
        codec.close()
        raise
    with _idle_lock:
        _idle.append(codec)
    return answer
