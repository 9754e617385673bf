"""How far networks look whose weights say it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.inspection.receptive import extents_mm, gradient_energy, radius_mm, reach_mm, voxels_to_ask
from pipeline.models.shape import receptive_field
from pipeline.models.unet import UNet
from transforms.geometry import Geometry
from transforms.labels import schema_from_names

from .worlds import generator, noise, silence, small_spec

PATCH = (8, 8, 8)
SPACING_MM = (1.0, 2.0, 3.0)
MIDDLE = (6, 6, 6)
SCHEMA = schema_from_names({1: "bar", 2: "dot"})


def box(*kernel: int) -> nn.Conv3d:
    """Two outputs, the sum of a box and nothing."""
    padding = tuple(side // 2 for side in kernel)
    layer = nn.Conv3d(1, 2, kernel, padding=padding, bias=False)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = 1.0, 0.0
    return layer


def test_an_identity_looks_at_the_voxel_itself() -> None:
    energy = gradient_energy(box(1, 1, 1), noise(1, 12, 12, 12), PATCH, [MIDDLE])
    assert float(energy[4, 4, 4]) == pytest.approx(1.0)
    assert float(energy.sum()) == pytest.approx(1.0)
    assert radius_mm(energy, SPACING_MM) == 0.0
    assert reach_mm(energy, SPACING_MM) == (0.0, 0.0, 0.0)


def test_a_box_looks_as_far_as_it_reaches() -> None:
    """27 voxels of the same energy: 95 % are 26 of them, of which the last lies in a corner."""
    energy = gradient_energy(box(3, 3, 3), noise(1, 12, 12, 12), PATCH, [MIDDLE])
    assert float(energy[3:6, 3:6, 3:6].sum()) == pytest.approx(1.0)
    assert radius_mm(energy, SPACING_MM) == pytest.approx(math.sqrt(1 + 4 + 9))
    assert reach_mm(energy, SPACING_MM) == pytest.approx((1.0, 2.0, 3.0))
    assert radius_mm(energy, SPACING_MM, share=1 / 27) == 0.0


def test_reach_tells_axes_apart() -> None:
    energy = gradient_energy(box(1, 5, 3), noise(1, 12, 12, 12), PATCH, [MIDDLE])
    assert reach_mm(energy, SPACING_MM) == pytest.approx((0.0, 4.0, 3.0))


class Cubes(nn.Module):
    """Its gradient at a voxel depends on the voxel alone, and is 0 where that is 0."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat((image**3, torch.zeros_like(image)), dim=1)


def test_each_voxel_counts_the_same() -> None:
    """Whatever the size of its gradient: the second is a million times larger."""
    image = noise(1, 12, 12, 12)
    image[0, 6, 6, 6], image[0, 5, 5, 5] = 1.0, 1000.0
    energy = gradient_energy(Cubes(), image, PATCH, [MIDDLE, (5, 5, 5)])
    assert float(energy.sum()) == pytest.approx(2.0)


@pytest.mark.parametrize("voxel", [(6, 6, 6), (0, 11, 3)])
@pytest.mark.parametrize("patch", [(8, 8, 8), (5, 6, 7)])
def test_the_voxel_that_is_asked_lies_in_the_middle(voxel: tuple[int, int, int], patch: tuple[int, int, int]) -> None:
    image = torch.zeros(1, 12, 12, 12)
    image[(0, *voxel)] = 1.0
    energy = gradient_energy(Cubes(), image, patch, [voxel])
    assert float(energy[patch[0] // 2, patch[1] // 2, patch[2] // 2]) == pytest.approx(1.0)
    beside = (voxel[0] + 1, *voxel[1:])
    assert float(gradient_energy(Cubes(), image, patch, [beside]).sum()) == 0.0


def test_a_network_that_ignores_its_input_looks_nowhere() -> None:
    layer = box(3, 3, 3)
    silence(layer.weight)
    energy = gradient_energy(layer, noise(1, 12, 12, 12), PATCH, [MIDDLE])
    assert float(energy.sum()) == 0.0
    assert radius_mm(energy, SPACING_MM) is None
    assert reach_mm(energy, SPACING_MM) is None


def test_voxels_at_the_border_see_the_padding() -> None:
    energy = gradient_energy(box(3, 3, 3), noise(1, 12, 12, 12), PATCH, [(0, 0, 11)])
    assert float(energy.sum()) == pytest.approx(1.0)


@pytest.mark.usefixtures("one_thread")
def test_no_gradient_lies_beyond_the_field_that_the_plan_tells() -> None:
    """Through the bottleneck alone, without normalisation: the field is as wide as told, and no wider."""
    spec = small_spec(normalisation="none", features=(2, 2, 2))
    network = UNet(spec, generator()).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    for stage in network.decoder:
        first = next(layer for layer in stage.modules() if isinstance(layer, nn.Conv3d) and layer.in_channels == 4)
        silence(first.weight, first=2, axis=1)
        middle = first.weight.detach()[..., 1:2, 1:2, 1:2].clone()
        silence(first.weight)
        with torch.no_grad():
            first.weight[..., 1:2, 1:2, 1:2] = middle
    with torch.no_grad():
        network.heads[0].weight[1] = 0.0
    energy = gradient_energy(network, noise(1, 32, 32, 32).abs(), (32, 32, 32), [(16, 16, 16)])
    seen = torch.nonzero(energy)
    sides = (seen.max(dim=0).values - seen.min(dim=0).values + 1).tolist()
    assert tuple(sides) == receptive_field(spec)


def test_voxels_are_found_on_another_grid() -> None:
    source = Geometry((10, 10, 10), np.diag([1.0, 1.0, 1.0, 1.0]))
    grid = source.flipped(0).respaced((2.0, 1.0, 1.0))
    classes = np.zeros(source.shape, np.uint8)
    classes[8, 3, 4] = 2
    (asked,) = voxels_to_ask(classes, SCHEMA, source, grid)
    assert np.abs(grid.ras_from_ijk([asked]) - source.ras_from_ijk([(8, 3, 4)])).max() <= 1.0


def test_labels_share_the_voxels_that_are_asked() -> None:
    source = Geometry((10, 10, 10), np.diag([1.0, 1.0, 1.0, 1.0]))
    classes = np.zeros(source.shape, np.uint8)
    classes[:8], classes[9, 9, 9] = 1, 2
    asked = voxels_to_ask(classes, SCHEMA, source, source)
    assert [classes[i, j, k] for i, j, k in asked] == [1, 1, 1, 1, 2]
    assert voxels_to_ask(np.zeros_like(classes), SCHEMA, source, source) == [(5, 5, 5)]


def test_extents_are_of_the_largest_piece() -> None:
    classes = np.zeros((20, 20, 20), np.uint8)
    classes[2:10, 3:6, 3:5] = 1
    classes[18, 3, 3] = 1
    classes[5:7, 15:17, 10:14] = 2
    assert extents_mm(classes, SCHEMA, (1.0, 2.0, 3.0)) == {"bar": 8.0, "dot": 12.0}
    assert extents_mm(np.zeros_like(classes), SCHEMA, (1.0, 2.0, 3.0)) == {}
