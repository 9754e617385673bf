"""The steps of a `Recipe` on a volume and its grid, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from transforms.geometry import Geometry
from transforms.recipe_spec import (
    CropForeground,
    MapPercentiles,
    MapRange,
    Reorient,
    Respace,
    Standardise,
    Step,
    Stretch,
)
from transforms.resample import move
from transforms.spline import Order

SAME_SIDE_MM = 1e-3
"""A voxel's side that differs from the wanted one by no more stays as it is (MONAI, utils/misc.py, AFFINE_TOL)."""


def follow(steps: Sequence[Step], image: Tensor, source: Geometry) -> tuple[Tensor, Geometry]:
    """An image (C, I, J, K) float32 on `source`, and what the steps make of it, on the grid that is given back.

    Raises:
        ValueError: nothing is above 0 where the foreground is to be cropped, or a step says another number of channels.
    """
    grid = source
    for step in steps:
        if isinstance(step, CropForeground):
            target = foreground_grid(image, grid, margin=step.margin)
        else:
            target = next_grid(step, grid)
        if target is not grid:
            order: Order = 0 if isinstance(step, Respace) and step.interpolation == "nearest" else 1
            image, grid = move(image, grid, target, order=order), target
        else:
            image = _change(image, step)
    return image, grid


def largest_grid(steps: Sequence[Step], source: Geometry) -> Geometry:
    """The grid that steps lead to where nothing is cropped away."""
    grid = source
    for step in steps:
        grid = next_grid(step, grid)
    return grid


def next_grid(step: Step, grid: Geometry) -> Geometry:
    """Where a step that does not look at the voxels moves them; the same object where it does not move them."""
    match step:
        case Reorient():
            return grid.oriented(step.axis_codes)
        case Respace():
            return _respaced(grid, step)
        case _:
            return grid


def foreground_grid(image: Tensor, grid: Geometry, *, margin: int) -> Geometry:
    """The part of a grid around what is above 0 in any channel.

    Raises:
        ValueError: nothing is.
    """
    found = (image > 0).any(dim=0)
    starts, sizes = [], []
    for axis, side in enumerate(grid.shape):
        others = [a for a in range(3) if a != axis]
        places = found.any(dim=others[1]).any(dim=others[0]).nonzero()[:, 0]
        if not len(places):
            raise ValueError("no voxel is above 0, so there is no foreground to crop to")
        first, end = max(0, int(places[0]) - margin), min(side, int(places[-1]) + 1 + margin)
        starts.append(first)
        sizes.append(end - first)
    return grid.window(starts, sizes)


def _respaced(grid: Geometry, step: Respace) -> Geometry:
    """The lattice of the new sides from the first voxel on, as many as reach nearest to the last one's centre."""
    own = grid.spacing_mm
    pairs = zip(step.spacing_mm, own, strict=True)
    wanted = [mm if side is None or abs(side - mm) <= SAME_SIDE_MM else side for side, mm in pairs]
    if tuple(wanted) == own:
        return grid
    ratios = np.asarray(wanted) / np.asarray(own)
    shape = [round((n - 1) / ratio + 1) for n, ratio in zip(grid.shape, ratios, strict=True)]
    affine = grid.affine_ras.copy()
    affine[:3, :3] *= ratios
    return Geometry((shape[0], shape[1], shape[2]), affine)


def _change(image: Tensor, step: Step) -> Tensor:
    """A step on values alone; each channel by itself where it says so."""
    match step:
        case MapRange():
            return _mapped(image, step.source, step.target, clip=step.clip)
        case MapPercentiles():
            return _each(image, step.channel_wise, lambda part, _: _from_percentiles(part, step))
        case Stretch():
            return _each(image, step.channel_wise, lambda part, _: _stretched(part, step.target))
        case Standardise():
            return _each(image, step.channel_wise, lambda part, n: _standardised(part, step, n))
        case _:
            return image


def _each(image: Tensor, channel_wise: bool, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    if not channel_wise:
        return change(image, 0)
    return torch.stack([change(channel, number) for number, channel in enumerate(image)])


def _mapped(image: Tensor, source: tuple[float, float], target: tuple[float, float] | None, *, clip: bool) -> Tensor:
    unit = (image - source[0]) / (source[1] - source[0])
    if target is None:
        return unit
    mapped = unit * (target[1] - target[0]) + target[0]
    return mapped.clamp(*target) if clip else mapped


def _from_percentiles(part: Tensor, step: MapPercentiles) -> Tensor:
    low, high = np.percentile(part.numpy(force=True), step.percentiles)
    if low == high:
        return part - float(low) + (step.target[0] if step.target else 0.0)
    return _mapped(part, (float(low), float(high)), step.target, clip=step.clip)


def _stretched(part: Tensor, target: tuple[float, float]) -> Tensor:
    low, high = part.min(), part.max()
    if low == high:
        return part * target[0]
    return (part - low) / (high - low) * (target[1] - target[0]) + target[0]


def _standardised(part: Tensor, step: Standardise, number: int) -> Tensor:
    chosen = part != 0 if step.nonzero else None
    measured = part if chosen is None else part[chosen]
    if not measured.numel():
        return part
    mean = float(measured.mean()) if step.mean is None else _given(step.mean, number)
    deviation = float(measured.std(correction=0)) if step.deviation is None else _given(step.deviation, number)
    changed = (part - mean) / (deviation or 1.0)
    return changed if chosen is None else torch.where(chosen, changed, part)


def _given(values: tuple[float, ...], number: int) -> float:
    if number >= len(values):
        raise ValueError(f"channel {number} has no value among the {len(values)} given to standardise by")
    return values[number]
