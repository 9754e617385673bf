"""The convolution blocks of a stage: plain, and residual (He et al. 2016, arXiv 1512.03385)."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from pipeline.models.layers import (
    AVERAGE_POOL,
    DropPath,
    StandardisedConvolution,
    activation,
    convolution,
    cropped,
    normalisation,
    pointwise,
    slope,
)
from pipeline.models.shape import Shape
from pipeline.models.spec import UNetSpec


def encoder_blocks(spec: UNetSpec, stage: int, *, in_channels: int, stride: Shape) -> nn.Sequential:
    """The blocks of one stage on the way down; the first takes the stride."""
    first = sum(spec.encoder_blocks[:stage])
    rates = spec.drop_path_rates[first : first + spec.encoder_blocks[stage]]
    return _blocks(spec, stage, kind=spec.block, in_channels=in_channels, stride=stride, rates=rates)


def stem(spec: UNetSpec) -> nn.Module:
    """What comes before the first stage of the encoder."""
    if not spec.stem_channels:
        return nn.Identity()
    ones = (1,) * spec.dimensions
    return PlainBlock(spec, 0, in_channels=spec.in_channels, out_channels=spec.stem_channels, stride=ones)


def decoder_blocks(spec: UNetSpec, stage: int, *, in_channels: int) -> nn.Sequential:
    """The blocks of one stage on the way up."""
    ones, rates = (1,) * spec.dimensions, (0.0,) * spec.decoder_blocks[stage]
    return _blocks(spec, stage, kind=spec.block_of_decoder, in_channels=in_channels, stride=ones, rates=rates)


class PlainBlock(nn.Module):
    """Convolution, normalisation, activation; to `out_channels`, which is by default those of the stage."""

    def __init__(
        self,
        spec: UNetSpec,
        stage: int,
        *,
        in_channels: int,
        out_channels: int | None = None,
        stride: Shape,
        activated: bool = True,
    ) -> None:
        super().__init__()
        channels, kernel = out_channels or spec.features[stage], spec.kernel_shapes[stage]
        bias = spec.biased_convolutions or spec.normalisation == "none"
        self.convolution = convolution(spec, in_channels, channels, kernel=kernel, stride=stride, bias=bias)
        if spec.weight_standardisation:
            self.convolution = StandardisedConvolution(self.convolution, slope=slope(spec))
        self.normalisation = normalisation(spec, channels)
        self.activation = activation(spec) if activated else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.activation(self.normalisation(self.convolution(features)))
        return result


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is added, then the activation.

    A stride pools the shortcut's average, so that it sees every voxel; new channels come from a projection.
    """

    def __init__(self, spec: UNetSpec, stage: int, *, in_channels: int, stride: Shape, drop_rate: float = 0.0) -> None:
        super().__init__()
        channels, ones = spec.features[stage], (1,) * spec.dimensions
        self.stride = stride
        self.border = tuple(k // 2 if spec.padding == "valid" else 0 for k in spec.kernel_shapes[stage])
        self.first = PlainBlock(spec, stage, in_channels=in_channels, stride=stride)
        self.second = PlainBlock(spec, stage, in_channels=channels, stride=ones, activated=False)
        self.drop_path = DropPath(drop_rate)
        self.shortcut = nn.Sequential()
        if math.prod(stride) > 1:
            self.shortcut.append(AVERAGE_POOL[spec.dimensions](stride))
        if in_channels != channels:
            bias = spec.normalisation == "none"
            self.shortcut.append(pointwise(spec, in_channels, channels, bias=bias))
            self.shortcut.append(normalisation(spec, channels))
        self.activation = activation(spec)

    def forward(self, features: Tensor) -> Tensor:
        halfway = self.first(features)
        change: Tensor = self.drop_path(self.second(halfway))
        covered = [side * s for side, s in zip(halfway.shape[2:], self.stride, strict=True)]
        shortcut = self.shortcut(cropped(features, covered, self.border))
        result: Tensor = self.activation(change + cropped(shortcut, change.shape[2:], self.border))
        return result


def _blocks(
    spec: UNetSpec,
    stage: int,
    *,
    kind: Literal["plain", "residual"],
    in_channels: int,
    stride: Shape,
    rates: tuple[float, ...],
) -> nn.Sequential:
    """One block for each of `rates`, with that probability of dropping its path."""
    blocks = nn.Sequential()
    for rate in rates:
        if kind == "plain":
            blocks.append(PlainBlock(spec, stage, in_channels=in_channels, stride=stride))
        else:
            blocks.append(ResidualBlock(spec, stage, in_channels=in_channels, stride=stride, drop_rate=rate))
        in_channels, stride = spec.features[stage], (1,) * spec.dimensions
    return blocks
