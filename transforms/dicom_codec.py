"""A process of its own that decodes compressed frames, since decoders crash and hang on damaged code.

Run as a script by `dicom_decoders`: it reads requests from standard input, and answers on standard output, until the
input ends. GDCM aborts its process on some damage, CharLS can take seconds over a few bytes, and a Rust decoder
panics; none of that reaches whoever asked, who sees an answer or the end of this process.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

REQUEST = struct.Struct(">64sIIBBBQ")
"""Transfer syntax, rows, columns, bits allocated to a value, bits of the code's values, sign, bytes of code."""

ANSWER = struct.Struct(">BQ")
"""1 for success, and the bytes that follow."""

_LEAST_CPU_S, _CPU_S_A_PIXEL = 1.0, 1e-5
_MOST_MEMORY = 2**34


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        syntax, rows, columns, *bits, size = REQUEST.unpack(head)
        code = requests.read(size)
        _limit_cpu(_LEAST_CPU_S + _CPU_S_A_PIXEL * rows * columns)
        try:
            values = bytes(_decode(code, syntax.rstrip(b"\0").decode(), (rows, columns, *bits)))
        except BaseException:  # a panic of Rust code is no Exception
            values = None
        _limit_cpu(0)
        answers.write(ANSWER.pack(values is not None, len(values or b"")) + (values or b""))
        answers.flush()


def _limit_cpu(seconds: float) -> None:
    """End this process after so much time on the processor; 0 for no limit. Windows has no such timer."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _decode(code: bytes, syntax: str, sample: tuple[int, ...]) -> Any:
    return _CODECS.get(syntax, _jpeg_2000)(code, syntax, sample)


def _rle(code: bytes, syntax: str, sample: tuple[int, ...]) -> Any:
    from rle.utils import decode_pixel_data

    options: dict[str, Any] = {"rows": sample[0], "columns": sample[1], "bits_allocated": sample[2]}
    return decode_pixel_data(code, version=2, samples_per_pixel=1, **options)


def _jpeg_ls(code: bytes, syntax: str, sample: tuple[int, ...]) -> Any:
    from jpeg_ls import decode_pixel_data

    return decode_pixel_data(code)[0]


def _jpeg_2000(code: bytes, syntax: str, sample: tuple[int, ...]) -> Any:
    from openjpeg.utils import decode_pixel_data

    return decode_pixel_data(code, version=2)


def _jpeg(code: bytes, syntax: str, sample: tuple[int, ...]) -> bytes:
    import gdcm

    rows, columns, bits_allocated, precision, signed = sample
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(code)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(1, bits_allocated, precision, precision - 1, signed))
    # Bytes that are no UTF-8 come back as lone surrogates (PEP 383).
    decoded: bytes = image.GetBuffer().encode("utf-8", "surrogateescape")
    return decoded


_CODECS: dict[str, Callable[[bytes, str, tuple[int, ...]], Any]] = {
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70)), _jpeg),
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{n}" for n in (80, 81)), _jpeg_ls),
    "1.2.840.10008.1.2.5": _rle,
}


def main() -> None:
    """Serve on standard input and output; whatever libraries print goes nowhere."""
    _limit_memory()
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
