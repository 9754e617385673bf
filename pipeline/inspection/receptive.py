"""How far a network looks: what its deepest level can see, and what its answer really depends on.

The second is the effective receptive field (Luo et al., NeurIPS 2016, arXiv 1701.04128): the gradient of an output
voxel with respect to the input, which is much narrower than what the network could see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.detection import components
from pipeline.label_boxes import boxes_of_values, held_box
from pipeline.models.shape import receptive_field
from pipeline.plan import Plan
from pipeline.tiling import Triple, overlap
from transforms.channels import channel_minima
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.sampling import filled

ENERGY_SHARE = 0.95
"""Of the gradient's energy, what lies within the radius that is told."""

VOXELS = 8
"""Output voxels of a case whose gradients are averaged, at least one of each label."""

MOST_LABELS = 16
"""Labels of a case that such voxels are taken of."""

Millimetres = tuple[float, float, float]


@dataclass(frozen=True)
class ReceptiveField:
    """How far the network looks, along the axes of the plan, in mm.

    `deepest_mm` and `deepest_voxels`: side of what a voxel of the deepest level sees through convolutions (on the grid
    of the plan), None where it is not known; `patch_mm`: of the patch. `radius_mm`: of the ball around an output voxel
    that holds 95 % of its gradient's energy, and `reach_mm` of the slab across each axis, averaged over `voxels` output
    voxels; None where that was not measured. `extents_mm`: longest side of the box around the largest piece of each
    label, the longest of all cases. `slice_axis`: the axis across the slices of a 2D network.
    """

    deepest_voxels: Triple | None
    deepest_mm: Millimetres | None
    patch_mm: Millimetres
    radius_mm: float | None
    reach_mm: Millimetres | None
    voxels: int
    extents_mm: dict[str, float] = field(default_factory=dict)
    slice_axis: int | None = None


def deepest_field(plan: Plan) -> Triple | None:
    """Side in voxels per axis of the plan of what a voxel of the bottleneck sees; None for a network that is not ours.

    Behind a transformer that is the patch.
    """
    if plan.network != "unet" or plan.monai is not None:
        return None
    sides = list(receptive_field(plan.unet))
    if plan.slice_axis is not None:
        sides.insert(plan.slice_axis, 1)
    if plan.unet.bottleneck == "transformer":
        sides = [max(pair) for pair in zip(sides, plan.patch_shape, strict=True)]
    i, j, k = sides
    return i, j, k


def gradient_energy(network: nn.Module, image: Tensor, patch_shape: Triple, positions_ijk: Sequence[Triple]) -> Tensor:
    """Energy (I, J, K) float64 of the gradients at these voxels of an image (C, I, J, K), by place in the patch.

    Each voxel lies in the middle of its patch (at half its sides, rounded down) and counts 1 in all, so that the sum
    is the number of voxels whose answer depends on the input. The gradient is of the winning output's lead over the
    others, which is what decides. Beyond the image is its lowest value, as in prediction.
    """
    energy = torch.zeros(patch_shape, dtype=torch.float64)
    lowest = channel_minima(image)
    for position in positions_ijk:
        start = [p - side // 2 for p, side in zip(position, patch_shape, strict=True)]
        patch = filled((image.shape[0], *patch_shape), lowest, dtype=image.dtype, device=image.device)
        inside, volume = overlap(start, patch_shape, image.shape[1:])
        patch[(slice(None), *inside)] = image[(slice(None), *volume)]
        found = _gradient(network, patch[None]).square().sum(dim=(0, 1)).double().cpu()
        if float(found.sum()) > 0:
            energy += found / found.sum()
    return energy


def radius_mm(energy: Tensor, spacing_mm: Sequence[float], share: float = ENERGY_SHARE) -> float | None:
    """Of the ball around the middle of a patch (see `gradient_energy`) that holds this share; None of nothing."""
    return _holding(_distances_mm(energy.shape, spacing_mm).square().sum(dim=0).sqrt(), energy, share)


def reach_mm(energy: Tensor, spacing_mm: Sequence[float], share: float = ENERGY_SHARE) -> Millimetres | None:
    """The same of the slab across each axis: half its thickness."""
    found = [_holding(along, energy, share) for along in _distances_mm(energy.shape, spacing_mm).abs()]
    i, j, k = (math.nan if value is None else value for value in found)
    return None if None in found else (i, j, k)


def voxels_to_ask(classes: npt.NDArray[Any], schema: LabelSchema, source: Geometry, grid: Geometry) -> list[Triple]:
    """Voxels of `grid` within labels of a class map on `source`: the same number of each label, evenly taken.

    Where nothing is labelled, the middle of the grid.
    """
    present = list(boxes_of_values(classes, range(1, schema.class_count)))[:MOST_LABELS]
    positions: list[Triple] = []
    for value in present:
        held = np.argwhere(classes == value)
        count = min(len(held), max(1, VOXELS // len(present)))
        taken = held[[int((n + 0.5) * len(held) / count) for n in range(count)]]
        found = np.rint(grid.ijk_from_ras(source.ras_from_ijk(taken))).astype(int)
        inside = np.clip(found, 0, np.asarray(grid.shape) - 1)
        positions += [(int(i), int(j), int(k)) for i, j, k in inside]
    i, j, k = (side // 2 for side in grid.shape)
    return positions or [(i, j, k)]


def extents_mm(classes: npt.NDArray[Any], schema: LabelSchema, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Longest side of the box around the largest piece (26-connected) of each label of a class map (I, J, K)."""
    found = {}
    for value, box in boxes_of_values(classes, range(1, schema.class_count)).items():
        pieces, _ = components(classes[box] == value)
        largest = int(np.bincount(pieces.reshape(-1))[1:].argmax()) + 1
        sides = held_box((pieces == largest).astype(np.uint8))
        assert sides is not None
        longest = max((side.stop - side.start) * mm for side, mm in zip(sides, spacing_mm, strict=True))
        found[schema.names[value - 1]] = float(longest)
    return found


def _gradient(network: nn.Module, patch: Tensor) -> Tensor:
    """Of the winning output's lead at the middle of a patch (1, C, I, J, K), with respect to the patch."""
    with torch.inference_mode(False), torch.enable_grad():
        seen = patch.clone().requires_grad_()
        middle = tuple(side // 2 for side in patch.shape[2:])
        logits = network(seen)[(0, slice(None), *middle)]
        best = int(logits.argmax())
        others = torch.cat((logits[:best], logits[best + 1 :]))
        lead = logits[best] - torch.logsumexp(others, dim=0) if len(others) else logits[best]
        (gradient,) = torch.autograd.grad(lead, seen)
    return gradient


def _distances_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> Tensor:
    """(3, I, J, K) from the middle voxel, along each axis."""
    axes = [(torch.arange(n) - n // 2).double() * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _holding(distances: Tensor, energy: Tensor, share: float) -> float | None:
    total = float(energy.sum())
    if not total > 0:
        return None
    far, order = torch.sort(distances.flatten())
    held = torch.cumsum(energy.flatten()[order], dim=0)
    # Rounding must not ask for a voxel more than the sum itself has.
    first = int(torch.searchsorted(held, torch.tensor(share * total * (1 - 1e-12), dtype=held.dtype)))
    return float(far[min(first, len(far) - 1)])
