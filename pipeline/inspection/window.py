"""The part of a volume that a look inside a network is made through: one patch around the object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.tiling import Triple, overlap
from transforms.channels import channel_minima
from transforms.geometry import Geometry
from transforms.sampling import filled


@dataclass(frozen=True, eq=False)
class Window:
    """A patch: `image` (C, I, J, K), `classes` (I, J, K) where they are known, and where it lies.

    `centre_ijk` is a voxel of the object; the middle of the patch where there is none.
    """

    image: Tensor
    classes: Tensor | None
    geometry: Geometry
    centre_ijk: Triple


def window_of(
    image: Tensor, classes: Tensor | None, geometry: Geometry, patch_shape: Sequence[int], *, class_count: int
) -> Window:
    """The patch around the middle of all that is labelled, as far inside the image as it fits.

    `image` (C, I, J, K) and `classes` (I, J, K) are on `geometry`; 0 is the background, and what is not below
    `class_count` is ignored. The middle is the labelled voxel that is nearest to the median of them all, so that it
    lies in the object whatever that looks like; where nothing is labelled, it is the middle of the image. What lies
    beyond the image is its lowest value, as in prediction, and background.
    """
    shape = _triple(patch_shape)
    labelled = None if classes is None else (classes > 0) & (classes < class_count)
    centre = _middle(labelled, geometry.shape)
    start = _triple([_start(c, side, of) for c, side, of in zip(centre, shape, geometry.shape, strict=True)])
    inside, volume = overlap(start, shape, geometry.shape)
    patch = filled((image.shape[0], *shape), channel_minima(image), dtype=image.dtype, device=image.device)
    patch[(slice(None), *inside)] = image[(slice(None), *volume)]
    known = None
    if classes is not None:
        known = classes.new_zeros(shape)
        known[inside] = classes[volume]
    here = _triple([c - s for c, s in zip(centre, start, strict=True)])
    return Window(patch, known, geometry.window(start, shape), here)


def _middle(labelled: Tensor | None, shape: Triple) -> Triple:
    if labelled is None or not bool(labelled.any()):
        return _triple([side // 2 for side in shape])
    positions = torch.nonzero(labelled)
    distances = (positions - positions.median(dim=0).values).square().sum(dim=1)
    return _triple(positions[int(distances.argmin())].tolist())


def _start(centre: int, side: int, of: int) -> int:
    """Where a window of `side` voxels begins; one that is larger than the image has the image in its middle."""
    return min(max(0, centre - side // 2), of - side) if of >= side else -((side - of) // 2)


def _triple(values: Sequence[int]) -> Triple:
    i, j, k = values
    return int(i), int(j), int(k)
