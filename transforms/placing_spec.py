"""How a model from elsewhere brings a study to its grid, as a value: torch-free, so that plans can hold it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SplineOrder = Literal[0, 1, 3]
"""0 nearest, 1 linear, 3 cubic."""


class Resizing(BaseModel):
    """How voxels come from one grid to another over the same field of view.

    By splines of `order`, or across slices of `order_across` where these are resized by themselves: always or never as
    `separate` says, or by default where a voxel is more than `anisotropy` times as long as it is wide, on either grid
    (nnU-Net v2, preprocessing/resampling/default_resampling.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: SplineOrder
    order_across: SplineOrder = 0
    separate: bool | None = None
    anisotropy: float = 3.0


class Placing(BaseModel):
    """What nnU-Net v2 does otherwise than we (its preprocessing/preprocessors/default_preprocessor.py).

    Axes stay as they are stored unless it `reorients`, which permutes and flips them; slices that lean (a tilted
    gantry) are never set upright. What is 0 in every channel all around is cut off, and the field of view that remains
    has its sides rounded to whole voxels of about the plan's spacing; along `kept_axis` the slices stay those of the
    study.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reorients: bool = False
    kept_axis: Literal[0, 1, 2] | None = None
    image: Resizing = Resizing(order=3)
    scores: Resizing = Resizing(order=1)
