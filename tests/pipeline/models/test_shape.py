"""Which shapes fit, what the bottleneck sees and where the output lies, against the network itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.shape import (
    fitting_shapes,
    output_margin,
    output_shape,
    receptive_field,
)
from pipeline.models.spec import UNetSpec, unet_2015
from pipeline.models.unet import UNet

CHOICES: dict[str, tuple[Any, ...]] = {
    "block": ("plain", "residual"),
    "normalisation": ("instance", "none"),
    "padding": ("same", "valid"),
    "downsampling": ("strided", "max_pool"),
    "upsampling": ("transposed", "interpolated"),
    "skip": ("concatenate", "attention"),
}
TYPICAL = ("none", "transposed", "concatenate")
EVERY_CHOICE = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]

ENCODER_CHOICES = [c for c in EVERY_CHOICE if (c["normalisation"], c["upsampling"], c["skip"]) == TYPICAL]
WITH_STEM = [c | {"stem_channels": 3} for c in ENCODER_CHOICES[::3]]


def spec_of(**choices: Any) -> UNetSpec:
    defaults: dict[str, Any] = {
        "in_channels": 2,
        "out_channels": 3,
        "features": (8, 12, 16),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernel_shapes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        "encoder_blocks": (1, 2, 1),
        "decoder_blocks": (2, 1),
    }
    return UNetSpec(**(defaults | choices))


@pytest.mark.parametrize("choices", [*ENCODER_CHOICES, *WITH_STEM], ids=lambda c: "-".join(map(str, c.values())))
def test_bottleneck_sees_its_receptive_field_and_no_more(choices: dict[str, Any]) -> None:
    """The gradient of one voxel of the bottleneck, with positive weights: nothing can cancel."""
    planar = {
        "dimensions": 2,
        "strides": ((1, 1), (1, 2), (2, 2)),
        "kernel_shapes": ((1, 3), (3, 3), (3, 5)),
        "activation": "leaky_relu",
    }
    spec = spec_of(**(choices | planar | {"normalisation": "none"}))
    field = receptive_field(spec)
    _, shape = fitting_shapes(spec, tuple(2 * side + 40 for side in field))
    network = UNet(spec).double()
    for weights in network.parameters():
        nn.init.constant_(weights, 0.1)
    image = torch.rand(1, 2, *shape, dtype=torch.float64, requires_grad=True)
    features: Tensor = image
    for stage in network.encoder:
        features = stage(features)
    features[0, 0, features.shape[2] // 2, features.shape[3] // 2].backward()
    assert image.grad is not None
    seen = image.grad[0, 0].nonzero()
    extent = tuple(int(n) for n in seen.max(0).values - seen.min(0).values + 1)
    if spec.downsampling == "max_pool":  # only the largest voxel of each window has a gradient
        assert all(n <= side for n, side in zip(extent, field, strict=True))
        assert all(n >= side - 6 for n, side in zip(extent, field, strict=True))
    else:
        assert extent == field


def test_receptive_field_by_hand() -> None:
    """2015: 5 after two 3x3, 6 pooled, then 2x(2x2)+2, 4x(2x2)+4, 8x(2x2)+8 and 16x(2x2)."""
    assert receptive_field(unet_2015()) == (140, 140)
    assert 5 + 1 + 8 + 2 + 16 + 4 + 32 + 8 + 64 == 140


@pytest.mark.parametrize("downsampling", ["strided", "max_pool"])
def test_nearest_shapes_of_a_valid_network_are_the_nearest(downsampling: str) -> None:
    spec = spec_of(padding="valid", downsampling=downsampling)

    sides = [side for side in range(20, 80) if fitting_shapes(spec, (side,) * 3)[1][1] == side]
    assert len(sides) > 5
    for side in range(sides[0], sides[-1]):
        below, above = fitting_shapes(spec, (side,) * 3)
        assert below is not None
        assert below[1] == max(s for s in sides if s <= side)
        assert above[1] == min(s for s in sides if s >= side)
    for side in sides:
        _, shape = fitting_shapes(spec, (side,) * 3)
        with torch.device("meta"):
            logits = UNet(spec)(torch.empty(1, 2, *shape))
        assert tuple(logits.shape[2:]) == output_shape(spec, shape)


def test_same_padding_has_no_margin_and_valid_convolutions_lose_evenly_by_hand() -> None:
    assert output_margin(spec_of()) == (0, 0, 0)
    # Second axis: 1 voxel in stage 0, then pooled by 2; 2 voxels in stage 1, pooled by 2; 1 voxel in stage 2;
    # upwards 1 in stage 1 and 2 in stage 0: 1 + 2 * (2 + 2 * 1 + 1) + 2.
    assert output_margin(spec_of(padding="valid", downsampling="max_pool"))[1] == 13


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": (8, 0, 16)}, "features: found 0"),
        ({"encoder_blocks": (1, 0, 1)}, "encoder_blocks: found 0"),
        ({"kernel_shapes": ((3, 3, 3), (2, 3, 3), (3, 3, 3))}, "kernel_shapes: found an even number"),
        ({"padding": "valid", "deep_supervision": True}, "deep_supervision: needs padding 'same'"),
        ({"padding": "valid", "kernel_shapes": ((1, 3, 3), (3, 1, 3), (3, 3, 3))}, "a stride s needs a kernel of 2s-1"),
    ],
)
def test_a_spec_that_makes_no_network_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_of(**wrong)
