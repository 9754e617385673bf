"""Weights that interpolate along one axis: nearest, linear, exact cubic B-spline (Unser 1999), as a band."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Order = Literal[0, 1, 3]
"""0 nearest, 1 linear, 3 exact cubic B-spline."""

Ends = Literal["mirror", "edge"]
"""What lies beyond an axis: its mirror image about the outermost voxels, or their values for ever."""

ROUNDING = 1e-6
"""Part of a voxel by which positions that are meant whole come out of matrices inexact."""

PREFILTER_REACH = 14
"""Voxels beyond which the cubic prefilter is left out: it decays by 0.268 a voxel, so that 1e-8 is lost."""

BLOCK = 32
"""Target voxels of an axis that are worked out together from the source voxels they reach."""

_POLE = np.sqrt(3.0) - 2.0

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AxisWeights:
    """How each target voxel of an axis comes from `source_count` source voxels.

    Target t is the sum of `taps[t]` (m, width) float32 times the source voxels from `first[t]` on. Targets that lie
    outside have taps of zero and are listed in `outside`.
    """

    source_count: int
    first: Integers
    taps: npt.NDArray[np.float32]
    outside: Integers

    @property
    def target_count(self) -> int:
        """Voxels of the target's axis."""
        return len(self.first)

    @property
    def growth(self) -> float:
        """Target voxels a source voxel."""
        return self.target_count / self.source_count

    @property
    def is_selection(self) -> bool:
        """Whether every target voxel is a source voxel, or outside: nothing is to be weighed."""
        return bool(self.taps.shape[1] == 1)

    @cached_property
    def is_identity(self) -> bool:
        """Whether the axis stays as it is."""
        places = np.arange(self.source_count)
        return self.is_selection and not len(self.outside) and np.array_equal(self.first, places)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The source voxels from which targets [start, stop) come, as [low, high)."""
        first = self.first[start:stop]
        return int(first.min()), int(first.max()) + self.taps.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        """The weights of targets [start, stop), a matrix over their `span`, float32."""
        low, high = self.span(start, stop)
        rows = np.arange(stop - start)[:, None]
        matrix = np.zeros((stop - start, high - low), np.float32)
        matrix[rows, self.first[start:stop, None] - low + np.arange(self.taps.shape[1])] = self.taps[start:stop]
        return torch.from_numpy(matrix)

    @cached_property
    def blocks(self) -> list[tuple[slice, slice, Tensor]]:
        """The whole axis in parts: targets, the source voxels they come from, and their weights."""
        parts = []
        for start in range(0, self.target_count, BLOCK):
            stop = min(start + BLOCK, self.target_count)
            parts.append((slice(start, stop), slice(*self.span(start, stop)), self.block(start, stop)))
        return parts

    def dense(self) -> Tensor:
        """All weights as one (target, source) matrix, float32."""
        matrix = torch.zeros((self.target_count, self.source_count))
        if self.target_count:
            low, high = self.span(0, self.target_count)
            matrix[:, low:high] = self.block(0, self.target_count)
        return matrix


@lru_cache(maxsize=64)
def placed_weights(source_count: int, target_count: int, scale: float, offset: float, order: Order) -> AxisWeights:
    """Weights for targets at `scale * t + offset` of the source.

    Positions beyond the first and the last voxel have its value; those more than max(1, |scale|) voxels beyond are
    outside.
    """
    positions, outside = placed_positions(source_count, target_count, scale, offset)
    whole = np.rint(positions)
    if order == 0 or np.abs(positions - whole).max(initial=0.0) < ROUNDING:
        # All splines go through the voxels' values, so these are copied whatever the order.
        band = _nearest(whole, source_count)
    else:
        band = _linear(positions, source_count, "mirror") if order == 1 else _cubic(positions, source_count, "mirror")
    return _weights(source_count, *band, outside)


def placed_positions(source_count: int, target_count: int, scale: float, offset: float) -> tuple[Floats, Integers]:
    """Where targets lie on an axis, within [0, source_count - 1], and the targets that are outside."""
    positions = scale * np.arange(target_count) + offset
    reach = max(1.0, abs(scale)) + ROUNDING
    outside = np.flatnonzero((positions < -reach) | (positions > source_count - 1 + reach))
    return np.clip(positions, 0, source_count - 1), outside


@dataclass(frozen=True, eq=False)
class LinearTaps:
    """The two voxels of a source axis around each target voxel, and the second one's part, float32.

    They are one voxel where nothing is interpolated (`is_selection`); otherwise the second follows the first. Targets
    that lie `outside` have the taps of the nearest end.
    """

    low: Integers
    high: Integers
    part: npt.NDArray[np.float32]
    outside: Integers
    is_selection: bool


@lru_cache(maxsize=64)
def linear_taps(source_count: int, target_count: int, scale: float, offset: float, *, exact: bool) -> LinearTaps:
    """Linear interpolation where `placed_weights` has it; `exact` positions are whole, and outside when not there."""
    positions, outside = placed_positions(source_count, target_count, scale, offset)
    whole = np.rint(positions)
    if exact:
        unbounded = np.rint(scale * np.arange(target_count) + offset)
        outside = np.flatnonzero((unbounded < 0) | (unbounded > source_count - 1))
    if exact or source_count == 1 or np.abs(positions - whole).max(initial=0.0) < ROUNDING:
        low = whole.astype(np.int64)
        return LinearTaps(low, low, np.zeros(target_count, np.float32), outside, True)
    low = np.minimum(np.floor(positions).astype(np.int64), source_count - 2)
    return LinearTaps(low, low + 1, (positions - low).astype(np.float32), outside, False)


@lru_cache(maxsize=64)
def resized_weights(source_count: int, target_count: int, order: Order, ends: Ends) -> AxisWeights:
    """Weights for `target_count` voxels over the same stretch as the `source_count`: t at (t + 0.5) n / m - 0.5."""
    positions: Floats = (np.arange(target_count, dtype=np.float64) + 0.5) * (source_count / target_count) - 0.5
    if target_count == source_count:
        band = _nearest(np.arange(source_count), source_count)
    elif order == 0:
        band = _nearest(np.floor(positions + 0.5), source_count)
    else:
        band = _linear(positions, source_count, ends) if order == 1 else _cubic(positions, source_count, ends)
    return _weights(source_count, *band, np.empty(0, np.int64))


def _weights(source_count: int, first: Integers, taps: Floats, outside: Integers) -> AxisWeights:
    narrow = taps.astype(np.float32)
    narrow[outside] = 0.0
    narrow.setflags(write=False)
    return AxisWeights(source_count, first, narrow, outside)


def _nearest(positions: npt.NDArray[np.floating | np.integer], count: int) -> tuple[Integers, Floats]:
    return np.clip(positions.astype(np.int64), 0, count - 1), np.ones((len(positions), 1))


def _linear(positions: Floats, count: int, ends: Ends) -> tuple[Integers, Floats]:
    low = np.floor(positions).astype(np.int64)
    part = positions - low
    return _banded(low, np.stack([1.0 - part, part], axis=1), count, ends)


def _cubic(positions: Floats, count: int, ends: Ends) -> tuple[Integers, Floats]:
    """The four splines about a position, each through the prefilter's impulse response."""
    low = np.floor(positions).astype(np.int64)
    reach = PREFILTER_REACH
    distances = np.arange(-reach, reach + 1)
    response = np.sqrt(3.0) * _POLE ** np.abs(distances)
    taps = np.zeros((len(positions), 4 + 2 * reach))
    for tap in range(-1, 3):
        taps[:, tap + 1 : tap + 2 + 2 * reach] += _spline(positions - (low + tap))[:, None] * response
    return _banded(low - 1 - reach, taps, count, ends)


def _banded(start: Integers, taps: Floats, count: int, ends: Ends) -> tuple[Integers, Floats]:
    """Taps from `start` on, some beyond the axis, as taps of voxels that are there."""
    width = min(taps.shape[1], count)
    first = np.clip(start, 0, count - width)
    rows = np.arange(len(start))
    band = np.zeros((len(start), width))
    for number in range(taps.shape[1]):
        band[rows, _inside(start + number, count, ends) - first] += taps[:, number]
    return first, band


def _inside(places: Integers, count: int, ends: Ends) -> Integers:
    """The voxel whose value a place beyond the axis has."""
    if ends == "edge" or count == 1:
        return np.clip(places, 0, count - 1)
    folded = np.abs(places) % (2 * (count - 1))
    return np.where(folded > count - 1, 2 * (count - 1) - folded, folded)


def _spline(distances: Floats) -> Floats:
    distances = np.abs(distances)
    near = 2.0 / 3.0 - distances**2 + distances**3 / 2.0
    return np.asarray(np.where(distances < 1.0, near, np.clip(2.0 - distances, 0.0, None) ** 3 / 6.0))
