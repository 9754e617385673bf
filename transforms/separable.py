"""Interpolation of a volume along its three axes, slab by slab: hardly more memory than what goes in and comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from transforms.spline import AxisWeights

Weights = tuple[AxisWeights, AxisWeights, AxisWeights]

SPARE_SHARE = 0.03
"""Of the bytes that go in and come out, what a slab may take; as much again is left to what is done within it."""

MOST_PLANES, LEAST_PLANES = 32, 4
"""Target planes in a slab: more share the prefilter's reach, fewer fit in caches."""

CHUNK_SHARE, MOST_CHUNK_BYTES = 0.004, 1 << 20
"""What is worked out at a time within a slab, of the same bytes; and so that it stays in a core's cache."""


@torch.no_grad()
def interpolate(voxels: Tensor, weights: Weights, *, fill: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Voxels (C, I, J, K) of any dtype and strides to (C, I', J', K') of `dtype`, weighed in float32 along each axis.

    Voxels that are outside on any axis are `fill`. Integers are rounded, and kept within their dtype's range.
    """
    shape = [w.target_count for w in weights]
    moved = torch.empty((len(voxels), *shape), dtype=dtype, device=voxels.device)
    in_and_out = sum(v[0].numel() * v.element_size() for v in (voxels, moved)) if len(voxels) else 0
    largest_plane = 4 * max(math.prod(voxels.shape[2:]), math.prod(shape[1:]))
    planes = max(LEAST_PLANES, min(MOST_PLANES, int(SPARE_SHARE * in_and_out / largest_plane)))
    chunk = min(MOST_CHUNK_BYTES, int(CHUNK_SHARE * in_and_out))
    room = torch.empty((planes, *voxels.shape[2:]), device=voxels.device)
    for source, target in zip(voxels, moved, strict=True):
        for start in range(0, shape[0], planes):
            stop = min(start + planes, shape[0])
            slab = room[: stop - start]
            _along_first(source, weights[0], start, slab, chunk=chunk)
            _finish(slab, weights, target[start:stop], chunk=chunk)
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
    # Float32 holds the limits of up to 16 bits.
    rounded = values.round() if limits.bits <= 16 else values.double().round_()
    return rounded.clamp_(limits.min, limits.max).to(dtype)


def _along_first(source: Tensor, weights: AxisWeights, start: int, slab: Tensor, *, chunk: int) -> None:
    """Target planes from `start` on of (I, J, K), not yet interpolated within."""
    stop = start + len(slab)
    if weights.is_selection:
        for into, number in zip(slab, weights.first[start:stop].tolist(), strict=True):
            into.copy_(source[number])
        return
    low, high = weights.span(start, stop)
    matrix = weights.block(start, stop).to(source.device)
    for rows in _parts(source.shape[1], chunk // (4 * (high - low) * source.shape[2])):
        columns = source[low:high, rows].to(torch.float32).reshape(high - low, -1)
        torch.mm(matrix, columns, out=slab[:, rows].view(len(slab), -1))


def _parts(count: int, step: int) -> Iterator[slice]:
    """`step` of `count` at a time, at least one."""
    step = max(1, step)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _finish(slab: Tensor, weights: Weights, target: Tensor, *, chunk: int) -> None:
    """Planes (n, J, K) float32 into planes (n, J', K') of the target, the axis that shrinks more first."""
    steps = [(1, weights[1]), (2, weights[2])]
    steps = sorted((step for step in steps if not step[1].is_identity), key=lambda step: step[1].growth)
    for numbers in _parts(len(slab), chunk // (4 * max(slab[0].numel(), target[0].numel()))):
        planes = slab[numbers]
        for axis, w in steps:
            direct = (axis, w) == steps[-1] and target.dtype == torch.float32
            planes = _along(planes, axis, w, target[numbers] if direct else None)
        if planes.data_ptr() != target[numbers].data_ptr():
            target[numbers] = as_dtype(planes, target.dtype)


def _along(planes: Tensor, axis: int, weights: AxisWeights, into: Tensor | None) -> Tensor:
    """Planes (n, J, K) interpolated along J or K (axis 1 or 2)."""
    if into is None:
        shape = [*planes.shape[:axis], weights.target_count, *planes.shape[axis + 1 :]]
        into = torch.empty(shape, device=planes.device)
    if weights.is_selection:
        chosen = torch.from_numpy(weights.first).to(planes.device)
        return torch.index_select(planes, axis, chosen, out=into)
    for targets, sources, block in weights.blocks:
        matrix = block.to(planes.device)
        if axis == 1:
            torch.bmm(matrix.expand(len(planes), -1, -1), planes[:, sources], out=into[:, targets])
        else:
            torch.mm(_rows(planes)[:, sources], matrix.T, out=_rows(into)[:, targets])
    return into


def _rows(planes: Tensor) -> Tensor:
    return planes.view(-1, planes.shape[2])
