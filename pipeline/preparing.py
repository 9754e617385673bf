"""One study as the network sees it: the plan's preprocessing, by the same code as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch import Tensor

from pipeline.dataset import apply_chain
from pipeline.plan import Plan
from transforms.chains import placing_steps, plain
from transforms.geometry import Geometry
from transforms.load import as_metatensor, geometry_of
from transforms.volume import Volume


@dataclass(frozen=True, eq=False)
class Prepared:
    """`image` (C, I, J, K) float32 on `grid`, one channel a channel of the plan."""

    image: Tensor
    grid: Geometry


def prepare(plan: Plan, channels: Sequence[Volume | None]) -> Prepared:
    """A study's channels, all on one grid, as the plan wants them; None is an optional channel that it lacks.

    Raises:
        VolumeError: a channel cannot be normalised, or the grid cannot be brought to the plan's axes.
    """
    there = [volume for volume in channels if volume is not None]
    stacked = torch.from_numpy(np.stack([v.voxels for v in there]).astype(np.float32, copy=False))
    present = [volume is not None for volume in channels]
    steps = placing_steps(["image"], [], plan.axis_codes, plan.spacing_mm, plan.normalisations, present)
    data: dict[str, Any] = {"image": as_metatensor(stacked, there[0].geometry)}
    data = apply_chain(Compose(steps), data)
    return Prepared(plain(data["image"]), geometry_of(data["image"]))
