"""Whether a file is DICOM, by its first bytes; nothing of pydicom is needed to tell."""

from __future__ import annotations

import struct
from pathlib import Path

PREAMBLE = 128
"""Bytes of any content before the prefix DICM (PS3.10, 7.1)."""

# A file without a preamble begins with one of these groups' first elements, and those are short.
_LAST_FIRST_ELEMENT, _LAST_FIRST_LENGTH = 0x0070, 1024


def is_dicom(path: Path) -> bool:
    """Whether the first bytes are those of a DICOM file, with or without its 128-byte preamble.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(PREAMBLE + 4)
    return head[PREAMBLE:] == b"DICM" or _starts_with_element(head[:8])


def _starts_with_element(head: bytes) -> bool:
    """Whether bytes without a preamble begin with an element of group 2 or 8, in either byte order."""
    if len(head) < 8:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    group, element, length = struct.unpack("<HHI", head)
    little = group in (2, 8) and element <= _LAST_FIRST_ELEMENT and (explicit or length <= _LAST_FIRST_LENGTH)
    group, element = struct.unpack(">HH", head[:4])
    return little or (group in (2, 8) and element <= _LAST_FIRST_ELEMENT and explicit)
