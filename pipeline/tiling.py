"""Where the windows of a volume lie and in which order they are visited: arithmetic on shapes alone.

Windows go along one axis of the volume, row by row, so that of the blended scores only those planes have to exist
that windows still to come can touch. Nothing here depends on how much memory there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from pipeline.plan import InferenceConventions, Plan
from transforms.labels import LabelSchema
from transforms.patches import padding_to, tile_starts

Triple = tuple[int, int, int]
Box = tuple[slice, slice, slice]
_Tiling = tuple[Triple, float, bool]


SCATTERED = 1.15
"""Times as many unfinished voxels are worth it where finished planes lie together: of 117 classes everything but the
network took a seventh to a fourth less time (260x260x270)."""


@dataclass(frozen=True)
class WindowSettings:
    """How a volume is tiled and what a network's outputs are.

    `factor` is what a tile's sides must be divisible by. `mirror_axes` are averaged over in every combination;
    () means once, as it is. `twin_outputs` are the outputs' left/right counterparts. Outputs exclude each other (a
    softmax), or are regions that `overlap` (a sigmoid each). A window that stays below `air`, a value a channel, is
    taken for one of nothing but the image's lowest values; None takes every window for what it is.
    """

    patch_shape: Triple
    factor: Triple
    step: float
    mirror_axes: tuple[int, ...]
    twin_outputs: tuple[int, ...]
    overlap: bool = False
    conventions: InferenceConventions = field(default_factory=InferenceConventions)
    air: tuple[float, ...] | None = None


def window_settings(plan: Plan, schema: LabelSchema, *, step: float, mirror: bool) -> WindowSettings:
    """A plan's, with windows `step` of a patch apart."""
    axes = plan.mirror_axes if mirror else ()
    return WindowSettings(
        plan.patch_shape, plan.factor, step, axes, schema.twin_outputs, bool(schema.regions), plan.inference
    )


@dataclass(frozen=True)
class Row:
    """The windows of one shape that begin at one plane of the streaming axis, by their first voxels.

    A first voxel is negative where the volume is smaller than the window. `members` are the networks that see them.
    """

    window: Triple
    starts: tuple[Triple, ...]
    members: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All rows over a volume of `shape`, in the order of their first planes along `axis`.

    `depth` planes along `axis` hold everything that is not finished at any time.
    """

    shape: Triple
    axis: int
    rows: tuple[Row, ...]
    depth: int

    @property
    def live_shape(self) -> Triple:
        """Of what is not finished."""
        i, j, k = (self.depth if a == self.axis else n for a, n in enumerate(self.shape))
        return i, j, k

    @property
    def window_count(self) -> int:
        """In all; one that several networks see counts once."""
        return sum(len(row.starts) for row in self.rows)

    def planes(self, row: Row) -> tuple[int, int]:
        """The planes (first, stop) of the volume that a row's windows cover."""
        first = row.starts[0][self.axis]
        return max(0, first), min(self.shape[self.axis], first + row.window[self.axis])


def window_shape(shape: Sequence[int], settings: WindowSettings) -> Triple:
    """The tile for a volume: the patch, but along axes where the volume is hardly longer, the whole volume.

    A patch is not all that a network can take: one larger tile costs less than several that overlap.
    """
    longest = settings.conventions.longest_window
    sides = [
        whole if patch < whole <= longest * patch else patch
        for patch, whole in (
            (patch, math.ceil(side / factor) * factor)
            for side, patch, factor in zip(shape, settings.patch_shape, settings.factor, strict=True)
        )
    ]
    return sides[0], sides[1], sides[2]


def lay_out(shape: Sequence[int], members: Sequence[WindowSettings], *, axis: int | None = None) -> Layout:
    """The windows of every member over a volume, along `axis` or the one that keeps least unfinished; along the first,
    whose planes lie together in memory, also where that is a little more.

    Raises:
        ValueError: there are no members.
    """
    if not members:
        raise ValueError("at least one network is needed")
    i, j, k = shape
    tilings: dict[_Tiling, list[int]] = {}
    for number, settings in enumerate(members):
        spread = settings.conventions.tiles == "spread"
        tilings.setdefault((window_shape(shape, settings), settings.step, spread), []).append(number)
    along = [_along((i, j, k), a, tilings) for a in range(3) if axis in (None, a)]
    return min(along, key=lambda layout: math.prod(layout.live_shape) * (1 if layout.axis == 0 else SCATTERED))


def _along(shape: Triple, axis: int, tilings: dict[_Tiling, list[int]]) -> Layout:
    rows = [row for tiling, members in tilings.items() for row in _rows(shape, axis, tiling, members)]
    rows.sort(key=lambda row: (row.starts[0][axis], row.members))
    layout = Layout(shape, axis, tuple(rows), 1)
    stop, depth = 0, 1
    for row in rows:
        first, end = layout.planes(row)
        stop = max(stop, end)
        depth = max(depth, stop - first)
    return Layout(shape, axis, layout.rows, depth)


def _rows(shape: Triple, axis: int, tiling: _Tiling, members: Sequence[int]) -> list[Row]:
    window, step, spread = tiling
    before = [low for low, _ in padding_to(shape, window)]
    padded = [max(n, w) for n, w in zip(shape, window, strict=True)]
    starts = tile_starts(padded, window, step=step, spread=spread)
    axes = [sorted({start[a] - before[a] for start in starts}) for a in range(3)]
    rows = []
    for first in axes[axis]:
        i, j, k = ([first] if a == axis else axes[a] for a in range(3))
        rows.append(Row(window, tuple(product(i, j, k)), tuple(members)))
    return rows


def overlap(start: Sequence[int], sides: Sequence[int], shape: Sequence[int]) -> tuple[Box, Box]:
    """The part of a box from `start` that lies in a volume of `shape`: within the box, and within the volume."""
    low = [min(max(0, a), n) for a, n in zip(start, shape, strict=True)]
    high = [max(b, min(n, a + side)) for a, b, side, n in zip(start, low, sides, shape, strict=True)]
    i, j, k = (slice(b - a, c - a) for a, b, c in zip(start, low, high, strict=True))
    x, y, z = (slice(b, c) for b, c in zip(low, high, strict=True))
    return (i, j, k), (x, y, z)
