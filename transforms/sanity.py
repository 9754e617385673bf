"""What every reader asks of a volume before it takes memory, and of its voxels afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.errors import VolumeError
from transforms.geometry import Geometry

MAX_VOXELS = 2**31
"""Volumes beyond this (8 GiB as float32) are taken for a damaged header."""

GZIP_RATIO = 1032
"""Deflate cannot pack a byte into less than this part of one (RFC 1951: 258 bytes in two bits)."""

LABEL_TYPES = (np.uint8, np.int16, np.int32, np.int64)
"""Integer types of label maps, narrowest first; torch has no arithmetic on wider unsigned ones."""


def refuse_oversize(shape: tuple[int, ...], path: Path) -> None:
    """Refuse before memory is touched.

    Raises:
        VolumeError: a size below one, or more than `MAX_VOXELS` voxels.
    """
    sizes = "x".join(str(n) for n in shape)
    if min(shape) < 1:
        raise VolumeError(f"{path}: the header names a grid of {sizes} voxels; every size must be at least 1")
    if math.prod(shape) > MAX_VOXELS:
        raise VolumeError(f"{path}: the header names {sizes} voxels, more than {MAX_VOXELS}; is it damaged?")


def refuse_short_file(needed: int, present: int, path: Path, *, packed: bool = False) -> None:
    """Refuse a file that cannot hold the `needed` bytes of voxels which its header promises.

    Raises:
        VolumeError: `present` bytes are too few, also when `packed` by gzip.
    """
    if needed > present * (GZIP_RATIO if packed else 1):
        kind = "compressed bytes" if packed else "bytes"
        raise VolumeError(
            f"{path}: the header promises {needed} bytes of voxels, the file has {present} {kind}; "
            "it is cut short or damaged: fetch it again"
        )


def usable_grid(geometry: Geometry) -> Geometry:
    """The grid, at right angles or sheared as a tilted scan is.

    Raises:
        ValueError: no two axes are at right angles, as after an affine registration, or the orthogonal grid around
            it would have more than `MAX_VOXELS` voxels.
    """
    if math.prod(geometry.orthogonal().shape) > MAX_VOXELS:
        raise ValueError(f"sheared too much for its size: {geometry.describe()}")
    return geometry


def finite_float32(voxels: npt.NDArray[Any], path: Path) -> npt.NDArray[np.float32]:
    """Voxels as float32.

    Raises:
        VolumeError: any is NaN or infinite (or too large for float32), with their count.
    """
    with np.errstate(over="ignore"):
        converted = voxels.astype(np.float32, copy=False)
    refuse_not_finite(converted.size - int(np.count_nonzero(np.isfinite(converted))), converted.size, path)
    return converted


def refuse_not_finite(bad: int, size: int, path: Path) -> None:
    """Raise VolumeError if `bad`, of `size` voxels those that are NaN or infinite, are any."""
    if bad:
        raise VolumeError(
            f"{path}: {bad} of {size} voxels are NaN or infinite; replace them by a value that means background"
        )


def integral_labels(voxels: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """Label values as the narrowest of `LABEL_TYPES` that holds them; floats are accepted when they are whole.

    Raises:
        VolumeError: fractions, NaN or infinity (their count and an example), or values beyond 64 bits.
    """
    if voxels.dtype.kind == "f":
        whole = np.isfinite(voxels) & (voxels == np.rint(voxels))
        if not whole.all():
            raise VolumeError(_fraction_message(voxels[~whole], voxels.size, path))
    lowest, highest = voxels.min().item(), voxels.max().item()
    for dtype in LABEL_TYPES:
        limits = np.iinfo(dtype)
        if limits.min <= lowest and highest <= limits.max:
            return voxels.astype(dtype)
    raise VolumeError(f"{path}: label values from {lowest:g} to {highest:g} are no label numbers")


def _fraction_message(bad: npt.NDArray[Any], count: int, path: Path) -> str:
    return (
        f"{path}: {bad.size} of {count} label voxels are not whole numbers, {bad[0]:g} for one; labels must be "
        "resampled with nearest neighbour, or this is not a label map"
    )
