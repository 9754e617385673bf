"""Prediction preprocesses without MONAI: bit for bit what the MONAI transforms make of the same channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import Compose
from torch import Tensor

from transforms.chains import placing_steps, plain
from transforms.geometry import Geometry
from transforms.intensity_spec import Normalisation
from transforms.load import as_metatensor, geometry_of
from transforms.preprocessing import plan_grid, preprocess

HOWS = (Normalisation(kind="window", lower=-2, upper=2, mean=0.1, deviation=0.7), Normalisation(kind="zscore"))
SHAPE = (9, 11, 8)
SPACING_MM = (1.5, 1.0, 2.0)


def grid(*, shear: float = 0.0) -> Geometry:
    affine = np.array([[0, -1.1, shear, 4.0], [0.9, 0, 0, -20.0], [0, 0, 1.9, 3.0], [0, 0, 0, 1.0]])
    return Geometry(SHAPE, affine)


def channels(count: int) -> Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shear", [0.0, 0.6])
@pytest.mark.parametrize("present", [None, (True, True), (False, True), (True, False)])
def test_it_is_what_the_transforms_make(shear: float, present: tuple[bool, ...] | None) -> None:
    image, source = channels(sum(present or (True, True))), grid(shear=shear)
    steps = placing_steps(["image"], [], "RAS", SPACING_MM, HOWS, present)
    expected = Compose(steps)({"image": as_metatensor(image, source)})["image"]
    found, where = preprocess(
        image, source, axis_codes="RAS", spacing_mm=SPACING_MM, normalisations=HOWS, present=present
    )
    assert torch.equal(found, plain(expected))
    assert where.difference(geometry_of(expected)) is None
    assert not isinstance(found, type(expected))


def test_the_grid_has_the_axes_and_spacing() -> None:
    found = plan_grid(grid(shear=0.6), "LPS", SPACING_MM)
    assert (found.axis_codes, found.spacing_mm) == ("LPS", pytest.approx(SPACING_MM))
    assert not found.is_sheared


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="1 channels, expected 2"):
        preprocess(channels(1), grid(), axis_codes="RAS", spacing_mm=SPACING_MM, normalisations=HOWS)
