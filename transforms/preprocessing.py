"""A volume to the grid and range that a network learns on: what our MONAI transforms and prediction have in common.

The transforms of `transforms.steps` wrap these functions. Prediction calls them as they are: MONAI takes longer to
import than a small volume takes to segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transforms.channels import insert_missing
from transforms.geometry import Geometry
from transforms.intensity import normalise_channels
from transforms.intensity_spec import Normalisation
from transforms.resample import move


def preprocess(
    image: Tensor,
    source: Geometry,
    *,
    axis_codes: str,
    spacing_mm: Sequence[float],
    normalisations: Sequence[Normalisation],
    present: Sequence[bool] | None = None,
) -> tuple[Tensor, Geometry]:
    """Channels that are `present` (P, I, J, K) to all of them (C, I', J', K') float32 on the grid that is given back.

    Normalised, reoriented, respaced, and zeros where a channel is missing: `transforms.chains.placing_steps` in one.
    `normalisations` are of all channels; by default all are present.

    Raises:
        ValueError: another number of channels, or a channel is constant and to be normalised by its own deviation.
    """
    there = [True] * len(normalisations) if present is None else list(present)
    hows = [how for how, is_there in zip(normalisations, there, strict=True) if is_there]
    normalised = normalise_channels(image, hows)
    grid = plan_grid(source, axis_codes, spacing_mm)
    placed = respace_image(normalised, source, grid)
    return placed if all(there) else insert_missing(placed, there), grid


def plan_grid(source: Geometry, axis_codes: str, spacing_mm: Sequence[float]) -> Geometry:
    """The grid over the same field of view that has the given axes and spacing; a sheared one is made orthogonal."""
    return source.orthogonal().oriented(axis_codes).respaced(spacing_mm)


def respace_image(image: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """An image (C, I, J, K) on `source`, cubically to (C, I', J', K') on `target`.

    What lies beside the slices of a sheared grid was never measured: it is the lowest value of its channel.
    """
    if source.is_sheared:
        return torch.cat([move(v[None], source, target, order=3, fill=float(v.min())) for v in image])
    return move(image, source, target, order=3)
