"""The layers that every block of the U-Net is made of, in 2D and 3D, as the spec asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.shape import Shape
from pipeline.models.spec import UNetSpec

LARGEST_GROUP_COUNT = 8
STANDARDISATION_EPSILON = 1e-5

Maker = Callable[..., nn.Module]
CONVOLUTION: dict[int, Maker] = {2: nn.Conv2d, 3: nn.Conv3d}
CONVOLVE: dict[int, Callable[..., Tensor]] = {2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED: dict[int, Maker] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMALISATION: dict[int, Maker] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAXIMUM_POOL: dict[int, Maker] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOL: dict[int, Maker] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


def convolution(
    spec: UNetSpec, in_channels: int, out_channels: int, *, kernel: Shape, stride: Shape, bias: bool = True
) -> nn.Module:
    """A convolution with the spec's padding."""
    padding = tuple(k // 2 if spec.padding == "same" else 0 for k in kernel)
    make = CONVOLUTION[spec.dimensions]
    return make(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=bias)


def pointwise(spec: UNetSpec, in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """A convolution that mixes the channels of each voxel."""
    ones = (1,) * spec.dimensions
    return convolution(spec, in_channels, out_channels, kernel=ones, stride=ones, bias=bias)


def normalisation(spec: UNetSpec, channels: int) -> nn.Module:
    """The spec's normalisation, with a scale and a shift a channel."""
    match spec.normalisation:
        case "instance":
            # One group per channel is instance normalisation, several times faster than torch's own on a CPU.
            return nn.GroupNorm(channels, channels, eps=spec.normalisation_epsilon)
        case "group":
            groups = math.gcd(channels, LARGEST_GROUP_COUNT)
            return nn.GroupNorm(groups, channels, eps=spec.normalisation_epsilon)
        case "batch":
            return BATCH_NORMALISATION[spec.dimensions](channels, eps=spec.normalisation_epsilon)
        case "none":
            return nn.Identity()


def activation(spec: UNetSpec) -> nn.Module:
    """The spec's activation."""
    # In place, so that only the result is kept for backward; nothing before it needs its own output there.
    return nn.ReLU(inplace=True) if spec.activation == "relu" else nn.LeakyReLU(spec.leaky_slope, inplace=True)


def slope(spec: UNetSpec) -> float:
    """Of the activation, below zero."""
    return spec.leaky_slope if spec.activation == "leaky_relu" else 0.0


def cropped(tensor: Tensor, shape: Sequence[int], margin: Shape) -> Tensor:
    """The part of `tensor` (B,C,...) from voxel `margin` on, in the spatial shape `shape`; a view."""
    for axis, (side, start) in enumerate(zip(shape, margin, strict=True), start=2):
        if side != tensor.shape[axis]:
            tensor = tensor.narrow(axis, start, side)
    return tensor


class StandardisedConvolution(nn.Module):
    """A convolution whose weights have mean 0 and one variance for each output channel (Qiao et al. 2019,
    arXiv 1903.10520), computed anew in every pass from the weights that are learnt.

    The variance is the one He's initialisation would draw, so that without a normalisation signals keep their size.
    """

    def __init__(self, layer: nn.Module, *, slope: float) -> None:
        """`layer` is nn.Conv2d or nn.Conv3d and holds the learnt weights; `slope` is the activation's below zero."""
        super().__init__()
        self.layer = layer
        self.slope = slope

    def forward(self, features: Tensor) -> Tensor:
        layer = self.layer
        assert isinstance(layer, nn.Conv2d | nn.Conv3d)
        convolve = CONVOLVE[features.ndim - 2]
        return convolve(features, self.weight(), layer.bias, stride=layer.stride, padding=layer.padding)

    def weight(self) -> Tensor:
        """What the convolution uses."""
        learnt = self.layer.weight
        assert isinstance(learnt, Tensor)
        rows = learnt.flatten(1)
        scale = math.sqrt(2 / ((1 + self.slope**2) * rows.shape[1]))
        # A layer normalisation of each row: autograd keeps the learnt weights for it and nothing else.
        rows = functional.layer_norm(rows, rows.shape[1:], eps=STANDARDISATION_EPSILON**2)
        return (rows * scale).view_as(learnt)


class DropPath(nn.Module):
    """In training, leaves out each sample's branch with probability `rate` and scales up the others
    (stochastic depth, Huang et al. 2016, arXiv 1603.09382). Draws from the device's default generator.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, change: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return change
        kept = 1.0 - self.rate
        one_a_sample = (change.shape[0], *(1,) * (change.ndim - 1))
        mask = torch.empty(one_a_sample, dtype=change.dtype, device=change.device).bernoulli_(kept).div_(kept)
        return change * mask
