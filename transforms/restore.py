"""Class scores of a network's grid to a class map on the source's: interpolated linearly and decided plane by plane.

Scores never exist at full size. Where all corners of a cell agree which class wins, so does every point in it, since
linear interpolation is a mean of the corners; what lies between corners that do not agree is interpolated, by the same
operations in the same order wherever a slab begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transforms.cells import PlaneBetween, ScorePlane, codes_of
from transforms.geometry import AxisMap, Geometry
from transforms.spline import LinearTaps, linear_taps


class SlabRestorer:
    """Takes scores slab by slab and writes the planes of a class map that are then complete.

    `add` the slabs in increasing order along `axis` of the source grid. Target planes along `target_axis` are complete
    once both source planes around them are there; the last source plane of each slab is kept (copied) for the next.
    The class map is the same, bit for bit, whatever the slabs' sizes. Scores of classes that exclude each other
    decide by the highest, the first of equals; with `painted`, scores are of regions: region r paints class
    `painted[r]` where its own score is over `above` (a half for probabilities, 0 for logits), later ones over earlier
    ones. Voxels more than a voxel beyond the source are class 0.

    Raises:
        ValueError: the grids are neither parallel nor sheared against each other, the source is sheared and the target
            is not, or the target is sheared and `axis` is not that of its stack (see `slab_axis`).
    """

    def __init__(
        self,
        source: Geometry,
        target: Geometry,
        axis: int,
        *,
        painted: Sequence[int] | None = None,
        above: float = 0.5,
    ) -> None:
        self._axes = source.axis_map(target)
        self._source_shape, self._target_shape = source.shape, target.shape
        self.axis, self.target_axis = axis, self._axes.source_axes.index(axis)
        if self._axes.stack_axis is not None and (source.is_sheared or self._axes.stack_axis != self.target_axis):
            raise ValueError(f"scores cannot be restored along axis {axis} of {source.describe()}")
        self._above = None if painted is None else above
        self._painted = None if painted is None else torch.tensor([0, *painted], dtype=torch.int32)
        self._depth = _taps(self._axes, self.target_axis, source.shape[axis])
        self._across = [t for t in range(3) if t != self.target_axis]
        self._received = 0
        self._last: ScorePlane | None = None

    @property
    def received(self) -> int:
        """Source planes that have arrived."""
        return self._received

    def complete(self, received: int) -> range:
        """The target planes that are complete when the first `received` source planes have arrived."""
        done = np.flatnonzero(self._depth.high < received)
        return range(int(done[0]), int(done[-1]) + 1) if len(done) else range(0)

    @torch.no_grad()
    def add(self, scores: Tensor, classes: Tensor) -> range:
        """Take the next slab and write the planes of `classes` that it completes; returns their numbers.

        Args:
            scores: (outputs, I, J, K) of a floating type, with the source's shape but for any number of planes along
                `axis`. It is not kept.
            classes: (I', J', K') of any integer type that holds the classes, on the target grid.

        Raises:
            ValueError: the scores or the classes have another shape, or too many planes have come.
        """
        planes = scores.shape[self.axis + 1]
        self._check(scores, classes)
        before = set(self.complete(self._received))
        first, self._received = self._received, self._received + planes
        codes = codes_of(scores, self._above)
        slab = _Slab(self.axis, first, scores, codes, self._last, self._swapped)
        written = [t for t in self.complete(self._received) if t not in before]
        for t in written:
            classes.select(self.target_axis, t).copy_(self._plane(t, slab))
        if planes:
            self._last = slab.plane(self._received - 1).copied() if self._received < self._source_count else None
        return range(min(written), max(written) + 1) if written else range(0)

    @property
    def _source_count(self) -> int:
        return self._source_shape[self.axis]

    @property
    def _swapped(self) -> bool:
        """Whether the two other axes of the source follow each other the other way round in the target."""
        first, second = (self._axes.source_axes[t] for t in self._across)
        return first > second

    def _check(self, scores: Tensor, classes: Tensor) -> None:
        wanted = list(self._source_shape)
        wanted[self.axis] = scores.shape[self.axis + 1]
        if tuple(scores.shape[1:]) != tuple(wanted) or not len(scores):
            raise ValueError(f"scores of shape {tuple(scores.shape)}, of a grid of {self._source_shape}")
        if self._painted is not None and len(self._painted) != len(scores) + 1:
            raise ValueError(f"found {len(scores)} regions that paint {len(self._painted) - 1} classes")
        if tuple(classes.shape) != self._target_shape:
            raise ValueError(f"a class map of shape {tuple(classes.shape)} for a grid of {self._target_shape}")
        if self._received + wanted[self.axis] > self._source_count:
            raise ValueError(f"{self._received + wanted[self.axis]} planes of scores of {self._source_count}")

    def _plane(self, t: int, slab: _Slab) -> Tensor:
        """Classes (I', J') of target plane t."""
        if t in self._depth.outside:
            return torch.zeros((), dtype=torch.int32)
        rows, columns = (_taps(self._axes, a, self._source_shape[self._axes.source_axes[a]], t) for a in self._across)
        near, far = slab.plane(int(self._depth.low[t])), slab.plane(int(self._depth.high[t]))
        part = float(self._depth.part[t])
        codes = PlaneBetween(near, far if part else near, part, rows, columns).codes(self._above)
        found = codes.int() if self._painted is None else self._painted.to(codes.device)[codes.long()]
        found[torch.from_numpy(rows.outside)] = 0
        found[:, torch.from_numpy(columns.outside)] = 0
        return found


def slab_axis(source: Geometry, target: Geometry) -> int:
    """An axis of `source` along which a `SlabRestorer` takes scores: that of the target's first axis, or its stack's.

    Raises:
        ValueError: the grids are neither parallel nor sheared against each other.
    """
    axes = source.axis_map(target)
    return axes.source_axes[axes.stack_axis or 0]


def _taps(axes: AxisMap, target_axis: int, count: int, plane: int = 0) -> LinearTaps:
    """Along one axis of the target, for `count` voxels of the source; `plane` is that of a sheared target's stack."""
    offset = axes.offsets[target_axis] + axes.shears[target_axis] * plane
    return linear_taps(count, axes.target_shape[target_axis], axes.scales[target_axis], offset, exact=axes.is_exact)


@dataclass(frozen=True, eq=False)
class _Slab:
    """Source planes from `first` on, and the one before; `swapped` turns them to the target's order of axes."""

    axis: int
    first: int
    scores: Tensor
    codes: Tensor
    before: ScorePlane | None
    swapped: bool

    def plane(self, number: int) -> ScorePlane:
        if number < self.first and self.before is not None:
            return self.before
        scores = self.scores.select(self.axis + 1, number - self.first)
        codes = self.codes.select(self.axis, number - self.first)
        return ScorePlane(scores.mT, codes.T) if self.swapped else ScorePlane(scores, codes)
