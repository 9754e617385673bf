"""Typed access to a dataset's elements from their raw bytes: what is absent or malformed is empty, nothing warns.

pydicom's own conversion warns about what real files hold (decimal strings over 16 characters, empty numbers).
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from io import BytesIO

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import data_element_generator
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from transforms.quiet_warnings import quiet_warnings

Triple = tuple[float, float, float]
Text = tuple[str, ...]
Numbers = tuple[float, ...]

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

Element = RawDataElement | DataElement

_ITEM, _UNDEFINED = (0xFFFE, 0xE000), 0xFFFFFFFF
_DESCRIPTION_LENGTH = 64
_UID = re.compile(r"[0-9.]{1,64}")
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")
_ENCODINGS = {"ISO_IR 192": "utf-8", "ISO_IR 100": "latin-1"}
_BINARY = {"FD": "d", "FL": "f", "US": "H", "SS": "h", "UL": "I", "SL": "i"}

quiet_pydicom = quiet_warnings
"""Keep pydicom's remarks on sloppy files from the user; the gate judges what matters by itself."""


@cache
def tag_of(keyword: str) -> BaseTag:
    """The tag of a keyword, or of eight hexadecimal digits."""
    return Tag(keyword)


class Elements:
    """The elements of a dataset, or of an item of a sequence in it."""

    def __init__(self, elements: Mapping[BaseTag, Element]) -> None:
        self._elements = elements
        self._items: dict[str, tuple[Elements, ...]] = {}

    @classmethod
    def of(cls, dataset: pydicom.Dataset) -> Elements:
        """The elements of a dataset as it was read."""
        return cls(dict(dataset.items()))

    def __contains__(self, keyword: str) -> bool:
        return tag_of(keyword) in self._elements

    def raw(self, keyword: str) -> tuple[bytes, bool]:
        """The bytes of an element, and whether they are little endian."""
        element = self._elements.get(tag_of(keyword))
        if isinstance(element, RawDataElement):
            return element.value or b"", element.is_little_endian
        if element is None or isinstance(element.value, Sequence):
            return b"", True
        parts = [element.value] if isinstance(element.value, str) else list(element.value or [])
        return "\\".join(str(part) for part in parts).encode(), True

    def items(self, keyword: str) -> tuple[Elements, ...]:
        """The items of a sequence, parsed once; none when it is absent or no sequence."""
        known = self._items.get(keyword)
        if known is None:
            known = self._items[keyword] = tuple(_items_of(self._elements.get(tag_of(keyword))))
        return known

    def within(self, sequence: str) -> Elements | None:
        """The first item of a sequence."""
        return next(iter(self.items(sequence)), None)

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

    def binary(self, keyword: str) -> Numbers:
        """The values of an FD, FL, US, SS, UL or SL element; empty when malformed."""
        raw, little = self.raw(keyword)
        letter = _BINARY.get(dictionary_VR(tag_of(keyword)), "")
        if not raw or not letter or len(raw) % struct.calcsize(letter):
            return ()
        return struct.unpack(f"{'<' if little else '>'}{len(raw) // struct.calcsize(letter)}{letter}", raw)

    def shown(self, keyword: str) -> bytes:
        """An element's values as ASCII text, numbers in their shortest form, so that equal values are equal bytes."""
        if values := self.binary(keyword):
            return "\\".join(f"{value:g}" for value in values).encode()
        return self.raw(keyword)[0].strip(b" \0")

    def description(self) -> str:
        """SeriesDescription, cut to one short line; character sets beyond Latin and UTF-8 are not decoded."""
        encoding = _ENCODINGS.get(self.text("SpecificCharacterSet"), "ascii")
        text = self.raw("SeriesDescription")[0].decode(encoding, errors="replace")
        return " ".join(_printable(text).split())[:_DESCRIPTION_LENGTH]


def _items_of(element: Element | None) -> Iterator[Elements]:
    """The items of a sequence (PS3.5 7.5), without a pydicom Dataset for each: enhanced objects have thousands."""
    if element is None or not isinstance(element, RawDataElement):
        items = element.value if element is not None else None
        yield from (Elements.of(item) for item in items) if isinstance(items, Sequence) else ()
        return
    if element.VR not in ("SQ", "UN", None) or not element.value:
        return
    # What a writer did not know is implicit VR little endian (PS3.5 6.2.2).
    is_unknown = element.VR == "UN"
    implicit, little = element.is_implicit_VR or is_unknown, element.is_little_endian or is_unknown
    file = BytesIO(element.value)
    while len(head := file.read(8)) == 8:
        group, number, length = struct.unpack("<HHI" if little else ">HHI", head)
        if (group, number) != _ITEM:
            return
        content = file if length == _UNDEFINED else BytesIO(file.read(length))
        yield Elements({part.tag: part for part in data_element_generator(content, implicit, little)})


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
