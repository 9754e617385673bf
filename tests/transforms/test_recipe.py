"""A recipe's steps against MONAI's own transforms on a real volume, and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai import transforms as monai

from transforms.geometry import Geometry
from transforms.load import as_metatensor, geometry_of
from transforms.recipe import follow, largest_grid
from transforms.recipe_spec import (
    CropForeground,
    MapPercentiles,
    MapRange,
    Reorient,
    Respace,
    Standardise,
    Step,
    Stretch,
)
from transforms.volume import read_volume


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest) -> tuple[torch.Tensor, Geometry]:
    """Two channels of a real volume, the second with a masked background."""
    path: Path = request.config.rootpath / "tests/data/hippocampus/images/hippocampus_001.nii.gz"
    volume = read_volume(path)
    voxels = torch.from_numpy(volume.voxels)
    oblique = volume.geometry.affine_ras.copy()
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    oblique[:3, :3] = turn @ oblique[:3, :3] @ np.diag([0.9, 1.1, 1.4])
    masked = torch.where(voxels > 30, voxels * 2, 0)
    masked[:7] = 0
    return torch.stack([voxels - 100, masked]), Geometry(volume.geometry.shape, oblique)


CASES: list[tuple[Step, Any]] = [
    (Reorient(axis_codes="LPS"), monai.Orientation("LPS", labels=None)),
    (Reorient(axis_codes="SRA"), monai.Orientation("SRA", labels=None)),
    (Respace(spacing_mm=(1.5, 1.5, 2.0)), monai.Spacing((1.5, 1.5, 2.0))),
    (Respace(spacing_mm=(0.8, None, 0.7)), monai.Spacing((0.8, -1.0, 0.7))),
    (
        Respace(spacing_mm=(1.31, 1.27, 1.17), interpolation="nearest"),
        monai.Spacing((1.31, 1.27, 1.17), mode="nearest"),
    ),
    (MapRange(source=(-57, 164), target=(0, 1), clip=True), monai.ScaleIntensityRange(-57, 164, 0, 1, clip=True)),
    (MapRange(source=(-57, 164), target=(-1, 1)), monai.ScaleIntensityRange(-57, 164, -1, 1)),
    (MapRange(source=(-57, 164)), monai.ScaleIntensityRange(-57, 164)),
    (
        MapPercentiles(percentiles=(1, 99), target=(0, 1), clip=True, channel_wise=True),
        monai.ScaleIntensityRangePercentiles(1, 99, 0, 1, clip=True, channel_wise=True),
    ),
    (
        MapPercentiles(percentiles=(5, 95), target=(0, 2)),
        monai.ScaleIntensityRangePercentiles(5, 95, 0, 2),
    ),
    (Stretch(target=(-1, 1)), monai.ScaleIntensity(-1, 1)),
    (Stretch(channel_wise=True), monai.ScaleIntensity(channel_wise=True)),
    (Standardise(), monai.NormalizeIntensity()),
    (Standardise(nonzero=True, channel_wise=True), monai.NormalizeIntensity(nonzero=True, channel_wise=True)),
    (Standardise(nonzero=True), monai.NormalizeIntensity(nonzero=True)),
    (Standardise(mean=(50.0,), deviation=(20.0,)), monai.NormalizeIntensity(50.0, 20.0)),
    (
        Standardise(mean=(50.0, 1.0), deviation=(20.0, 2.0), channel_wise=True),
        monai.NormalizeIntensity([50.0, 1.0], [20.0, 2.0], channel_wise=True),
    ),
    (CropForeground(margin=3), monai.CropForeground(margin=3, allow_smaller=True)),
]


@pytest.mark.parametrize(("step", "theirs"), CASES)
def test_as_monai_does_it(study: tuple[torch.Tensor, Geometry], step: Step, theirs: Any) -> None:
    image, grid = study
    if isinstance(step, CropForeground):
        image = image[1:]
    expected = theirs(as_metatensor(image.clone(), grid))
    found, target = follow([step], image.clone(), grid)
    assert geometry_of(expected).difference(target) is None
    difference = (found - expected.as_tensor()).abs()
    scale = float(expected.abs().max())
    if isinstance(step, Respace) and step.interpolation == "nearest":
        # Positions half way between two voxels may go either way.
        assert float((difference > 0).float().mean()) < 0.001
    else:
        assert float(difference.max()) < 1e-4 * max(scale, 1.0)


def test_steps_follow_one_another_as_given(study: tuple[torch.Tensor, Geometry]) -> None:
    image, grid = study
    steps: list[Step] = [
        Reorient(axis_codes="RAS"),
        Respace(spacing_mm=(1.5, 1.5, 2.0)),
        MapRange(source=(-57, 164), target=(0, 1), clip=True),
        CropForeground(),
    ]
    theirs = monai.Compose(
        [
            monai.Orientation("RAS", labels=None),
            monai.Spacing((1.5, 1.5, 2.0)),
            monai.ScaleIntensityRange(-57, 164, 0, 1, clip=True),
            monai.CropForeground(allow_smaller=True),
        ]
    )
    expected: Any = theirs(as_metatensor(image.clone(), grid))
    found, target = follow(steps, image.clone(), grid)
    assert geometry_of(expected).difference(target) is None
    assert float((found - expected.as_tensor()).abs().max()) < 1e-4
    assert all(n >= m for n, m in zip(largest_grid(steps, grid).shape, target.shape, strict=True))


def test_by_hand() -> None:
    grid = Geometry((1, 1, 4), np.eye(4))
    image = torch.tensor([[[[0.0, 10.0, 20.0, 30.0]]]])
    found, target = follow([Respace(spacing_mm=(1.0, 1.0, 1.5))], image, grid)
    assert (target.shape, found.flatten().tolist()) == ((1, 1, 3), [0.0, 15.0, 30.0])
    found, target = follow([CropForeground(margin=1)], torch.tensor([[[[0.0, 0.0, 5.0, 0.0]]]]), grid)
    assert (target.shape, target.origin_ras_mm.tolist()) == ((1, 1, 3), [0.0, 0.0, 1.0])
    flat = torch.full((1, 1, 1, 4), 7.0)
    assert follow([Stretch(target=(0.0, 1.0))], flat, grid)[0].unique().tolist() == [0.0]
    assert follow([Standardise()], flat, grid)[0].unique().tolist() == [0.0]


def test_what_makes_no_sense_is_refused() -> None:
    grid = Geometry((2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match="no voxel is above 0"):
        follow([CropForeground()], torch.zeros(1, 2, 2, 2), grid)
    with pytest.raises(ValueError, match="channel 1 has no value among the 1 given"):
        follow([Standardise(mean=(1.0,), channel_wise=True)], torch.ones(2, 2, 2, 2), grid)
    with pytest.raises(ValueError, match="is empty"):
        MapRange(source=(1, 1))
    with pytest.raises(ValueError, match="the lower first"):
        MapPercentiles(percentiles=(99, 1))
    with pytest.raises(ValueError, match="more than 0 mm"):
        Respace(spacing_mm=(0, 1, 1))
