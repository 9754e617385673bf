"""The connected components of all labels of a label map in one pass, however many labels there are.

Voxels of one label that follow each other along the last axis are one stretch; what touches what is asked of stretches,
of which there are far fewer than voxels, so it costs the same for one label and for a hundred that lie everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]

_LATER_LINES = ((0, 1), (1, -1), (1, 0), (1, 1))
"""Steps (i, j) to the neighbouring lines of voxels that come later; the earlier ones have been there already."""


@dataclass(frozen=True, eq=False)
class LabelParts:
    """Stretches (S,) of a label map in memory's order, from `starts` up to `stops`, and the component of each.

    `values` (C,) and `sizes` (C,) are those of the components, which hang together over faces, edges or corners and
    are numbered in the order in which they begin.
    """

    starts: Counts
    stops: Counts
    numbers: Counts
    values: Counts
    sizes: Counts

    def painted(self, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
        """The number of each voxel's component, -1 where there is none, in a map (I, J, K) of that shape."""
        found = np.full(int(np.prod(shape)), -1, dtype=np.int32)
        places, numbers = self.voxels_of(np.ones(self.sizes.size, dtype=np.bool_))
        found[places] = numbers
        return found.reshape(shape)

    def voxels_of(self, wanted: npt.NDArray[np.bool_]) -> tuple[Counts, Counts]:
        """Flat places (N,) of the voxels of the wanted components (C,), and the number of each voxel's component."""
        chosen = np.flatnonzero(wanted[self.numbers])
        lengths = self.stops[chosen] - self.starts[chosen]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self.starts[chosen], lengths) + within, np.repeat(self.numbers[chosen], lengths)


def label_parts(label_map: Array) -> LabelParts:
    """The components of every value but 0 of a C-contiguous label map (I, J, K)."""
    starts, stops, values = _stretches(label_map)
    pairs = [_touching(starts, stops, values, label_map.shape, step) for step in _LATER_LINES]
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    graph = coo_array((np.ones(left.size, dtype=np.bool_), (left, right)), shape=(starts.size, starts.size))
    numbers = connected_components(graph, directed=False)[1]
    _, firsts, numbers = np.unique(numbers, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    numbers = rank[numbers]
    sizes = np.bincount(numbers, weights=stops - starts, minlength=order.size).astype(np.int64)
    return LabelParts(starts, stops, numbers, values[firsts[order]].astype(np.int64), sizes)


def _stretches(label_map: Array) -> tuple[Counts, Counts, Array]:
    flat = label_map.reshape(-1)
    begins = np.ones(flat.size, dtype=np.bool_)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins.reshape(-1, label_map.shape[-1])[:, 0] = True
    starts = np.flatnonzero(begins)
    stops, values = np.append(starts[1:], flat.size), flat[starts]
    held = values != 0
    return starts[held], stops[held], values[held]


def _touching(
    starts: Counts, stops: Counts, values: Array, shape: tuple[int, ...], step: tuple[int, int]
) -> tuple[Counts, Counts]:
    """Pairs of stretches of one value, the second on the line that lies a step (i, j) from the first's."""
    i, j = np.divmod(starts // shape[2], shape[1])
    there = np.flatnonzero((i + step[0] < shape[0]) & (j + step[1] >= 0) & (j + step[1] < shape[1]))
    line = (i[there] + step[0]) * shape[1] + j[there] + step[1]
    shift = (step[0] * shape[1] + step[1]) * shape[2]
    low = np.maximum(starts[there] + shift - 1, line * shape[2])
    high = np.minimum(stops[there] + shift + 1, (line + 1) * shape[2])
    first = np.searchsorted(stops, low, side="right")
    counts = np.maximum(np.searchsorted(starts, high, side="left") - first, 0)
    left = np.repeat(there, counts)
    within = np.arange(left.size) - np.repeat(np.cumsum(counts) - counts, counts)
    right = np.repeat(first, counts) + within
    same = values[left] == values[right]
    return left[same], right[same]
