"""Interpolation of a volume along its three axes, slab by slab: hardly more memory than what goes in and comes out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from transforms.spline import AxisWeights

Weights = tuple[AxisWeights, AxisWeights, AxisWeights]

SPARE_SHARE = 0.05
"""Of the bytes that go in and come out, what the work in between may take; as much again is left to allocators."""

MOST_PLANES, LEAST_PLANES = 32, 4
"""Target planes in a slab: more share the prefilter's reach, fewer fit in caches."""

BLOCK = 32
"""Target voxels of an axis that are worked out together from the source voxels they reach."""

_CHUNK_BYTES = 2 << 20


@torch.no_grad()
def interpolate(voxels: Tensor, weights: Weights, *, fill: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Voxels (C, I, J, K) of any dtype and strides to (C, I', J', K') of `dtype`, weighed in float32 along each axis.

    Voxels that are outside on any axis are `fill`. Integers are rounded, and kept within their dtype's range.
    """
    shape = [w.target_count for w in weights]
    moved = torch.empty((len(voxels), *shape), dtype=dtype, device=voxels.device)
    planes = _planes_of_slab(voxels[:1], moved[:1])
    for source, target in zip(voxels, moved, strict=True):
        for start in range(0, shape[0], planes):
            stop = min(start + planes, shape[0])
            slab = _along_first(source, weights[0], start, stop)
            _finish(slab, weights, target[start:stop])
    for axis, w in enumerate(weights):
        if len(w.outside):
            moved.index_fill_(axis + 1, torch.from_numpy(w.outside).to(moved.device), fill)
    return moved


def as_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float values in another dtype: integers rounded and kept within its range."""
    if dtype.is_floating_point:
        return values.to(dtype)
    if dtype == torch.bool:
        return values > 0.5
    limits = torch.iinfo(dtype)
    return values.round().double().clamp_(limits.min, limits.max).to(dtype)


def _planes_of_slab(source: Tensor, target: Tensor) -> int:
    spare = SPARE_SHARE * (source.numel() * source.element_size() + target.numel() * target.element_size())
    plane = 4 * max(source[0, 0].numel(), target[0, 0].numel())
    return max(LEAST_PLANES, min(MOST_PLANES, int(spare / plane)))


def _along_first(source: Tensor, weights: AxisWeights, start: int, stop: int) -> Tensor:
    """Target planes [start, stop) of (I, J, K), not yet interpolated within: float32."""
    if weights.is_selection:
        chosen = torch.from_numpy(weights.first[start:stop]).to(source.device)
        return source.index_select(0, chosen).to(torch.float32).contiguous()
    low, high = weights.span(start, stop)
    matrix = weights.block(start, stop).to(source.device)
    slab = torch.empty((stop - start, *source.shape[1:]), device=source.device)
    for rows in _row_chunks(source[low:high]):
        columns = source[low:high, rows].to(torch.float32).reshape(high - low, -1)
        torch.mm(matrix, columns, out=slab[:, rows].view(stop - start, -1))
    return slab


def _row_chunks(planes: Tensor) -> Iterator[slice]:
    """Rows of (planes, J, K) that are converted and weighed at a time; all of them where nothing is converted."""
    rows = planes.shape[1]
    step = max(1, _CHUNK_BYTES // max(1, 4 * planes.shape[0] * planes.shape[2]))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _finish(slab: Tensor, weights: Weights, target: Tensor) -> None:
    """Planes (n, J, K) float32 into planes (n, J', K') of the target, the axis that shrinks more first."""
    if weights[1].growth <= weights[2].growth:
        found = _along_last(_along_middle(slab, weights[1]), weights[2])
    else:
        found = _along_middle(_along_last(slab, weights[2]), weights[1])
    target.copy_(found if target.dtype == torch.float32 else as_dtype(found, target.dtype))


def _along_middle(planes: Tensor, weights: AxisWeights) -> Tensor:
    if weights.is_identity:
        return planes
    if weights.is_selection:
        return planes.index_select(1, torch.from_numpy(weights.first).to(planes.device))
    moved = torch.empty((len(planes), weights.target_count, planes.shape[2]), device=planes.device)
    for start in range(0, weights.target_count, BLOCK):
        stop = min(start + BLOCK, weights.target_count)
        low, high = weights.span(start, stop)
        matrix = weights.block(start, stop).to(planes.device).expand(len(planes), -1, -1)
        torch.bmm(matrix, planes[:, low:high], out=moved[:, start:stop])
    return moved


def _along_last(planes: Tensor, weights: AxisWeights) -> Tensor:
    if weights.is_identity:
        return planes
    if weights.is_selection:
        return planes.index_select(2, torch.from_numpy(weights.first).to(planes.device))
    rows = planes.view(-1, planes.shape[2])
    moved = torch.empty((len(rows), weights.target_count), device=planes.device)
    for start in range(0, weights.target_count, BLOCK):
        stop = min(start + BLOCK, weights.target_count)
        low, high = weights.span(start, stop)
        torch.mm(rows[:, low:high], weights.block(start, stop).to(planes.device).T, out=moved[:, start:stop])
    return moved.view(*planes.shape[:2], -1)
