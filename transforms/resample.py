"""Voxels from one Geometry to another: exact where the grids agree, separable interpolation otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from transforms.geometry import AxisMap, Geometry

Order = Literal[0, 1, 3]
"""0 nearest, 1 linear, 3 exact cubic B-spline."""

_ROUNDING = 1e-6
"""Part of a voxel by which positions that are meant whole come out of matrices inexact."""

# torch cannot flip these, so their bits are moved as signed integers.
_AS_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def move(voxels: Tensor, source: Geometry, target: Geometry, *, order: Order = 1, fill: float = 0.0) -> Tensor:
    """Voxels (C, I, J, K) on `source` to (C, I', J', K') on `target`.

    Where every target centre is a source centre (flip, permute, crop, pad) values are copied, of any dtype.
    Otherwise each axis is interpolated in float32 by its own matrix; values beyond the source are its edge's up to
    one target voxel away, and `fill` farther out. Between a sheared grid and an orthogonal one, each slice of the
    sheared grid is shifted within its own plane; nothing is interpolated between slices but for another distance.

    Raises:
        ValueError: the grids are neither parallel nor sheared against each other, `voxels` does not have the shape of
            `source`, or `fill` is infinite for a sheared source.
    """
    if tuple(voxels.shape[1:]) != source.shape:
        raise ValueError(f"voxels of shape {tuple(voxels.shape[1:])} on a grid of {source.shape}")
    axes = source.axis_map(target)
    if axes.is_exact:
        return _copy(voxels, axes, target.shape, fill)
    if axes.stack_axis is not None:
        return _move_sheared(voxels, axes, order=order, fill=fill, source_is_sheared=source.is_sheared)
    matrices = _axis_matrices(source.shape, target.shape, axes, order)
    moved = _interpolate(voxels.to(torch.float32), axes, matrices)
    return _fill_outside(moved, matrices, fill)


def move_classes(classes: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """A class map (1, I, J, K) to `target`: the class with the highest linearly interpolated share wins.

    Thin structures survive better than under nearest neighbour, and no class number is ever averaged. Voxels beyond
    the source are class 0.
    """
    if source.axis_map(target).is_exact:
        return move(classes, source, target)
    # Classes that are absent have no share anywhere.
    present = np.unique(classes.numpy(force=True)).tolist()
    shares = ((c, (classes == c).to(torch.float32)) for c in dict.fromkeys([0, *present]))
    return _winner(shares, classes.dtype, lambda share: move(share, source, target, order=1))


def move_argmax(scores: Tensor, source: Geometry, target: Geometry, *, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Class scores (C, I, J, K) on `source` to the winning class (1, I', J', K') on `target`.

    One class at a time is interpolated (linearly), so no more than two volumes of scores exist at full size.
    Voxels beyond the source are class 0.
    """
    if source.axis_map(target).is_exact:
        return move(scores.argmax(dim=0, keepdim=True).to(dtype), source, target)
    # Beyond the source every class has the same fill, and the first of equals wins.
    return _winner(enumerate(s[None] for s in scores), dtype, lambda s: move(s, source, target, order=1))


def move_regions(
    probabilities: Tensor,
    painted: Sequence[int],
    source: Geometry,
    target: Geometry,
    *,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Probabilities of regions (R, I, J, K) on `source` to a class map (1, I', J', K') on `target`.

    Region r paints class `painted[r]` wherever its own probability, linearly interpolated, is above a half; later ones
    paint over earlier ones. One region at a time is at full size. Voxels beyond the source are class 0.

    Raises:
        ValueError: not one class a region.
    """
    if len(painted) != len(probabilities):
        raise ValueError(f"found {len(probabilities)} regions that paint {len(painted)} classes")
    classes = torch.zeros((1, *target.shape), dtype=dtype, device=probabilities.device)
    for region, number in zip(probabilities, painted, strict=True):
        inside = move(region[None], source, target, order=1) > 0.5
        classes.masked_fill_(inside, number)
    return classes


def _winner(volumes: Iterable[tuple[int, Tensor]], dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> Tensor:
    best, winner = None, None
    for number, volume in volumes:
        placed = place(volume)
        if best is None or winner is None:
            best, winner = placed, torch.full(placed.shape, number, dtype=dtype, device=placed.device)
            continue
        better = placed > best
        winner = torch.where(better, torch.tensor(number, dtype=dtype, device=placed.device), winner)
        best = torch.where(better, placed, best)
    if winner is None:
        raise ValueError("at least one class is needed")
    return winner


def _move_sheared(voxels: Tensor, axes: AxisMap, *, order: Order, fill: float, source_is_sheared: bool) -> Tensor:
    """Slices are shifted where they lie on the sheared grid: before they are interpolated between, or after."""
    stack = axes.stack_axis or 0
    scale, offset = axes.scales[stack], axes.offsets[stack]
    turned = voxels.permute(0, *(a + 1 for a in axes.source_axes)).movedim(stack + 1, 1).to(torch.float32)
    between = axis_matrix(turned.shape[1], axes.target_shape[stack], scale, offset, order).to(voxels.device)
    if source_is_sheared:
        if not np.isfinite(fill):
            raise ValueError(f"what lies beside a sheared grid is filled with a finite value, found {fill}")
        numbers = (np.arange(turned.shape[1]) - offset) / scale
        moved = torch.tensordot(between, _shift_slices(turned, numbers, axes, order, fill), dims=([1], [1]))
    else:
        moved = torch.tensordot(between, turned, dims=([1], [1])).movedim(0, 1)
        moved = _shift_slices(moved, np.arange(moved.shape[1]), axes, order, fill).movedim(1, 0)
    outside = (between == 0).all(dim=1)
    moved[outside] = fill
    placed: Tensor = moved.movedim(0, 1).movedim(1, stack + 1).contiguous()
    return placed


def _shift_slices(slices: Tensor, numbers: np.ndarray, axes: AxisMap, order: Order, fill: float) -> Tensor:
    """Slices (C, K, A, B) to their places in the target's planes; `numbers` are their positions along its stack."""
    across = [t for t in range(3) if t != axes.stack_axis]
    sizes = [axes.target_shape[t] for t in across]
    shifted = torch.empty((*slices.shape[:2], *sizes), dtype=torch.float32, device=slices.device)
    for k, number in enumerate(numbers):
        offsets = [axes.offsets[t] + axes.shears[t] * number for t in across]
        first, second = (
            torch.from_numpy(_weights(n, m, axes.scales[t], offset, order)).to(slices.device)
            for n, m, t, offset in zip(slices.shape[2:], sizes, across, offsets, strict=True)
        )
        shifted[:, k] = first @ slices[:, k] @ second.T
        shifted[:, k, (first == 0).all(dim=1)] = fill
        shifted[:, k, :, (second == 0).all(dim=1)] = fill
    return shifted


def _copy(voxels: Tensor, axes: AxisMap, shape: tuple[int, int, int], fill: float) -> Tensor:
    if voxels.dtype in _AS_SIGNED:
        signed = _AS_SIGNED[voxels.dtype]
        bits = int(torch.tensor(fill).to(voxels.dtype).view(signed))
        return _copy(voxels.view(signed), axes, shape, bits).view(voxels.dtype)
    turned = voxels.permute(0, *(a + 1 for a in axes.source_axes))
    flips = [t + 1 for t, scale in enumerate(axes.scales) if scale < 0]
    if flips:
        turned = turned.flip(flips)
    # After the flip the first target index lies at `start` of the turned source.
    sizes = turned.shape[1:]
    starts = [round(o) if s > 0 else n - 1 - round(o) for o, s, n in zip(axes.offsets, axes.scales, sizes, strict=True)]
    inside = [(max(0, a), min(n, a + m)) for a, n, m in zip(starts, sizes, shape, strict=True)]
    if all(a == 0 and n == m for a, n, m in zip(starts, sizes, shape, strict=True)):
        return turned.contiguous()
    moved = torch.full((voxels.shape[0], *shape), fill, dtype=voxels.dtype, device=voxels.device)
    if all(low < high for low, high in inside):
        into = tuple(slice(low - a, high - a) for (low, high), a in zip(inside, starts, strict=True))
        taken = tuple(slice(low, high) for low, high in inside)
        moved[:, into[0], into[1], into[2]] = turned[:, taken[0], taken[1], taken[2]]
    return moved


def _axis_matrices(
    source_shape: tuple[int, int, int], target_shape: tuple[int, int, int], axes: AxisMap, order: Order
) -> list[Tensor]:
    return [
        axis_matrix(source_shape[axis], target_shape[t], axes.scales[t], axes.offsets[t], order)
        for t, axis in enumerate(axes.source_axes)
    ]


def _interpolate(voxels: Tensor, axes: AxisMap, matrices: list[Tensor]) -> Tensor:
    moved = voxels.permute(0, *(a + 1 for a in axes.source_axes))
    # The axis that shrinks most goes first, so that later axes have less to do.
    for t in sorted(range(3), key=lambda t: matrices[t].shape[0] / matrices[t].shape[1]):
        matrix = matrices[t].to(voxels.device)
        moved = torch.tensordot(matrix, moved, dims=([1], [t + 1])).movedim(0, t + 1)
    return moved.contiguous()


def _fill_outside(moved: Tensor, matrices: list[Tensor], fill: float) -> Tensor:
    for t, matrix in enumerate(matrices):
        outside = (matrix == 0).all(dim=1)
        if bool(outside.any()):
            moved.index_fill_(t + 1, outside.nonzero()[:, 0].to(moved.device), fill)
    return moved


@lru_cache(maxsize=64)
def axis_matrix(source_count: int, target_count: int, scale: float, offset: float, order: Order) -> Tensor:
    """The (target_count, source_count) float32 weights that interpolate one axis at `scale * t + offset`.

    Rows of positions more than max(1, |scale|) voxels outside are zero.
    """
    return torch.from_numpy(_weights(source_count, target_count, scale, offset, order))


def _weights(source_count: int, target_count: int, scale: float, offset: float, order: Order) -> np.ndarray:
    positions = scale * np.arange(target_count) + offset
    reach = max(1.0, abs(scale)) + 1e-6
    outside = (positions < -reach) | (positions > source_count - 1 + reach)
    positions = np.clip(positions, 0, source_count - 1)
    nearest = np.rint(positions)
    if order == 0 or np.abs(positions - nearest).max() < _ROUNDING:
        # Both splines go through the voxels' values, so these are copied whatever the order.
        weights = _linear_weights(nearest, source_count)
    elif order == 3 and source_count > 1:
        weights = _cubic_weights(positions, source_count)
    else:
        weights = _linear_weights(positions, source_count)
    weights[outside] = 0.0
    return weights.astype(np.float32)


def _linear_weights(positions: np.ndarray, count: int) -> np.ndarray:
    low = np.minimum(np.floor(positions).astype(int), max(count - 2, 0))
    part = positions - low
    rows = np.arange(len(positions))
    weights = np.zeros((len(positions), count))
    weights[rows, low] += 1.0 - part
    weights[rows, np.minimum(low + 1, count - 1)] += part
    return weights


def _cubic_weights(positions: np.ndarray, count: int) -> np.ndarray:
    """Cubic B-spline interpolation with mirrored ends (Unser 1999), prefilter included, as one matrix."""
    coefficients = _prefilter(count)
    low = np.floor(positions).astype(int)
    weights = np.zeros((len(positions), count))
    for tap in range(-1, 3):
        weights += _spline(positions - (low + tap))[:, None] * coefficients[_mirrored(low + tap, count)]
    return weights


@lru_cache(maxsize=8)
def _prefilter(count: int) -> np.ndarray:
    """(count, count): values to the coefficients of the cubic B-spline through them."""
    collocation = np.zeros((count, count))
    places = np.arange(count)
    for tap in range(-1, 2):
        np.add.at(collocation, (places, _mirrored(places + tap, count)), _spline(np.float64(tap)))
    return np.asarray(np.linalg.inv(collocation))


def _spline(distances: np.ndarray | np.float64) -> np.ndarray:
    distances = np.abs(distances)
    near = 2.0 / 3.0 - distances**2 + distances**3 / 2.0
    return np.asarray(np.where(distances < 1.0, near, np.clip(2.0 - distances, 0.0, None) ** 3 / 6.0))


def _mirrored(places: np.ndarray, count: int) -> np.ndarray:
    folded = np.abs(places) % (2 * (count - 1))
    return np.asarray(np.where(folded > count - 1, 2 * (count - 1) - folded, folded))
