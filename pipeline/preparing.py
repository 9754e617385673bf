"""One study as the network sees it: the plan's preprocessing, by the same code as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import VolsegError, VolumeError
from pipeline.plan import Plan
from transforms.geometry import Geometry
from transforms.placing import place, placed_grid
from transforms.placing import put_back as put_back_classes
from transforms.placing_spec import Placing
from transforms.preprocessing import plan_grid, preprocess
from transforms.recipe import follow, largest_grid
from transforms.recipe_spec import Step
from transforms.volume import Volume


@dataclass(frozen=True, eq=False)
class Prepared:
    """`image` (C, I, J, K) float32 on `grid`, one channel a channel of the plan.

    Scores on `grid` are to be moved linearly to `field`, and the classes that win there go back with `put_back`. For
    a plan without a `placing` both `field` and `box` are the study's own grid.
    """

    image: Tensor
    grid: Geometry
    field: Geometry
    box: Geometry


def prepare(plan: Plan, channels: Sequence[Volume | None]) -> Prepared:
    """A study's channels, all on one grid, as the plan wants them; None is an optional channel that it lacks.

    Raises:
        VolumeError: a channel cannot be normalised, or the grid cannot be brought to the plan's axes.
    """
    there = [volume for volume in channels if volume is not None]
    source = there[0].geometry
    stacked = _stacked([volume.voxels for volume in there])
    if plan.placing is not None:
        return _placed(plan, plan.placing, stacked, source)
    if plan.recipe is not None:
        return _followed(plan.recipe, stacked, source)
    present = [volume is not None for volume in channels]
    try:
        image, grid = preprocess(
            stacked,
            source,
            axis_codes=plan.axis_codes,
            spacing_mm=plan.spacing_mm,
            normalisations=plan.normalisations,
            present=present,
        )
    except VolsegError:
        raise
    except ValueError as error:
        raise VolumeError(str(error)) from error
    return Prepared(image, grid, source, source)


def _stacked(channels: Sequence[npt.NDArray[Any]]) -> Tensor:
    """(C, I, J, K) float32; a single channel that is float32 already is not copied, and must not be written to."""
    first = channels[0]
    if len(channels) == 1 and first.dtype == np.float32 and first.flags.writeable and min(first.strides) > 0:
        return torch.from_numpy(first)[None]
    return torch.from_numpy(np.stack(channels, dtype=np.float32, casting="unsafe"))


def grid_of(plan: Plan, source: Geometry) -> Geometry:
    """The grid on which a study on `source` is predicted; a plan that crops may take less of it.

    Raises:
        ValueError: the grid cannot be brought to the plan's axes.
    """
    if plan.recipe is not None:
        return largest_grid(plan.recipe, source)
    if plan.placing is not None:
        return placed_grid(source, plan.placing, axis_codes=plan.axis_codes, spacing_mm=plan.spacing_mm)
    return plan_grid(source, plan.axis_codes, plan.spacing_mm)


def put_back(classes: Tensor, prepared: Prepared, source: Geometry) -> Tensor:
    """Classes (1, I, J, K) on `prepared.field` to the study's grid `source`."""
    return put_back_classes(classes, prepared.field, prepared.box, source)


def _placed(plan: Plan, placing: Placing, channels: Tensor, source: Geometry) -> Prepared:
    try:
        placed = place(
            channels,
            source,
            placing,
            axis_codes=plan.axis_codes,
            spacing_mm=plan.spacing_mm,
            normalisations=plan.normalisations,
        )
    except ValueError as error:
        raise VolumeError(str(error)) from error
    return Prepared(placed.image, placed.grid, placed.field, placed.box)


def _followed(recipe: Sequence[Step], channels: Tensor, source: Geometry) -> Prepared:
    try:
        image, grid = follow(recipe, channels, source)
    except ValueError as error:
        raise VolumeError(str(error)) from error
    return Prepared(image, grid, source, source)
