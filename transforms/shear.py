"""Voxels between a sheared grid and an orthogonal one: each slice is shifted within its own plane."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transforms.geometry import AxisMap
from transforms.spline import Order, placed_weights


@torch.no_grad()
def move_sheared(voxels: Tensor, axes: AxisMap, *, order: Order, fill: float, source_is_sheared: bool) -> Tensor:
    """Voxels (C, I, J, K) to (C, I', J', K') float32 as `axes`, which have a stack, say.

    Slices are shifted where they lie on the sheared grid: before they are interpolated between, or after.

    Raises:
        ValueError: `fill` is infinite for a sheared source.
    """
    stack = axes.stack_axis or 0
    scale, offset = axes.scales[stack], axes.offsets[stack]
    turned = voxels.permute(0, *(a + 1 for a in axes.source_axes)).movedim(stack + 1, 1).to(torch.float32)
    weights = placed_weights(turned.shape[1], axes.target_shape[stack], scale, offset, order)
    between = weights.dense().to(voxels.device)
    if source_is_sheared:
        if not np.isfinite(fill):
            raise ValueError(f"what lies beside a sheared grid is filled with a finite value, found {fill}")
        numbers = (np.arange(turned.shape[1]) - offset) / scale
        moved = torch.tensordot(between, _shift_slices(turned, numbers, axes, order, fill), dims=([1], [1]))
    else:
        moved = torch.tensordot(between, turned, dims=([1], [1])).movedim(0, 1)
        moved = _shift_slices(moved, np.arange(moved.shape[1]), axes, order, fill).movedim(1, 0)
    moved[torch.from_numpy(weights.outside)] = fill
    placed: Tensor = moved.movedim(0, 1).movedim(1, stack + 1).contiguous()
    return placed


def _shift_slices(slices: Tensor, numbers: np.ndarray, axes: AxisMap, order: Order, fill: float) -> Tensor:
    """Slices (C, K, A, B) to their places in the target's planes; `numbers` are their positions along its stack."""
    across = [t for t in range(3) if t != axes.stack_axis]
    sizes = [axes.target_shape[t] for t in across]
    shifted = torch.empty((*slices.shape[:2], *sizes), dtype=torch.float32, device=slices.device)
    for k, number in enumerate(numbers):
        offsets = [axes.offsets[t] + axes.shears[t] * float(number) for t in across]
        first, second = (
            placed_weights(n, m, axes.scales[t], offset, order)
            for n, m, t, offset in zip(slices.shape[2:], sizes, across, offsets, strict=True)
        )
        shifted[:, k] = first.dense().to(slices.device) @ slices[:, k] @ second.dense().to(slices.device).T
        shifted[:, k, torch.from_numpy(first.outside)] = fill
        shifted[:, k, :, torch.from_numpy(second.outside)] = fill
    return shifted
