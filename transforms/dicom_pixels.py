"""Frames of stored values -> voxels in the modality's unit, slice by slice, into memory that is there already.

No file is parsed again: its header said where the pixels lie (`dicom_fragments`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.dicom_checks import is_inverted, keeps_padding, syntax_name
from transforms.dicom_decoders import Sample, decode
from transforms.dicom_elements import PARSE_FAULTS
from transforms.dicom_fragments import frame_fragments, join
from transforms.dicom_header import NATIVE_SYNTAXES, Header, inflated
from transforms.errors import DicomError

Values = npt.NDArray[Any]
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_EXACT_BITS = 24
_MOST_THREADS = 4


def fill_slices(stack: npt.NDArray[np.float32], slices: Sequence[Header], *, background: float) -> None:
    """Write each slice's values into `stack` (K, rows, columns), in the modality's unit (PS3.3 C.11.1).

    Compressed slices are decoded by a few threads, native ones by one, since the disk and memory set their pace.
    Memory: one slice a thread beside `stack`, and for a deflated file all of it.

    Raises:
        DicomError: a slice's pixels are cut short or cannot be decoded, or the file is not the one that was indexed.
    """
    places: defaultdict[Path, list[int]] = defaultdict(list)
    for k, header in enumerate(slices):
        places[header.path].append(k)
    if all(header.transfer_syntax in NATIVE_SYNTAXES for header in slices):
        for ks in places.values():
            _fill(stack, slices, ks, background)
        return
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    shares = [ks[part::threads] for ks in places.values() for part in range(threads) if ks[part::threads]]
    with ThreadPoolExecutor(threads) as pool:
        done = [pool.submit(_fill, stack, slices, ks, background) for ks in shares]
        try:
            # The first fault in the order of the files is told, whichever comes first.
            for future in done:
                future.result()
        finally:
            for future in done:
                future.cancel()


def _fill(stack: npt.NDArray[np.float32], slices: Sequence[Header], ks: Sequence[int], background: float) -> None:
    """The slices `ks`, all of one file, which is opened once."""
    first = slices[ks[0]]
    try:
        with first.path.open("rb", buffering=0) as file:
            stored = _frames(file, first)
            for k in ks:
                measure(stored(slices[k].frame or 1), slices[k], out=stack[k], background=background)
    except DicomError as fault:
        raise DicomError(f"{first.path}: {_undecodable(first)}: {fault}; fetch the file again") from None
    except PARSE_FAULTS as fault:
        raise DicomError(
            f"{first.path}: {_undecodable(first)} ({type(fault).__name__}): cut short or damaged; fetch the file again"
        ) from None


def measure(stored: Values, header: Header, *, out: npt.NDArray[np.float32], background: float) -> None:
    """Stored values with all bits that are allocated -> `out`, in the modality's unit."""
    slope, intercept = header.slope or 1.0, header.intercept or 0.0
    values = _without_spare_bits(stored, header)
    if is_inverted(header):
        values = _mirrored(values, header)
    if slope == 1.0 and intercept.is_integer() and abs(intercept) + 2**header.bits_stored < 2**_EXACT_BITS:
        np.add(values, np.float32(intercept), out=out, dtype=np.float32, casting="unsafe")
    else:
        measured = values * np.float64(slope)
        measured += intercept
        out[...] = measured
    if header.padding is not None and not keeps_padding(header):
        low, high = header.padding
        out[stored == low if low == high else (stored >= low) & (stored <= high)] = background


def _frames(file: FileIO, header: Header) -> Callable[[int], Values]:
    """What reads the frame of a given number (from 1) of stored values (rows, columns) from an open file."""
    pixels = header.pixels
    if pixels is None or os.fstat(file.fileno()).st_size != header.file_bytes:
        raise DicomError("the file has changed since it was indexed")
    sample = Sample(header.rows, header.columns, header.bits_allocated, header.signed)
    if pixels.fragments is not None:
        fragments = frame_fragments(file, pixels, header.frames)
        return lambda number: decode(join(file, fragments[number - 1]), header.transfer_syntax, sample)
    dtype = sample.dtype.newbyteorder(">") if header.transfer_syntax == _BIG_ENDIAN else sample.dtype
    shape, size = (header.rows, header.columns), header.rows * header.columns
    frame_bytes = size * dtype.itemsize
    if pixels.deflated_from is not None:
        unpacked = inflated(file, pixels.deflated_from, pixels.offset + frame_bytes * header.frames)
        return lambda number: np.frombuffer(
            unpacked, dtype, size, offset=pixels.offset + frame_bytes * (number - 1)
        ).reshape(shape)
    return lambda number: _native(file, pixels.offset + frame_bytes * (number - 1), np.empty(shape, dtype))


def _native(file: FileIO, offset: int, values: Values) -> Values:
    file.seek(offset)
    wanted = values.data.cast("B")
    done = 0
    while done < len(wanted):
        count = file.readinto(wanted[done:])
        if not count:
            raise EOFError
        done += count
    return values


def _without_spare_bits(stored: Values, header: Header) -> Values:
    """Clear (or sign-extend) the bits above BitsStored, which may hold anything (PS3.5 8.1.1)."""
    spare = header.bits_allocated - header.bits_stored
    return (stored << spare) >> spare if spare else stored


def _mirrored(values: Values, header: Header) -> Values:
    """Stored values mirrored within their range: lowest for highest."""
    both_ends = -1 if header.signed else 2**header.bits_stored - 1
    return np.subtract(both_ends, values, dtype=np.int64)


def _undecodable(header: Header) -> str:
    return f"the pixels in {syntax_name(header.transfer_syntax)} cannot be decoded"
