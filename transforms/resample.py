"""Voxels from one Geometry to another: exact where the grids agree, separable interpolation otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from transforms.geometry import AxisMap, Geometry
from transforms.restore import SlabRestorer, slab_axis
from transforms.separable import as_dtype, interpolate
from transforms.shear import move_sheared
from transforms.spline import AxisWeights, Ends, Order, placed_weights, resized_weights

_SLAB_PLANES = 8
"""Planes of scores that are decided together."""

# torch cannot flip these, so their bits are moved as signed integers.
_AS_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def move(
    voxels: Tensor,
    source: Geometry,
    target: Geometry,
    *,
    order: Order = 1,
    fill: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Voxels (C, I, J, K) on `source` to (C, I', J', K') on `target`.

    Where every target centre is a source centre (flip, permute, crop, pad) values are copied, of any dtype.
    Otherwise each axis is interpolated in float32 by its own weights; values beyond the source are its edge's up to
    one target voxel away, and `fill` farther out. Between a sheared grid and an orthogonal one, each slice of the
    sheared grid is shifted within its own plane; nothing is interpolated between slices but for another distance.

    The result is of `dtype`, integers rounded; by default that of the voxels if they are copied, otherwise float32.
    Between grids that are not sheared, hardly more memory is taken than by what goes in and comes out.

    Raises:
        ValueError: the grids are neither parallel nor sheared against each other, `voxels` does not have the shape of
            `source`, or `fill` is infinite for a sheared source.
    """
    if tuple(voxels.shape[1:]) != source.shape:
        raise ValueError(f"voxels of shape {tuple(voxels.shape[1:])} on a grid of {source.shape}")
    axes = source.axis_map(target)
    if axes.is_exact:
        copied = _copy(voxels, axes, target.shape, fill)
        return copied if dtype in (None, copied.dtype) else as_dtype(copied, dtype or copied.dtype)
    if axes.stack_axis is not None:
        moved = move_sheared(voxels, axes, order=order, fill=fill, source_is_sheared=source.is_sheared)
        return as_dtype(moved, dtype or torch.float32)
    turned = voxels.permute(0, *(a + 1 for a in axes.source_axes))
    weights = [
        placed_weights(n, m, scale, offset, order)
        for n, m, scale, offset in zip(turned.shape[1:], target.shape, axes.scales, axes.offsets, strict=True)
    ]
    return interpolate(turned, (weights[0], weights[1], weights[2]), fill=fill, dtype=dtype or torch.float32)


def resize(
    voxels: Tensor,
    shape: Sequence[int],
    *,
    orders: tuple[Order, Order, Order],
    ends: Ends = "mirror",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Voxels (C, I, J, K) to (C, *shape) of `dtype` over the same field of view, each axis by its own order.

    Target voxel t of m lies at (t + 0.5) n / m - 0.5 of an axis of n voxels, as in scipy.ndimage.zoom with
    `grid_mode=True` and skimage.transform.resize without anti-aliasing. `ends` is SciPy's mode: "mirror" is "mirror"
    (skimage's "reflect"), "edge" is "nearest" (skimage's "edge"). Weighed in float32; integers are rounded.

    Raises:
        ValueError: `shape` is not three positive sizes, or `voxels` do not have four axes of at least one voxel.
    """
    if len(shape) != 3 or min(shape) < 1 or voxels.ndim != 4 or min(voxels.shape[1:]) < 1:
        raise ValueError(f"voxels of shape {tuple(voxels.shape)} cannot be resized to {tuple(shape)}")
    i, j, k = (
        resized_weights(n, int(m), order, ends) for n, m, order in zip(voxels.shape[1:], shape, orders, strict=True)
    )
    return interpolate(voxels, (i, j, k), dtype=dtype)


def axis_matrix(source_count: int, target_count: int, scale: float, offset: float, order: Order) -> Tensor:
    """The (target_count, source_count) float32 weights that interpolate one axis at `scale * t + offset`.

    Rows of positions more than max(1, |scale|) voxels outside are zero.
    """
    weights: AxisWeights = placed_weights(source_count, target_count, scale, offset, order)
    return weights.dense()


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

    Scores are interpolated linearly and decided plane by plane (`SlabRestorer`); from a sheared grid, class by class.
    Voxels beyond the source are class 0.

    Raises:
        ValueError: there is no class, or the grids are neither parallel nor sheared against each other.
    """
    if not len(scores):
        raise ValueError("at least one class is needed")
    if _leans_back(source, target):
        # Beyond the source every class has the same fill, and the first of equals wins.
        return _winner(enumerate(s[None] for s in scores), dtype, lambda s: move(s, source, target, order=1))
    return _restored(scores, SlabRestorer(source, target, slab_axis(source, target)), target, dtype)


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
    if not _leans_back(source, target):
        restorer = SlabRestorer(source, target, slab_axis(source, target), painted=painted)
        return _restored(probabilities, restorer, target, dtype)
    classes = torch.zeros((1, *target.shape), dtype=dtype, device=probabilities.device)
    for region, number in zip(probabilities, painted, strict=True):
        inside = move(region[None], source, target, order=1) > 0.5
        classes.masked_fill_(inside, number)
    return classes


def _leans_back(source: Geometry, target: Geometry) -> bool:
    """Whether the move is one from a sheared grid to an orthogonal one."""
    return source.is_sheared and source.axis_map(target).stack_axis is not None


def _restored(scores: Tensor, restorer: SlabRestorer, target: Geometry, dtype: torch.dtype) -> Tensor:
    classes = torch.empty((1, *target.shape), dtype=dtype, device=scores.device)
    for slab in torch.split(scores, _SLAB_PLANES, dim=restorer.axis + 1):
        restorer.add(slab, classes[0])
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
