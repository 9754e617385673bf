"""The wanted elements of a well-formed DICOM file from one read of its beginning, without a pydicom dataset.

Indexing thousands of files is mostly parsing headers. A file that is anything but plain (deflated, big endian,
without preamble, a wanted sequence of undefined length, elements out of order) is left to pydicom: None, never a guess.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

FIRST_READ, SECOND_READ = 2**14, 2**19
"""Bytes in which the header of most files lies, and of nearly all."""

_PREAMBLE = 128
_UNDEFINED = 0xFFFFFFFF
_PIXEL_DATA = 0x7FE00010
_FLOAT_PIXELS = 0x7FE00008
_TRANSFER_SYNTAX = 0x00020010
_IMPLICIT = b"1.2.840.10008.1.2"
_EXPLICIT = b"1.2.840.10008.1.2.1"
# JPEG, JPEG-LS, JPEG 2000 and RLE: their datasets are explicit VR little endian (PS3.5 A.4).
_ENCAPSULATED = (b"1.2.840.10008.1.2.4.", b"1.2.840.10008.1.2.5")
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# Value representations in pairs of letters: with a length of four bytes, and of two (PS3.5 7.1.2).
_FOUR, _TWO = b"OBODOFOLOVOWSQSVUCUNURUTUV", b"AEASATCSDADSDTFLFDISLOLTPNSHSLSSSTTMUIULUS"
_LONG = frozenset(_FOUR[n : n + 2] for n in range(0, len(_FOUR), 2))
_SHORT = frozenset(_TWO[n : n + 2] for n in range(0, len(_TWO), 2))
_ELEMENT = struct.Struct("<HHI").unpack_from
_SHORT_LENGTH = struct.Struct("<H").unpack_from
_LONG_LENGTH = struct.Struct("<I").unpack_from

Wanted = Mapping[int, BaseTag]
Found = dict[BaseTag, RawDataElement]


@dataclass(frozen=True, slots=True)
class Scanned:
    """The wanted elements of the meta information and of the dataset, and whether the latter is implicit VR.

    `end` is where the pixel data begin, or the file ends.
    """

    meta: Found
    dataset: Found
    implicit: bool
    end: int


class _UnusualError(Exception):
    """Something that pydicom had better read."""


def scan(file: BinaryIO, size: int, wanted: Wanted) -> Scanned | None:
    """Scan a file of `size` bytes from its beginning; None when pydicom must read it.

    Args:
        file: where it is afterwards is not said.
        size: its bytes.
        wanted: tags by their numbers.
    """
    for most in (FIRST_READ, SECOND_READ):
        file.seek(0)
        try:
            return _scan(file.read(most), size, wanted)
        except _UnusualError:
            return None
        except (struct.error, IndexError):
            # The header goes on behind what was read.
            if size <= most:
                return None
    return None


def _scan(head: bytes, size: int, wanted: Wanted) -> Scanned:
    if head[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
        raise _UnusualError
    meta, place = _elements(head, _PREAMBLE + 4, len(head), wanted, implicit=False, below=0x00030000)
    named = next((element.value for tag, element in meta.items() if tag == _TRANSFER_SYNTAX), None) or b""
    syntax = named.rstrip(b" \0")
    implicit = syntax == _IMPLICIT
    if not implicit and syntax != _EXPLICIT and not syntax.startswith(_ENCAPSULATED):
        raise _UnusualError
    # Some writers name the one and write the other.
    if implicit and head[place + 4 : place + 6] in _LONG | _SHORT:
        raise _UnusualError
    dataset, end = _elements(head, place, size, wanted, implicit=implicit, below=_FLOAT_PIXELS)
    if end < size and _tag(head, end) != _PIXEL_DATA:
        raise _UnusualError
    return Scanned(meta, dataset, implicit, end)


def _elements(head: bytes, place: int, size: int, wanted: Wanted, *, implicit: bool, below: int) -> tuple[Found, int]:
    """The wanted elements from `place` on with tags below a bound, and where the first other one begins."""
    found: Found = {}
    before = 0
    while place < size:
        tag = _tag(head, place)
        if tag >= below:
            return found, place
        if tag <= before:
            raise _UnusualError
        before = tag
        vr, start, length = _form(head, place, implicit=implicit)
        known = wanted.get(tag)
        if length == _UNDEFINED:
            if known is not None or vr == "UN":
                raise _UnusualError
            place = _after_sequence(head, start, implicit=implicit)
            continue
        place = start + length
        if known is not None:
            if place > len(head):
                raise IndexError
            found[known] = RawDataElement(known, vr, length, head[start:place], start, implicit, True)
    if place > size:
        raise _UnusualError
    return found, place


def _tag(head: bytes, place: int) -> int:
    group, element, _ = _ELEMENT(head, place)
    return int(group << 16 | element)


def _form(head: bytes, place: int, *, implicit: bool) -> tuple[str | None, int, int]:
    """Value representation, where the value begins, and its length (PS3.5 7.1)."""
    if implicit:
        return None, place + 8, int(_LONG_LENGTH(head, place + 4)[0])
    vr = head[place + 4 : place + 6]
    if vr in _SHORT:
        return vr.decode(), place + 8, int(_SHORT_LENGTH(head, place + 6)[0])
    if vr in _LONG:
        return vr.decode(), place + 12, int(_LONG_LENGTH(head, place + 8)[0])
    if place + 6 > len(head):
        raise IndexError
    raise _UnusualError


def _after_sequence(head: bytes, place: int, *, implicit: bool) -> int:
    """Where a sequence of undefined length ends (PS3.5 7.5), however deep the sequences in it are."""
    # What is open: True for a sequence, whose items come next, False for an item, whose elements do.
    open_ = [True]
    while open_:
        group, element, length = _ELEMENT(head, place)
        tag = group << 16 | element
        if open_[-1]:
            place += 8
            if tag == _SEQUENCE_END:
                open_.pop()
            elif tag != _ITEM:
                raise _UnusualError
            elif length == _UNDEFINED:
                open_.append(False)
            else:
                place += length
        elif tag == _ITEM_END:
            place += 8
            open_.pop()
        else:
            vr, place, length = _form(head, place, implicit=implicit)
            if length != _UNDEFINED:
                place += length
            elif vr == "UN":
                raise _UnusualError
            else:
                open_.append(True)
    return place
