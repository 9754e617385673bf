"""Which windows hold nothing to segment: those darker than any that held a label in a model's own training cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

from pipeline.cache_entry import PreparedCase

PARTS = 8
"""Blocks along a side of the patch, by whose highest values windows are judged. A window that begins anywhere counts as
the blocks that it holds whole, so what is found is never above what windows voxel by voxel would give."""


SHARE = 1 / 8
"""More than noise in air, a few hundredths of the signal, and far from what a label stands out in: a study whose
brightest voxels are artefacts looks darker everywhere once it is normalised, and is not to lose an organ by it."""


def air_levels(cases: Iterable[PreparedCase], patch_shape: Sequence[int]) -> tuple[float, ...] | None:
    """Values, one a channel of the prepared images, below which a window's voxels all lie only where nothing is.

    A value lies `SHARE` of the way from a case's lowest voxel to the highest voxel of its darkest window that held a
    label, and is that of the case for which it is least. None where no case has a label.
    """
    found = [levels for case in cases if (levels := _levels_of(case, patch_shape)) is not None]
    return tuple(torch.stack(found).amin(dim=0).tolist()) if found else None


def _levels_of(case: PreparedCase, patch_shape: Sequence[int]) -> Tensor | None:
    sides = [max(1, side // PARTS) for side in patch_shape]
    # Of a window that begins at any voxel, so many blocks lie in it whole.
    whole = [(patch - side + 1) // side for patch, side in zip(patch_shape, sides, strict=True)]
    blocks = max_pool3d(case.image, sides, ceil_mode=True)
    window = [min(count, there) for count, there in zip(whole, blocks.shape[1:], strict=True)]
    labelled = max_pool3d(case.classes.float(), sides, ceil_mode=True)
    # A label in a block that a window holds in part lies beside its whole ones.
    labelled = max_pool3d(labelled, 3, stride=1, padding=1)
    holds_label = max_pool3d(labelled, window, stride=1)[0] > 0
    if not holds_label.any():
        return None
    highest = max_pool3d(blocks, window, stride=1)[:, holds_label]
    lowest = case.image.amin(dim=(1, 2, 3))
    return lowest + SHARE * (highest.amin(dim=1) - lowest)
