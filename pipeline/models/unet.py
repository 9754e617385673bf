"""The U-Net, with every choice of it as a value of `UNetSpec`. From top to bottom: blocks, attention gate,
encoder and decoder stages, gradient checkpointing, the network, its initial weights.

Sources: Ronneberger et al. 2015 (arXiv 1505.04597), Çiçek et al. 2016 (1606.06650), He et al. 2015 and 2016
(1502.01852, 1512.03385), Oktay et al. 2018 (1804.03999), Chen et al. 2016 (checkpointing, 1604.06174).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from pipeline.models.shape import Shape, output_shape, skip_margin
from pipeline.models.spec import UNetSpec, unet_2015

__all__ = ["UNet", "unet_2015"]

LEAKY_SLOPE = 0.01
LARGEST_GROUP_COUNT = 8

Maker = Callable[..., nn.Module]
CONVOLUTION: dict[int, Maker] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Maker] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMALISATION: dict[int, Maker] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAXIMUM_POOL: dict[int, Maker] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOL: dict[int, Maker] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


def _convolution(
    spec: UNetSpec, in_channels: int, out_channels: int, *, kernel: Shape, stride: Shape, bias: bool = True
) -> nn.Module:
    padding = tuple(k // 2 if spec.padding == "same" else 0 for k in kernel)
    make = CONVOLUTION[spec.dimensions]
    return make(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=bias)


def _pointwise(spec: UNetSpec, in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    ones = (1,) * spec.dimensions
    return _convolution(spec, in_channels, out_channels, kernel=ones, stride=ones, bias=bias)


def _normalisation(spec: UNetSpec, channels: int) -> nn.Module:
    match spec.normalisation:
        case "instance":
            # One group per channel is instance normalisation, several times faster than torch's own on a CPU.
            return nn.GroupNorm(channels, channels)
        case "group":
            return nn.GroupNorm(math.gcd(channels, LARGEST_GROUP_COUNT), channels)
        case "batch":
            return BATCH_NORMALISATION[spec.dimensions](channels)
        case "none":
            return nn.Identity()


def _activation(spec: UNetSpec) -> nn.Module:
    # In place, so that only the result is kept for backward; nothing before it needs its own output there.
    return nn.ReLU(inplace=True) if spec.activation == "relu" else nn.LeakyReLU(LEAKY_SLOPE, inplace=True)


def _cropped(tensor: Tensor, shape: Sequence[int], margin: Shape) -> Tensor:
    """The part of `tensor` (B,C,...) from voxel `margin` on, in the spatial shape `shape`; a view."""
    for axis, (side, start) in enumerate(zip(shape, margin, strict=True), start=2):
        if side != tensor.shape[axis]:
            tensor = tensor.narrow(axis, start, side)
    return tensor


class PlainBlock(nn.Module):
    """Convolution, normalisation, activation."""

    def __init__(self, spec: UNetSpec, stage: int, *, in_channels: int, stride: Shape, activated: bool = True) -> None:
        super().__init__()
        channels, kernel = spec.features[stage], spec.kernel_shapes[stage]
        bias = spec.normalisation == "none"
        self.convolution = _convolution(spec, in_channels, channels, kernel=kernel, stride=stride, bias=bias)
        self.normalisation = _normalisation(spec, channels)
        self.activation = _activation(spec) if activated else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.activation(self.normalisation(self.convolution(features)))
        return result


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is added (He et al. 2016), then the activation.

    A stride pools the shortcut's average, so that it sees every voxel; new channels come from a projection.
    """

    def __init__(self, spec: UNetSpec, stage: int, *, in_channels: int, stride: Shape) -> None:
        super().__init__()
        channels, ones = spec.features[stage], (1,) * spec.dimensions
        self.stride = stride
        self.border = tuple(k // 2 if spec.padding == "valid" else 0 for k in spec.kernel_shapes[stage])
        self.first = PlainBlock(spec, stage, in_channels=in_channels, stride=stride)
        self.second = PlainBlock(spec, stage, in_channels=channels, stride=ones, activated=False)
        self.shortcut = nn.Sequential()
        if math.prod(stride) > 1:
            self.shortcut.append(AVERAGE_POOL[spec.dimensions](stride))
        if in_channels != channels:
            bias = spec.normalisation == "none"
            self.shortcut.append(_pointwise(spec, in_channels, channels, bias=bias))
            self.shortcut.append(_normalisation(spec, channels))
        self.activation = _activation(spec)

    def forward(self, features: Tensor) -> Tensor:
        halfway = self.first(features)
        change: Tensor = self.second(halfway)
        covered = [side * s for side, s in zip(halfway.shape[2:], self.stride, strict=True)]
        shortcut = self.shortcut(_cropped(features, covered, self.border))
        result: Tensor = self.activation(change + _cropped(shortcut, change.shape[2:], self.border))
        return result


def _blocks(spec: UNetSpec, stage: int, *, count: int, in_channels: int, stride: Shape) -> nn.Sequential:
    block = PlainBlock if spec.block == "plain" else ResidualBlock
    ones = (1,) * spec.dimensions
    later = (block(spec, stage, in_channels=spec.features[stage], stride=ones) for _ in range(count - 1))
    return nn.Sequential(block(spec, stage, in_channels=in_channels, stride=stride), *later)


class AttentionGate(nn.Module):
    """Weighs each voxel of a skip by what the coarser features ask for (Oktay et al. 2018, figure 2)."""

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        channels, coarse_channels = spec.features[stage], spec.features[stage + 1]
        stride = spec.strides[stage + 1]
        inner = max(channels // 2, 1)
        self.skip = CONVOLUTION[spec.dimensions](channels, inner, stride, stride=stride, bias=False)
        self.gate = _pointwise(spec, coarse_channels, inner)
        self.score = _pointwise(spec, inner, 1)
        self.mode = LINEAR[spec.dimensions]

    def coefficients(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """(B,1,...) in [0, 1], on the grid of `skip`."""
        joint = functional.relu(self.skip(skip) + self.gate(coarse), inplace=True)
        weights = torch.sigmoid(self.score(joint))
        return functional.interpolate(weights, size=skip.shape[2:], mode=self.mode, align_corners=False)

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        return skip * self.coefficients(skip, coarse)


class EncoderStage(nn.Module):
    """One resolution on the way down: maximum pooling if the spec says so, then blocks."""

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        in_channels = spec.features[stage - 1] if stage else spec.in_channels
        stride = spec.strides[stage]
        self.pool: nn.Module = nn.Identity()
        if spec.downsampling == "max_pool" and math.prod(stride) > 1:
            self.pool = MAXIMUM_POOL[spec.dimensions](stride)
            stride = (1,) * spec.dimensions
        count = spec.encoder_blocks[stage]
        self.blocks = _blocks(spec, stage, count=count, in_channels=in_channels, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.pool(features))
        return result


class InterpolatedUpsampling(nn.Module):
    """Linear interpolation, and a 1x1 convolution to halve the features.

    Both are linear and the interpolation's weights sum to one, so their order does not change the result:
    the convolution comes first, where there are fewer voxels.
    """

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        self.convolution = _pointwise(spec, spec.features[stage + 1], spec.features[stage])
        self.factor = tuple(float(s) for s in spec.strides[stage + 1])
        self.mode = LINEAR[spec.dimensions]

    def forward(self, coarse: Tensor) -> Tensor:
        halved: Tensor = self.convolution(coarse)
        return functional.interpolate(halved, scale_factor=self.factor, mode=self.mode, align_corners=False)


class DecoderStage(nn.Module):
    """One resolution on the way up: upsample, join with the (cropped, gated) skip, then blocks."""

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        channels, coarse_channels = spec.features[stage], spec.features[stage + 1]
        self.stride = spec.strides[stage + 1]
        self.margin = skip_margin(spec, stage)
        self.upsampling: nn.Module = InterpolatedUpsampling(spec, stage)
        if spec.upsampling == "transposed":
            make = TRANSPOSED[spec.dimensions]
            self.upsampling = make(coarse_channels, channels, self.stride, stride=self.stride)
        self.gate = AttentionGate(spec, stage) if spec.skip == "attention" else None
        ones, count = (1,) * spec.dimensions, spec.decoder_blocks[stage]
        self.blocks = _blocks(spec, stage, count=count, in_channels=2 * channels, stride=ones)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        skip = self.cropped(skip, coarse)
        if self.gate is not None:
            skip = self.gate(skip, coarse)
        result: Tensor = self.blocks(torch.cat((self.upsampling(coarse), skip), dim=1))
        return result

    def cropped(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """The part of `skip` that `coarse` covers; all of it with same padding."""
        covered = [side * s for side, s in zip(coarse.shape[2:], self.stride, strict=True)]
        return _cropped(skip, covered, self.margin)


class _SpareRunningStatistics(AbstractContextManager[None]):
    """While entered, batch normalisation updates copies of its running statistics, which are then dropped.

    A recomputed forward pass must not count its batch a second time. May be entered repeatedly.
    """

    NAMES = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, module: nn.Module) -> None:
        self._layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._originals: list[tuple[_BatchNorm, str, Tensor]] = []

    def __enter__(self) -> None:
        self._originals = [(bn, name, getattr(bn, name)) for bn in self._layers for name in self.NAMES]
        for layer, name, original in self._originals:
            setattr(layer, name, original.clone())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, name, original in self._originals:
            setattr(layer, name, original)
        self._originals = []


def _checkpointed(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, which runs `module`: keeps its inputs, recomputes the rest in backward."""
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in this network is random
        context_fn=lambda: (nullcontext(), _SpareRunningStatistics(module)),
    )


class UNet(nn.Module):
    """A U-Net of `spec`, 2D or 3D.

    Input (B, in_channels, ...), output logits (B, out_channels, ...): of the input's shape with same padding,
    of `shape.output_shape` with valid convolutions. With deep supervision and in training mode the output is
    a tuple of logits, one for each decoder stage, finest first.
    """

    def __init__(self, spec: UNetSpec, generator: torch.Generator | None = None) -> None:
        """Weights come from `generator`, or from torch's global one; no other random number is drawn."""
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):  # the layers' own initial values, all of them replaced below
            self.encoder = nn.ModuleList(EncoderStage(spec, stage) for stage in range(spec.stages))
            self.decoder = nn.ModuleList(DecoderStage(spec, stage) for stage in range(spec.stages - 1))
            supervised = max(spec.stages - 1, 1) if spec.deep_supervision else 1
            self.heads = nn.ModuleList(
                _pointwise(spec, spec.features[stage], spec.out_channels) for stage in range(supervised)
            )
        _initialise(self, generator)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits for `image`.

        Raises:
            ValueError: the image's shape does not fit; the message names the nearest ones that do.
        """
        skips = self._encode(image)
        features = skips.pop()
        outputs = [] if self.decoder else [self.heads[0](features)]
        for stage in reversed(range(len(self.decoder))):
            features, logits = self._run(self.decoder[stage], self._decode, stage, features, skips.pop())
            outputs += [] if logits is None else [logits]
        supervised = self.spec.deep_supervision and self.training
        return tuple(reversed(outputs)) if supervised else outputs[-1]

    @torch.no_grad()
    def attention_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of every attention gate, finest first: (B,1,...) in [0, 1] on its (cropped) skip.

        Raises:
            ValueError: the network has no attention gates or is in training mode, or `image` does not fit.
        """
        if self.spec.skip != "attention":
            raise ValueError(f"found skip '{self.spec.skip}', expected 'attention': there are no maps")
        if self.training:
            raise ValueError("found training mode: call eval() first, so that reading changes nothing")
        skips = self._encode(image)
        features = skips.pop()
        maps = []
        for stage in reversed(range(len(self.decoder))):
            decoder: Any = self.decoder[stage]
            skip = skips.pop()
            maps.append(decoder.gate.coefficients(decoder.cropped(skip, features), features))
            features = decoder(features, skip)
        return tuple(reversed(maps))

    def _encode(self, image: Tensor) -> list[Tensor]:
        """The features of every encoder stage, finest first; the last is the bottleneck's."""
        output_shape(self.spec, tuple(image.shape[2:]))
        features = [image]
        for stage in self.encoder:
            features.append(self._run(stage, stage, features[-1]))
        return features[1:]

    def _decode(self, stage: int, coarse: Tensor, skip: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of one decoder stage, and its logits where they are wanted."""
        features: Tensor = self.decoder[stage](coarse, skip)
        wanted = stage == 0 or (self.spec.deep_supervision and self.training)
        return features, self.heads[stage](features) if wanted else None

    def _run(self, module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(*inputs)`, checkpointed in training if the spec asks for it."""
        if self.spec.checkpointing and self.training:
            return _checkpointed(module, function, *inputs)
        return function(*inputs)


def _initialise(network: UNet, generator: torch.Generator | None) -> None:
    """He's normal initialisation for the activation in use (He et al. 2015); biases are zero, scales one."""
    slope = LEAKY_SLOPE if network.spec.activation == "leaky_relu" else 0.0
    for module in network.modules():
        if not isinstance(module, _ConvNd):
            continue
        if module.transposed:
            # Kernel and stride are equal: a voxel sums over the input channels alone, and is not activated.
            nn.init.normal_(module.weight, std=module.in_channels**-0.5, generator=generator)
        else:
            nn.init.kaiming_normal_(module.weight, a=slope, generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
