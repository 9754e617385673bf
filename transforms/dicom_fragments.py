"""Where a file's pixel data lie, found without reading them: one run of native values, or fragments of code.

Encapsulated pixel data are items: first a table of offsets, which may be empty, then one or more fragments a frame
(PS3.5 A.4). A file that ends before its last fragment is recognised here, from lengths alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import BinaryIO

from transforms.errors import DicomError

ByteFile = BinaryIO | FileIO
"""An open file, buffered or not."""

Fragment = tuple[int, int]
"""Offset of a fragment's bytes, and their number."""

_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_PIXEL_DATA = (0x7FE0, 0x0010)
_UNDEFINED = 0xFFFFFFFF
_LONG_FORMS = (b"OB", b"OW", b"UN", b"OF", b"OD", b"OL", b"OV")
# How a JPEG, JPEG-LS or JPEG 2000 frame begins: a marker, and the first byte of the next one (T.81, T.87, T.800).
_FRAME_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff")


@dataclass(frozen=True, slots=True)
class PixelData:
    """The pixel data of a file: `length` bytes from `offset`, or as many `fragments` where they are encapsulated.

    `offset` counts in the file; in a deflated one in what it unpacks to, whose code begins at `deflated_from`.
    `is_cut` is true when the file ends first, `is_words` when big-endian values are stored as 16-bit words (OW).
    """

    offset: int
    length: int
    fragments: int | None = None
    is_cut: bool = False
    is_words: bool = False
    deflated_from: int | None = None


def find_pixels(file: BinaryIO, size: int, *, implicit: bool, little: bool) -> PixelData | None:
    """The pixel data whose element begins here in a file of `size` bytes; None when another element does."""
    order = "<" if little else ">"
    head = file.read(12)
    if len(head) < 12 or struct.unpack(f"{order}HH", head[:4]) != _PIXEL_DATA:
        return None
    is_long = not implicit and head[4:6] in _LONG_FORMS
    start = file.tell() - (0 if is_long else 4)
    (length,) = struct.unpack(f"{order}I", head[8:12] if is_long else head[4:8])
    if length != _UNDEFINED:
        present = min(length, max(size - start, 0))
        return PixelData(start, present, is_cut=present < length, is_words=head[4:6] == b"OW" and not little)
    fragments, is_cut = _walk(file, start, size)
    return PixelData(start, size - start, len(fragments[1:]), is_cut)


def frame_fragments(file: ByteFile, pixels: PixelData, frames: int) -> list[list[Fragment]]:
    """The fragments of each frame, in order.

    Raises:
        DicomError: nothing says which fragments belong together.
    """
    items, _ = _walk(file, pixels.offset, pixels.offset + pixels.length)
    table, fragments = items[:1], items[1:]
    if len(fragments) == frames:
        return [[fragment] for fragment in fragments]
    if frames == 1:
        return [list(fragments)]
    starts = _listed_starts(file, table, fragments)
    if len(starts) != frames:
        starts = _marked_starts(file, fragments)
    if len(starts) != frames or starts[0] != 0:
        raise DicomError(f"{len(fragments)} pieces of compressed pixel data cannot be told apart into {frames} frames")
    ends = [*starts[1:], len(fragments)]
    return [list(fragments[start:end]) for start, end in zip(starts, ends, strict=True)]


def join(file: ByteFile, fragments: Sequence[Fragment]) -> bytes:
    """The code of one frame."""
    pieces = []
    for offset, length in fragments:
        file.seek(offset)
        pieces.append(file.read(length))
    return b"".join(pieces)


def _walk(file: ByteFile, start: int, end: int) -> tuple[list[Fragment], bool]:
    """All items between two offsets, the offset table among them, and whether they end too early."""
    items: list[Fragment] = []
    place = start
    while place + 8 <= end:
        file.seek(place)
        group, element, length = struct.unpack("<HHI", file.read(8))
        if (group, element) == _END:
            return items, not items
        if (group, element) != _ITEM or place + 8 + length > end:
            return items, True
        items.append((place + 8, length))
        place += 8 + length
    return items, True


def _listed_starts(file: ByteFile, table: Sequence[Fragment], fragments: Sequence[Fragment]) -> list[int]:
    """The first fragment of each frame by the offset table, whose offsets count from the first fragment's item."""
    listed = join(file, table)
    offsets = struct.unpack(f"<{len(listed) // 4}I", listed[: len(listed) // 4 * 4])
    numbers = {offset - fragments[0][0]: number for number, (offset, _) in enumerate(fragments)}
    is_table = sorted(set(offsets)) == list(offsets) and set(offsets) <= set(numbers)
    return [numbers[offset] for offset in offsets] if is_table else []


def _marked_starts(file: ByteFile, fragments: Sequence[Fragment]) -> list[int]:
    """The fragments that begin as a frame does."""
    return [n for n, (offset, _) in enumerate(fragments) if join(file, [(offset, 3)]) in _FRAME_STARTS]
