"""Islands removed and holes filled in label maps: what a `PostProcessing` says, done. Arrays in, arrays out.

All labels are looked at in one pass, so that a hundred of them cost about what one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.label_boxes import Box, boxes_of_values, held_box, joined
from pipeline.label_parts import label_parts
from pipeline.postprocessing import Action, PostProcessing
from transforms.geometry import Geometry
from transforms.labels import LabelSchema

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]

_ROUNDING = 1e-9
_VALUE_BITS = 16


def postprocessed(label_map: Array, wanted: PostProcessing, schema: LabelSchema, geometry: Geometry) -> Array:
    """A label map (I, J, K) of ids after post-processing; the very array where there is nothing to change. Thresholds
    have been heeded already.

    Of components of one size the first in the order of I, J, K is the largest.

    Raises:
        ValueError: the shape is not the grid's, or a label is not in the schema.
    """
    if label_map.shape != geometry.shape:
        raise ValueError(f"a label map of {label_map.shape} on a grid of {geometry.shape}")
    wanted.check_labels(schema)
    id_of = {x.name: x.id for x in schema.labels}
    removing = sorted((action for action in wanted.actions if action.removes), key=lambda a: _rank(a, id_of))
    filling = [action for action in wanted.actions if action.kind == "holes"]
    found = _removed(label_map, removing, id_of, geometry.voxel_volume_mm3)
    return _filled(found, filling, id_of) if filling else found


def values_of(action: Action, id_of: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of its labels, sorted."""
    return tuple(sorted(id_of[name] for name in action.labels))


def dropped(sizes_voxels: Counts, action: Action, voxel_volume_mm3: float) -> Mask:
    """Which components of these sizes the action removes."""
    if action.below_mm3 is not None:
        return np.asarray(sizes_voxels * voxel_volume_mm3 < action.below_mm3 * (1 - _ROUNDING))
    drop = np.ones(len(sizes_voxels), dtype=np.bool_)
    if drop.size:
        drop[np.argmax(sizes_voxels)] = False
    return drop


def mask_of(label_map: Array, values: Sequence[int]) -> Mask:
    """Where a label map has any of these values."""
    if len(values) == 1:
        return np.asarray(label_map == values[0])
    return np.isin(label_map, values)


def sizes_of(numbers: npt.NDArray[np.int32], count: int) -> Counts:
    """Voxels of each of `count` numbered components, plane by plane to save memory."""
    sizes = np.zeros(count + 1, dtype=np.int64)
    for plane in numbers:
        found = np.bincount(plane.reshape(-1))
        sizes[: len(found)] += found
    return sizes[1:]


@dataclass(frozen=True, eq=False)
class Pockets:
    """Connected sets of voxels: where they are (N, 3), the number of each voxel's set (N,), and what each borders on.

    `borders` has the values beside each set, over faces; 0 stands for background and for the end of the volume.
    """

    places: Places
    numbers: Places
    borders: tuple[frozenset[int], ...]

    def bordered_by(self, values: Sequence[int]) -> Mask:
        """(N,) voxels of the sets that border on nothing but these values."""
        allowed = frozenset(values)
        inside = np.array([bool(border) and border <= allowed for border in self.borders], dtype=np.bool_)
        return np.asarray(inside[self.numbers])


def background_pockets(label_map: Array) -> Pockets:
    """The parts of the background that no way over faces leads out of."""
    box = held_box(label_map)
    if box is None:
        return _pockets(label_map, np.zeros((0, 3), dtype=np.intp), np.zeros(0, dtype=np.intp))
    numbers, count = label(label_map[box] == 0)
    inner = np.ones(count + 1, dtype=np.bool_)
    inner[0] = False
    for axis in range(3):
        for end in (0, -1):
            inner[np.unique(np.take(numbers, end, axis=axis))] = False
    places = np.argwhere(inner[numbers]) if inner.any() else np.zeros((0, 3), dtype=np.intp)
    order = np.cumsum(inner) - 1
    found = order[numbers[tuple(places.T)]]
    return _pockets(label_map, places + [part.start for part in box], found)


def _rank(action: Action, id_of: Mapping[str, int]) -> tuple[int, tuple[int, ...], str]:
    """Structures before their parts, and an order of the rest that does not hang on how they are listed."""
    return -len(action.labels), values_of(action, id_of), action.kind


def _removed(label_map: Array, actions: Sequence[Action], id_of: Mapping[str, int], voxel_volume_mm3: float) -> Array:
    """Structures of several labels one after the other, then all others at once."""
    found, taken = label_map, []
    singles = [action for action in actions if len(action.labels) == 1]
    steps = [[action] for action in actions if len(action.labels) > 1] + ([singles] if singles else [])
    for step in steps:
        places, becomes = _islands(found, step, id_of, voxel_volume_mm3)
        if not places.size:
            continue
        if found is label_map:
            found = label_map.copy()
        found[tuple(places.T)] = becomes
        taken.append(places[becomes == 0])
    if sum(places.size for places in taken):
        _give_to_neighbours(found, np.concatenate(taken))
    return found


def _islands(
    label_map: Array, actions: Sequence[Action], id_of: Mapping[str, int], voxel_volume_mm3: float
) -> tuple[Places, Places]:
    """Where actions that share no label remove voxels (N, 3), and what each becomes, 0 where that is not said."""
    structures = [values_of(action, id_of) for action in actions]
    boxes = boxes_of_values(label_map, sorted({value for values in structures for value in values}))
    if not boxes:
        return np.zeros((0, 3), dtype=np.intp), np.zeros(0, dtype=np.intp)
    box = joined(list(boxes.values()))
    merged = np.zeros(int(label_map.max()) + 1, dtype=np.uint16)
    for number, values in enumerate(structures, start=1):
        merged[[value for value in values if value < len(merged)]] = number
    parts = label_parts(np.ascontiguousarray(np.take(merged, label_map[box])))
    order = np.argsort(parts.values, kind="stable")
    ends = np.searchsorted(parts.values[order], np.arange(1, len(actions) + 2))
    becomes = np.full(parts.sizes.size, -1, dtype=np.intp)
    for number, action in enumerate(actions):
        own = order[ends[number] : ends[number + 1]]
        drop = own[dropped(parts.sizes[own], action, voxel_volume_mm3)]
        becomes[drop] = 0 if action.becomes is None else id_of[action.becomes]
    flat, owners = parts.voxels_of(becomes >= 0)
    shape = tuple(part.stop - part.start for part in box)
    places = np.stack(np.unravel_index(flat, shape), axis=1) + _start(box)
    return places, becomes[owners]


def _give_to_neighbours(label_map: Array, places: Places) -> None:
    """What was removed becomes the label that alone borders on it."""
    pockets = _pockets(label_map, places, _numbers_of(places, label_map.shape))
    for value in {min(border) for border in pockets.borders if len(border) == 1 and 0 not in border}:
        label_map[tuple(places[pockets.bordered_by([value])].T)] = value


def _filled(label_map: Array, actions: Sequence[Action], id_of: Mapping[str, int]) -> Array:
    """Each hole goes to the smallest structure that alone borders on it."""
    pockets, found = background_pockets(label_map), label_map
    free = np.ones(len(pockets.places), dtype=np.bool_)
    for action in sorted(actions, key=lambda a: (len(a.labels), values_of(a, id_of))):
        chosen = free & pockets.bordered_by(values_of(action, id_of))
        if not chosen.any():
            continue
        if found is label_map:
            found = label_map.copy()
        found[tuple(pockets.places[chosen].T)] = id_of[action.becomes or action.labels[0]]
        free &= ~chosen
    return found


def _numbers_of(places: Places, shape: tuple[int, ...]) -> Places:
    """Which voxels (N, 3) hang together over faces: a number for each set, from 0. None stands twice."""
    flat = np.ravel_multi_index(tuple(places.T), shape)
    order = np.argsort(flat)
    ordered, rows, columns = flat[order], [], []
    for axis in range(3):
        stride = int(np.prod(shape[axis + 1 :]))
        beside = np.flatnonzero(places[:, axis] + 1 < shape[axis])
        at = np.minimum(np.searchsorted(ordered, flat[beside] + stride), len(ordered) - 1)
        is_there = ordered[at] == flat[beside] + stride
        rows.append(beside[is_there])
        columns.append(order[at[is_there]])
    left, right = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(left.size, dtype=np.bool_), (left, right)), shape=(len(flat), len(flat)))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.intp)


def _pockets(label_map: Array, places: Places, numbers: Places) -> Pockets:
    """What sets of voxels border on; voxels of any of the sets are no border."""
    count = int(numbers.max(initial=-1)) + 1
    own = np.sort(np.ravel_multi_index(tuple(places.T), label_map.shape))
    pairs = [_beside(label_map, places, numbers, own, axis=axis, step=step) for axis in range(3) for step in (-1, 1)]
    borders: list[set[int]] = [set() for _ in range(count)]
    for pair in np.unique(np.concatenate(pairs)).tolist():
        borders[pair >> _VALUE_BITS].add(pair & ((1 << _VALUE_BITS) - 1))
    return Pockets(places, numbers, tuple(frozenset(border) for border in borders))


def _beside(label_map: Array, places: Places, numbers: Places, own: Places, *, axis: int, step: int) -> Places:
    """Pairs of a set's number and a value on one side of its voxels, each as one integer."""
    at = places.copy()
    at[:, axis] += step
    is_inside = (at[:, axis] >= 0) & (at[:, axis] < label_map.shape[axis])
    ends = np.unique(numbers[~is_inside])
    at, numbers = at[is_inside], numbers[is_inside]
    flat = np.ravel_multi_index(tuple(at.T), label_map.shape)
    found = np.minimum(np.searchsorted(own, flat), max(len(own) - 1, 0))
    is_other = own[found] != flat if own.size else np.zeros(0, dtype=np.bool_)
    values = label_map[tuple(at[is_other].T)].astype(np.intp)
    pairs = np.unique((numbers[is_other] << _VALUE_BITS) | values)
    return np.concatenate([pairs, ends << _VALUE_BITS])


def _start(box: Box) -> list[int]:
    return [part.start for part in box]
