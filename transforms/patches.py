"""Where patches lie: class-aware sampling for training, overlapping tiles and their weights for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VOXELS_PER_CLASS = 10_000
"""At most this many positions of each class are remembered for sampling."""

GAUSSIAN_SIGMA = 0.125
"""Sigma of the blending weight, as part of the patch side (nnU-Net, Isensee et al. 2021)."""

SMALLEST_WEIGHT = 1e-3
"""Blending weights never fall below this part of the centre's, so that corners are defined."""


def class_positions(classes: npt.NDArray[np.uint8 | np.uint16], *, class_count: int) -> npt.NDArray[np.int32]:
    """Voxels (N, 4) of every class but background, columns class, i, j, k; large classes are thinned evenly.

    Where some voxels are to be ignored (class `class_count`), there are rows of class 0 as well, before the others: of
    all voxels that count, the background among them.
    """
    foreground = np.flatnonzero(classes)
    found = classes.reshape(-1)[foreground]
    rows = []
    if bool((found == class_count).any()):
        rows.append(_rows(0, np.flatnonzero(classes != class_count), classes.shape))
    rows += [_rows(label, foreground[found == label], classes.shape) for label in range(1, class_count)]
    return np.concatenate(rows).astype(np.int32) if rows else np.empty((0, 4), np.int32)


def _rows(label: int, places: npt.NDArray[np.intp], shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    places = places[:: max(1, -(-len(places) // VOXELS_PER_CLASS))]
    ijk = np.stack(np.unravel_index(places, shape), axis=1)
    return np.concatenate([np.full((len(places), 1), label), ijk], axis=1)


def draw_centre(
    random: np.random.RandomState,
    shape: Sequence[int],
    patch_shape: Sequence[int],
    *,
    positions: npt.NDArray[np.int32],
    foreground_share: float,
) -> npt.NDArray[np.float64]:
    """Centre (3,) of a patch in voxel indices, inside the volume as far as the volume is large enough.

    With probability `foreground_share` it is drawn about a voxel of a class that is chosen evenly among those present;
    `positions` are ordered by class, as `class_positions` gives them. Otherwise it is drawn about any voxel, but if
    `positions` has rows of class 0, about one of those, because the volume holds voxels that do not count.
    """
    size, patch = np.asarray(shape), np.asarray(patch_shape)
    counted = int(np.searchsorted(positions[:, 0], 0, side="right"))
    if len(positions) > counted and random.random_sample() < foreground_share:
        classes = positions[counted:, 0]
        ends = [counted, *(np.flatnonzero(np.diff(classes)) + 1 + counted), len(positions)]
        chosen = random.randint(len(ends) - 1)
        wanted = positions[random.randint(ends[chosen], ends[chosen + 1]), 1:].astype(np.float64)
    elif counted:
        wanted = positions[random.randint(counted), 1:].astype(np.float64)
    else:
        wanted = random.random_sample(3) * (size - 1)
    # Half-integer centres of even patches keep unrotated patches on voxel centres.
    start = np.rint(wanted - (patch - 1) / 2)
    room = size - patch
    start = np.where(room > 0, np.clip(start, 0, np.maximum(room, 0)), np.ceil(room / 2))  # as `padding_to` has it
    return np.asarray(start + (patch - 1) / 2)


def tile_starts(
    shape: Sequence[int], patch_shape: Sequence[int], *, step: float, spread: bool = True
) -> list[tuple[int, int, int]]:
    """First voxels of tiles that cover a volume at least as large as the patch.

    Neighbouring tiles are at most `step` of a patch apart, rounded up to whole voxels, and evenly so; if not `spread`,
    they are just that far apart, rounded down, but the last, which ends with the volume (`sliding_window_inference` of
    MONAI).

    Raises:
        ValueError: the volume is smaller than the patch.
    """
    per_axis = []
    for size, side in zip(shape, patch_shape, strict=True):
        if size < side:
            raise ValueError(f"a volume of {tuple(shape)} is smaller than the patch {tuple(patch_shape)}; pad it first")
        if not spread:
            per_axis.append([*range(0, size - side, max(1, int(side * step))), size - side])
            continue
        count = int(np.ceil((size - side) / max(1.0, side * step))) + 1
        per_axis.append(sorted({round(x) for x in np.linspace(0, size - side, count)}))
    return [(i, j, k) for i, j, k in product(*per_axis)]


def blending_weights(patch_shape: Sequence[int]) -> Tensor:
    """Gaussian (I, J, K) float32, 1 at the centre and nowhere below `SMALLEST_WEIGHT`: tiles count most where they
    see most."""
    weights = torch.ones(1, 1, 1)
    for axis, side in enumerate(patch_shape):
        offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
        profile = torch.exp(-0.5 * (offsets / (GAUSSIAN_SIGMA * side)) ** 2)
        weights = weights * profile.reshape([-1 if a == axis else 1 for a in range(3)])
    return (weights / weights.max()).clamp_min(SMALLEST_WEIGHT).to(torch.float32)


def nnunet_weights(patch_shape: Sequence[int]) -> Tensor:
    """Gaussian (I, J, K) float32 as nnU-Net v2 has it (inference/sliding_window_prediction.py, `compute_gaussian`).

    It is 10 at voxel side // 2 of each axis and rounded to half precision; what that rounds to 0 has the smallest
    value that is left.
    """
    weights = np.ones((1, 1, 1))
    for axis, side in enumerate(patch_shape):
        offsets = np.arange(side) - side // 2
        profile = np.exp(-0.5 * (offsets / (GAUSSIAN_SIGMA * side)) ** 2)
        weights = weights * profile.reshape([-1 if a == axis else 1 for a in range(3)])
    rounded = (10.0 * weights).astype(np.float16)
    rounded[rounded == 0] = rounded[rounded > 0].min()
    return torch.from_numpy(rounded.astype(np.float32))


def padding_to(shape: Sequence[int], patch_shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Voxels to add before and after each axis so that a patch fits, as even as possible."""
    missing = [max(0, p - n) for n, p in zip(shape, patch_shape, strict=True)]
    return tuple((m // 2, m - m // 2) for m in missing)
