"""Outlines of the labels of one plane, along the edges between pixels.

An outline is the border of the label's mask at level 0.5, told exactly: its points are corners of pixels, so that
it keeps half a pixel from every pixel's centre, inside or outside. Filling it by the even-odd rule, or by the
non-zero rule, gives the mask back, whatever the pixels' sides.

Pixels that touch at a corner only belong to different outlines (4-connected inside, 8-connected outside). A hole is
joined to the outline around it by a bridge of no width, there and back along one edge between pixels (the keyhole of
DICOM PS3.3 section C.8.8.6.3). Outer borders run clockwise in the picture, holes against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8 | np.uint16]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Outline:
    """A closed polygon of one label: (N, 2) corners (i, j), halves of whole numbers; the last joins the first."""

    label: int
    points_ij: Floats


def outlines(plane: Labels) -> Iterator[Outline]:
    """The outlines of all labels but 0 in a plane (I, J), by label, then by their first corner.

    Pixel (i, j) has its centre at (i, j) and fills half a pixel to each side. Time grows with the plane's size and
    with the borders' length.
    """
    padded = np.pad(plane, 1)
    corners = _corners(padded)
    if not len(corners.label):
        return
    following, starts = _trace(corners)
    i, j = corners.i.tolist(), corners.j.tolist()
    is_hole = corners.is_reflex[starts].tolist()
    _bridge([start for start, hole in zip(starts, is_hole, strict=True) if hole], corners, padded, (following, i, j))
    for start, hole in zip(starts, is_hole, strict=True):
        if not hole:
            nodes = _ring(start, following)
            points = np.array([[i[n], j[n]] for n in nodes], dtype=np.float64) - 0.5
            # A bridge that ends at a corner names it twice.
            yield Outline(int(corners.label[start]), points[(points != np.roll(points, 1, axis=0)).any(axis=1)])


@dataclass(frozen=True, eq=False)
class _Corners:
    """Where outlines turn: at lattice point (i, j), the upper left corner of pixel (i, j).

    Sorted by label, row and column. So each horizontal edge joins an even corner and the next: `n ^ 1` is across.
    `column_order` sorts them by label, column and row: there, each vertical edge joins an even place and the next.
    """

    label: Ints
    i: Ints
    j: Ints
    is_reflex: npt.NDArray[np.bool_]
    column_order: Ints
    column_keys: Ints

    @staticmethod
    def key(label: Ints, i: Ints, j: Ints) -> Ints:
        """Sorts by label, column and row."""
        return np.asarray((label << 34) + (i << 17) + j)


# Bit q of a code says that the label fills quadrant q of a lattice point: upper left, upper right, lower left and
# lower right. A quadrant makes a corner where it alone is filled, where it alone is not, and where it and the
# opposite one are: there, two corners touch.
_TURNS = np.array([[code in (1 << q, 15 - (1 << q), (9, 6, 6, 9)[q]) for code in range(16)] for q in range(4)])
_THREE_FILLED = np.array([code.bit_count() == 3 for code in range(16)])


def _corners(padded: Labels) -> _Corners:
    quadrants = (padded[:-1, :-1], padded[1:, :-1], padded[:-1, 1:], padded[1:, 1:])
    upper_left = quadrants[0]
    i, j = np.nonzero(np.logical_or.reduce([upper_left != other for other in quadrants[1:]]))
    around = np.stack([quadrant[i, j] for quadrant in quadrants], axis=1)
    # A corner: label, row, column, whether its edges go to the right and down, whether three quadrants are filled.
    found: list[Ints] = []
    for first in range(4):
        same = around == around[:, first, None]
        kept = np.flatnonzero((around[:, first] != 0) & ~same[:, :first].any(axis=1))
        codes = same[kept] @ (1, 2, 4, 8)
        for q in range(4):
            chosen = kept[turn := _TURNS[q, codes]]
            columns = (around[chosen, first], j[chosen], i[chosen], chosen * 0 + q % 2, chosen * 0 + q // 2)
            found.append(np.stack([*columns, _THREE_FILLED[codes[turn]]], axis=1).astype(np.int64))
    table = np.concatenate(found)
    label, j, i, _, down, reflex = table[np.lexsort(table[:, 3::-1].T)].T
    # Where two corners touch, the one whose edge ends there comes before the one whose edge begins.
    order = np.lexsort((down, j, i, label))
    return _Corners(label, i, j, reflex.astype(bool), order, _Corners.key(label, i, j)[order])


def _trace(corners: _Corners) -> tuple[list[int], list[int]]:
    """The corner that follows each one on its way round, and the first of each way round in the corners' order.

    A border whose first corner has three filled quadrants is that of a hole.
    """
    count = len(corners.label)
    along_column = np.empty(count, dtype=np.int64)
    upper, lower = corners.column_order[0::2], corners.column_order[1::2]
    along_column[upper], along_column[lower] = lower, upper
    partners, is_reflex = along_column.tolist(), corners.is_reflex.tolist()
    following, starts = [-1] * count, []
    for start in range(0, count, 2):
        if following[start] >= 0:
            continue
        starts.append(start)
        corner, is_hole = start, is_reflex[start]
        while True:
            end = corner ^ 1
            begin = partners[end]
            if is_hole:
                following[end], following[begin] = corner, end
            else:
                following[corner], following[end] = end, begin
            if begin == start:
                break
            corner = begin
    return following, starts


Ring = tuple[list[int], list[int], list[int]]
"""Following node, i and j, by node: the corners, and after them the ends of bridges."""


def _bridge(holes: list[int], corners: _Corners, padded: Labels, ring: Ring) -> None:
    """Join each hole to the border on its left, along the upper edge of its first pixel.

    What a bridge meets is the outer border, or a hole that begins farther up or left, so joins never form a circle.
    """
    by_edge: dict[int, list[tuple[int, int]]] = {}
    for hole in holes:
        label, i, j = int(corners.label[hole]), int(corners.i[hole]), int(corners.j[hole])
        inside = (padded[:i, j] == label) & (padded[:i, j + 1] == label)
        end_i = int(np.flatnonzero(~inside)[-1])
        key = (label << 34) + (end_i << 17) + j
        edge = (int(np.searchsorted(corners.column_keys, key, side="right")) - 1) // 2
        by_edge.setdefault(edge, []).append((end_i, hole))
    following, _, rows = ring
    for edge, bridges in by_edge.items():
        upper, lower = corners.column_order[2 * edge : 2 * edge + 2].tolist()
        is_downwards = following[upper] == lower
        node = upper if is_downwards else lower
        for end_i, hole in sorted(bridges, key=lambda bridge: rows[bridge[1]], reverse=not is_downwards):
            node = _splice(node, hole, end_i, ring)


def _splice(node: int, hole: int, end_i: int, ring: Ring) -> int:
    """Put a bridge to `hole` behind `node`; gives the last node of the way back."""
    following, i, j = ring
    there, hole_again, back = range(len(i), len(i) + 3)
    i += [end_i, i[hole], end_i]
    j += [j[hole]] * 3
    following += [hole, back, following[node]]
    following[node] = there
    # The way round a hole ends with its upper edge, from right to left.
    following[hole ^ 1] = hole_again
    return back


def _ring(start: int, following: list[int]) -> list[int]:
    nodes, node = [start], following[start]
    while node != start:
        nodes.append(node)
        node = following[node]
    return nodes
