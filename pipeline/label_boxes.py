"""Where the labels of a label map are: the least box of each, in a few passes over the voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Box = tuple[slice, slice, slice]

_WIDEST = 64
_BIT_TYPES = (np.uint8, np.uint16, np.uint32, np.uint64)


def held_box(label_map: Array) -> Box | None:
    """The least box of a label map (I, J, K) outside of which all is 0; None when it holds nothing else."""
    box = [slice(None)] * 3
    # The axis of the longest stride goes first, so that the other two are searched in what it left over.
    for axis in np.argsort([-abs(step) for step in label_map.strides], kind="stable"):
        others = tuple(other for other in range(3) if other != axis)
        held = np.flatnonzero(label_map[tuple(box)].any(axis=others))
        if not held.size:
            return None
        box[axis] = slice(int(held[0]), int(held[-1]) + 1)
    return box[0], box[1], box[2]


def joined(boxes: Sequence[Box]) -> Box:
    """The least box that holds all of these; at least one."""
    i, j, k = (slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3))
    return i, j, k


def boxes_of_values(label_map: Array, values: Sequence[int]) -> dict[int, Box]:
    """The least box of each of these values, none of them 0, that occurs in a label map (I, J, K).

    Each voxel becomes a set of values, a bit each; the union of the sets of a plane says which values lie in it.
    """
    highest = int(label_map.max(initial=0))
    possible = [value for value in values if value <= highest]
    found: dict[int, Box] = {}
    for start in range(0, len(possible), _WIDEST):
        found |= _boxes_of_some(label_map, possible[start : start + _WIDEST], highest)
    return found


def _boxes_of_some(label_map: Array, values: Sequence[int], highest: int) -> dict[int, Box]:
    bit_type = next(t for t in _BIT_TYPES if np.iinfo(t).bits >= len(values))
    table = np.zeros(highest + 1, dtype=bit_type)
    table[list(values)] = [1 << bit for bit in range(len(values))]
    sets = np.take(table, label_map)
    plane = np.bitwise_or.reduce(sets, axis=0)
    along = (
        np.bitwise_or.reduce(sets.reshape(len(sets), -1), axis=1),
        np.bitwise_or.reduce(plane, axis=1),
        np.bitwise_or.reduce(plane, axis=0),
    )
    found: dict[int, Box] = {}
    for bit, value in enumerate(values):
        held = [np.flatnonzero(line & bit_type(1 << bit)) for line in along]
        if held[0].size:
            i, j, k = (slice(int(h[0]), int(h[-1]) + 1) for h in held)
            found[value] = (i, j, k)
    return found
