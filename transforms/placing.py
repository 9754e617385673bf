"""A study onto a network's grid the way nnU-Net v2 does it: crop to what is not 0, normalise, resize.

Its grids lie over the same field of view as the study, cropped, in other voxels; so that what a network says is moved
back as between any two grids. Where nnU-Net takes the nearest slice, the slices of the result are chosen at the end:
the nearest of the winning classes is the winner of the nearest scores.

Facts from MIC-DKFZ/nnUNet: nnunetv2/preprocessing/cropping/cropping.py, preprocessors/default_preprocessor.py,
resampling/default_resampling.py, and inference/export_prediction.py for the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transforms.geometry import Geometry
from transforms.intensity import normalise_channels
from transforms.intensity_spec import Normalisation
from transforms.placing_spec import Placing, Resizing
from transforms.resample import move, resize

SAME_SIDE = 1e-6
"""Voxel sides that differ by less than this part are as long as each other; files hold them in single precision."""

SINGLE = 2.0**-24
"""Part by which a number is off in single precision, in which NIfTI has spacings and the directions times these."""

Spacing = tuple[float, float, float]
Triple = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Placed:
    """An image (C, I, J, K) float32 on `grid`.

    `box` is the part of the study that it shows, on the study's own lattice. `field` is where what the network says is
    to be moved to, linearly: the box, but with the grid's slices where the nearest one is to be taken for each.
    """

    image: Tensor
    grid: Geometry
    field: Geometry
    box: Geometry


def place(
    channels: Tensor,
    source: Geometry,
    placing: Placing,
    *,
    axis_codes: str,
    spacing_mm: Spacing,
    normalisations: Sequence[Normalisation],
) -> Placed:
    """Channels (C, I, J, K) on `source` as a network of nnU-Net's wants them.

    Raises:
        ValueError: every voxel is 0, or a channel cannot be normalised.
    """
    turned = turned_grid(source, placing, axis_codes)
    channels = move(channels, source, turned) if placing.reorients else channels
    start, shape = nonzero_box(channels)
    box = turned.window(start, shape)
    inside = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
    cropped = channels[(slice(None), *inside)]
    body = body_of(cropped) if any(how.kind == "inside" for how in normalisations) else None
    image = normalise_channels(cropped, normalisations, inside=body)
    own_mm, spacing_mm = header_spacing(box), kept_spacing(spacing_mm, box, placing)
    grid = box.reshaped(resized_shape(box, spacing_mm))
    across = axis_across(placing.image, own_mm, spacing_mm)
    return Placed(
        resize_as(image, grid.shape, placing.image, across=across),
        grid,
        _field(box, grid, placing.scores, axis_across(placing.scores, spacing_mm, own_mm)),
        box,
    )


def put_back(classes: Tensor, field: Geometry, box: Geometry, source: Geometry) -> Tensor:
    """Classes (1, I, J, K) on a `Placed.field` to the study's whole grid; what was cut off is class 0.

    Raises:
        ValueError: the voxels of `box` are not some of those of `source`, so that classes would be averaged.
    """
    if not box.axis_map(source).is_exact:
        raise ValueError(f"classes cannot be copied from {box.describe()} to {source.describe()}")
    for axis, (found, wanted) in enumerate(zip(field.shape, box.shape, strict=True)):
        if found != wanted:
            classes = classes.index_select(axis + 1, nearest_planes(found, wanted).to(classes.device))
    return move(classes, box, source)


def placed_grid(source: Geometry, placing: Placing, *, axis_codes: str, spacing_mm: Spacing) -> Geometry:
    """The grid of a study of which nothing is cut off: no study on `source` has more voxels."""
    turned = turned_grid(source, placing, axis_codes)
    return turned.reshaped(resized_shape(turned, kept_spacing(spacing_mm, turned, placing)))


def turned_grid(source: Geometry, placing: Placing, axis_codes: str) -> Geometry:
    """The study's voxels with axes in the network's order; slices that lean stay so, as in nnU-Net's readers."""
    return source.oriented(axis_codes) if placing.reorients else source


def kept_spacing(spacing_mm: Spacing, box: Geometry, placing: Placing) -> Spacing:
    """The grid's spacing (about; sides are whole voxels), with the study's own along the axis that keeps it."""
    own_mm = header_spacing(box)
    i, j, k = (own_mm[a] if a == placing.kept_axis else spacing_mm[a] for a in range(3))
    return i, j, k


def nonzero_box(channels: Tensor) -> tuple[Triple, Triple]:
    """First voxel and shape of the smallest box around what is not 0 in some channel of (C, I, J, K).

    Raises:
        ValueError: every voxel is 0.
    """
    found = (channels != 0).any(dim=0)
    starts, sizes = [], []
    for axis in range(3):
        other = [a for a in range(3) if a != axis]
        places = found.any(dim=other[1]).any(dim=other[0]).nonzero()[:, 0]
        if not len(places):
            raise ValueError("every voxel is 0, so there is nothing to see")
        starts.append(int(places[0]))
        sizes.append(int(places[-1]) + 1 - int(places[0]))
    return (starts[0], starts[1], starts[2]), (sizes[0], sizes[1], sizes[2])


def body_of(channels: Tensor) -> Tensor:
    """What of (C, I, J, K) is not 0 in some channel, with the holes in it that nothing leads to by faces: bool."""
    found = (channels != 0).any(dim=0).numpy(force=True)
    if found.all():
        return torch.from_numpy(found).to(channels.device)
    from scipy.ndimage import label

    parts, count = label(~found)
    open_parts = np.zeros(count + 1, dtype=bool)
    for axis in range(3):
        for end in (0, -1):
            open_parts[np.unique(np.take(parts, end, axis=axis))] = True
    open_parts[0] = False
    return torch.from_numpy(~open_parts[parts]).to(channels.device)


def resized_shape(box: Geometry, spacing_mm: Spacing) -> Triple:
    """Whole voxels of about `spacing_mm` along each side of a box, halves to even, at least one."""
    own_mm = header_spacing(box)
    i, j, k = (max(1, round(own / wanted * n)) for own, wanted, n in zip(own_mm, spacing_mm, box.shape, strict=True))
    return i, j, k


def header_spacing(box: Geometry) -> Spacing:
    """A study's spacing as its file's header says it: what nnU-Net decides by."""
    i, j, k = (written_mm(mm) for mm in box.spacing_mm)
    return i, j, k


def written_mm(spacing_mm: float) -> float:
    """The spacing that a file's header says, of which the length of an axis in its affine is off by a rounding.

    4.5 mm along an oblique axis of a NIfTI may come out as 4.5000001, and 11 such slices as 17 of 3 mm, not as 16.
    """
    for digits in (6, 7, 8):
        decimal = float(f"{spacing_mm:.{digits}g}")
        if abs(decimal - spacing_mm) <= 1e-12 * spacing_mm:
            return decimal
        if abs(decimal - spacing_mm) <= 1.1 * SINGLE * spacing_mm:
            return float(np.float32(decimal))
    return spacing_mm


def axis_across(how: Resizing, from_mm: Spacing, to_mm: Spacing) -> int | None:
    """The axis across slices if these are to be resized by themselves: the only longest side of a voxel."""
    if how.separate is False:
        return None
    deciding = [from_mm] if how.separate else [mm for mm in (from_mm, to_mm) if max(mm) / min(mm) > how.anisotropy]
    if not deciding:
        return None
    longest = [axis for axis, mm in enumerate(deciding[0]) if mm > max(deciding[0]) * (1 - SAME_SIDE)]
    return longest[0] if len(longest) == 1 else None


def resize_as(voxels: Tensor, shape: Triple, how: Resizing, *, across: int | None) -> Tensor:
    """Voxels (C, I, J, K) to (C, *shape); splines ring no farther than the values of the volume, or of each slice if
    these are resized by themselves along the axis `across`."""
    if tuple(voxels.shape[1:]) == tuple(shape):
        return voxels
    between = [n if axis == across else m for axis, (n, m) in enumerate(zip(voxels.shape[1:], shape, strict=True))]
    within = (1, 2, 3) if across is None else tuple(a for a in (1, 2, 3) if a != across + 1)
    found = resize(voxels, between, orders=(how.order,) * 3, ends="edge")
    if how.order == 3:
        found = torch.minimum(
            torch.maximum(found, voxels.amin(within, keepdim=True)), voxels.amax(within, keepdim=True)
        )
    if across is None or between[across] == shape[across]:
        return found
    return resize(found, shape, orders=(how.order_across,) * 3, ends="edge")


def nearest_planes(found: int, wanted: int) -> Tensor:
    """For each of `wanted` slices over the same stretch, the nearest of `found` ones; of two, the one after."""
    places = torch.arange(wanted, dtype=torch.float64).add_(0.5).mul_(found / wanted).floor_()
    return places.clamp_(0, found - 1).to(torch.int64)


def _field(box: Geometry, grid: Geometry, how: Resizing, across: int | None) -> Geometry:
    """Where scores are moved to linearly, so that `put_back` ends what `how` says."""
    if across is None or how.order_across != 0:
        return box
    i, j, k = (g if axis == across else b for axis, (g, b) in enumerate(zip(grid.shape, box.shape, strict=True)))
    return box.reshaped((i, j, k))
