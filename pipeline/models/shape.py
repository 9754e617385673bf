"""What a U-Net costs and which shapes fit it, counted from its spec alone: torch-free, for the planner.

`_walk` follows the data through the network and writes down each convolution. Parameters, operations and
memory are sums over that list, so that the counts cannot disagree with one another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.models.spec import UNetSpec

Shape = tuple[int, ...]

FLOAT_BYTES = 4
POOL_INDEX_BYTES = 8  # max-pooling remembers where each maximum came from, as an int64


def receptive_field(spec: UNetSpec) -> Shape:
    """Side per axis, in voxels of the input, of what one voxel of the bottleneck sees through convolutions.

    Instance and group normalisation look at the whole patch besides; that is not counted.
    """
    return tuple(_axis_receptive_field(spec, axis) for axis in range(spec.dimensions))


def output_shape(spec: UNetSpec, input_shape: Shape) -> Shape:
    """Shape of the logits for an input of `input_shape` (both without batch and channels).

    Raises:
        ValueError: the input does not fit the network; the message names the nearest shapes that do.
    """
    if len(input_shape) != spec.dimensions:
        raise ValueError(f"input shape {input_shape} has {len(input_shape)} axes, expected {spec.dimensions}")
    traces = [_axis_trace(spec, axis, side) for axis, side in enumerate(input_shape)]
    fitting = [trace for trace in traces if trace is not None]
    if len(fitting) < len(traces):
        raise ValueError(_misfit_message(spec, input_shape))
    bottleneck, output = zip(*fitting, strict=True)
    if math.prod(bottleneck) == 1 and spec.normalisation == "instance":
        raise ValueError(
            f"input shape {input_shape} leaves one voxel at the bottleneck, which instance normalisation "
            "turns into a constant: use a larger shape or fewer stages"
        )
    return output


def fitting_shapes(spec: UNetSpec, input_shape: Shape) -> tuple[Shape | None, Shape]:
    """The nearest shapes that fit the network: per axis the next side down (None if there is none) and up."""
    axes = list(enumerate(input_shape))
    smaller = [_nearest_side(spec, axis, range(side, 0, -1)) for axis, side in axes]
    larger = [_nearest_side(spec, axis, itertools.count(max(side, 1))) for axis, side in axes]
    below = None if None in smaller else tuple(side for side in smaller if side is not None)
    return below, tuple(side for side in larger if side is not None)


def output_margin(spec: UNetSpec) -> Shape:
    """Voxels of the input, per axis, before the first voxel of the output: zero with same padding."""
    strided = spec.downsampling == "strided"
    return tuple(_axis_border(spec, 0, axis) * strided + _axis_margin(spec, 0, axis) for axis in range(spec.dimensions))


def skip_margin(spec: UNetSpec, stage: int) -> Shape:
    """Voxels per axis that a skip of `stage` loses at its low end, to lie where the upsampled features lie.

    A coarse voxel upsampled begins at the middle of the strided kernel that made it, as with same padding.
    """
    return tuple(_axis_skip_margin(spec, stage, axis) for axis in range(spec.dimensions))


def parameter_count(spec: UNetSpec) -> int:
    """Number of trainable values."""
    _, smallest = fitting_shapes(spec, (1,) * spec.dimensions)
    return sum(layer.parameters for stage in _walk(spec, smallest) for layer in stage.convolutions)


def forward_flops(spec: UNetSpec, patch_shape: Shape) -> int:
    """Multiplications and additions of all convolutions in one forward pass over one patch.

    Raises:
        ValueError: the patch does not fit the network.
    """
    output_shape(spec, patch_shape)
    return sum(layer.flops for stage in _walk(spec, patch_shape) for layer in stage.convolutions)


def activation_bytes(spec: UNetSpec, patch_shape: Shape, batch_size: int) -> int:
    """Float32 bytes that backward keeps at its peak, for `spec.checkpointing` on or off.

    Off: every tensor that a layer saves. On: what has entered the stages so far, plus the inner tensors of the
    one stage that is being recomputed. Weights, the loss, gradients and passing workspace are not counted.

    Raises:
        ValueError: the patch does not fit the network.
    """
    output_shape(spec, patch_shape)
    stages = list(_walk(spec, patch_shape))
    image = spec.in_channels * math.prod(patch_shape) * FLOAT_BYTES
    if not spec.checkpointing:
        return batch_size * (image + sum(stage.kept_bytes for stage in stages))
    # Backward takes the stages in reverse, so that what later ones were given is gone by then.
    entered = itertools.accumulate((stage.output_bytes for stage in stages), initial=image)
    return batch_size * max(held + stage.kept_bytes for held, stage in zip(entered, stages, strict=False))


@dataclass(frozen=True)
class _Convolution:
    """One convolution, applied at every voxel of `shape`; backward keeps `kept` results of that shape."""

    in_channels: int
    out_channels: int
    kernel: Shape
    shape: Shape
    biased: bool = True
    normalised: bool = False
    kept: int = 0

    @property
    def parameters(self) -> int:
        weights = self.in_channels * self.out_channels * math.prod(self.kernel)
        return weights + self.out_channels * (self.biased + 2 * self.normalised)

    @property
    def flops(self) -> int:
        per_voxel = 2 * self.in_channels * self.out_channels * math.prod(self.kernel)
        return per_voxel * math.prod(self.shape)

    @property
    def kept_bytes(self) -> int:
        return self.kept * self.out_channels * math.prod(self.shape) * FLOAT_BYTES


@dataclass(frozen=True)
class _Stage:
    """An encoder or decoder stage: its convolutions, what else backward keeps, and what leaves it."""

    convolutions: tuple[_Convolution, ...]
    other_bytes: int
    output_channels: int
    output_shape: Shape

    @property
    def kept_bytes(self) -> int:
        return self.other_bytes + sum(layer.kept_bytes for layer in self.convolutions)

    @property
    def output_bytes(self) -> int:
        return _float_bytes(self.output_channels, self.output_shape)


def _walk(spec: UNetSpec, shape: Shape) -> Iterator[_Stage]:
    """The stages in the order of the data: encoder from fine to coarse, decoder from coarse to fine."""
    skip_shapes = []
    for index in range(spec.stages):
        stage = _encoder_stage(spec, index, shape)
        shape = stage.output_shape
        skip_shapes.append(shape)
        yield stage
    for index in reversed(range(spec.stages - 1)):
        stage = _decoder_stage(spec, index, shape, skip_shape=skip_shapes[index])
        shape = stage.output_shape
        yield stage


def _encoder_stage(spec: UNetSpec, index: int, shape: Shape) -> _Stage:
    channels = spec.features[index - 1] if index else spec.in_channels
    stride, other_bytes = spec.strides[index], 0
    if spec.downsampling == "max_pool" and math.prod(stride) > 1:
        shape = tuple(side // s for side, s in zip(shape, stride, strict=True))
        other_bytes = channels * math.prod(shape) * (FLOAT_BYTES + POOL_INDEX_BYTES)
        stride = (1,) * spec.dimensions
    count = spec.encoder_blocks[index]
    layers, pooled_bytes, shape = _blocks(spec, index, channels=channels, shape=shape, stride=stride, count=count)
    if spec.stages == 1:
        layers.append(_head(spec, index, shape))
    return _Stage(tuple(layers), other_bytes + pooled_bytes, spec.features[index], shape)


def _decoder_stage(spec: UNetSpec, index: int, shape: Shape, *, skip_shape: Shape) -> _Stage:
    coarse, fine = spec.features[index + 1], spec.features[index]
    stride = spec.strides[index + 1]
    upsampled = tuple(side * s for side, s in zip(shape, stride, strict=True))
    kernel = stride if spec.upsampling == "transposed" else (1,) * spec.dimensions
    layers = [_Convolution(coarse, fine, kernel, shape)]
    other_bytes = _float_bytes(2 * fine, upsampled)  # skip and upsampled features side by side
    if spec.skip == "attention":
        inner = max(fine // 2, 1)
        layers += [
            _Convolution(fine, inner, stride, shape, biased=False),
            _Convolution(coarse, inner, (1,) * spec.dimensions, shape, kept=1),
            _Convolution(inner, 1, (1,) * spec.dimensions, shape, kept=1),
        ]
        other_bytes += _float_bytes(1, upsampled)  # the coefficients
    layers_of_blocks, _, shape = _blocks(
        spec,
        index,
        channels=2 * fine,
        shape=upsampled,
        stride=(1,) * spec.dimensions,
        count=spec.decoder_blocks[index],
    )
    layers += layers_of_blocks
    if index == 0 or spec.deep_supervision:
        layers.append(_head(spec, index, shape))
    return _Stage(tuple(layers), other_bytes, fine, shape)


def _head(spec: UNetSpec, index: int, shape: Shape) -> _Convolution:
    return _Convolution(spec.features[index], spec.out_channels, (1,) * spec.dimensions, shape)


def _blocks(
    spec: UNetSpec, index: int, *, channels: int, shape: Shape, stride: Shape, count: int
) -> tuple[list[_Convolution], int, Shape]:
    """The convolutions of `count` blocks, further bytes that they keep, and the shape after them."""
    layers: list[_Convolution] = []
    other_bytes = 0
    block = _plain_block if spec.block == "plain" else _residual_block
    for _ in range(count):
        added, added_bytes = block(spec, index, channels=channels, shape=shape, stride=stride)
        layers += added
        other_bytes += added_bytes
        shape = layers[-1].shape
        channels, stride = spec.features[index], (1,) * spec.dimensions
    return layers, other_bytes, shape


def _plain_block(
    spec: UNetSpec, index: int, *, channels: int, shape: Shape, stride: Shape
) -> tuple[list[_Convolution], int]:
    """Convolution, normalisation (keeps its input), activation (keeps its result)."""
    kernel, normalised = spec.kernel_shapes[index], spec.normalisation != "none"
    return [
        _Convolution(
            channels,
            spec.features[index],
            kernel,
            _convolved(spec, shape, kernel, stride),
            biased=not normalised,
            normalised=normalised,
            kept=2 if normalised else 1,
        )
    ], 0


def _residual_block(
    spec: UNetSpec, index: int, *, channels: int, shape: Shape, stride: Shape
) -> tuple[list[_Convolution], int]:
    """Two plain blocks, the second activated after the sum; a projection where the channels change."""
    features, ones = spec.features[index], (1,) * spec.dimensions
    layers, _ = _plain_block(spec, index, channels=channels, shape=shape, stride=stride)
    second, _ = _plain_block(spec, index, channels=features, shape=layers[0].shape, stride=ones)
    layers += second
    if channels == features:
        return layers, 0
    pooled = layers[0].shape
    normalised = spec.normalisation != "none"
    projection = _Convolution(
        channels, features, ones, pooled, biased=not normalised, normalised=normalised, kept=int(normalised)
    )
    pooled_bytes = _float_bytes(channels, pooled) if math.prod(stride) > 1 else 0
    return [projection, *layers], pooled_bytes


def _convolved(spec: UNetSpec, shape: Shape, kernel: Shape, stride: Shape) -> Shape:
    if spec.padding == "same":
        return tuple(side // s for side, s in zip(shape, stride, strict=True))
    return tuple((side - k) // s + 1 for side, k, s in zip(shape, kernel, stride, strict=True))


def _float_bytes(channels: int, shape: Shape) -> int:
    return channels * math.prod(shape) * FLOAT_BYTES


def _convolutions_per_block(spec: UNetSpec) -> int:
    return 2 if spec.block == "residual" else 1


def _axis_receptive_field(spec: UNetSpec, axis: int) -> int:
    field, step = 1, 1
    for index in range(spec.stages):
        kernel, stride = spec.kernel_shapes[index][axis], spec.strides[index][axis]
        count = spec.encoder_blocks[index] * _convolutions_per_block(spec)
        if spec.downsampling == "max_pool":
            field += (stride - 1) * step
        else:
            field += (kernel - 1) * step
            count -= 1
        step *= stride
        field += count * (kernel - 1) * step
    return field


def _axis_trace(spec: UNetSpec, axis: int, side: int) -> tuple[int, int] | None:
    """Side of the bottleneck and of the output along one axis, or None if the input's side does not fit."""
    for index in range(spec.stages):
        kernel, stride = spec.kernel_shapes[index][axis], spec.strides[index][axis]
        valid, strided = spec.padding == "valid", spec.downsampling == "strided"
        covered = side - kernel if valid and strided else side
        if covered < 0 or covered % stride:
            return None
        side = covered // stride + (1 if valid and strided else 0)
        count = spec.encoder_blocks[index] * _convolutions_per_block(spec) - strided
        side -= count * (kernel - 1) if valid else 0
        if side < 1:
            return None
    bottleneck = side
    for index in reversed(range(spec.stages - 1)):
        side *= spec.strides[index + 1][axis]
        count = spec.decoder_blocks[index] * _convolutions_per_block(spec)
        side -= count * (spec.kernel_shapes[index][axis] - 1) if spec.padding == "valid" else 0
        if side < 1:
            return None
    return bottleneck, side


def _axis_border(spec: UNetSpec, stage: int, axis: int) -> int:
    """What one convolution of `stage` loses at either end."""
    return spec.kernel_shapes[stage][axis] // 2 if spec.padding == "valid" else 0


def _axis_skip_margin(spec: UNetSpec, stage: int, axis: int) -> int:
    entry = _axis_border(spec, stage + 1, axis) if spec.downsampling == "strided" else 0
    return entry + spec.strides[stage + 1][axis] * _axis_margin(spec, stage + 1, axis)


def _axis_margin(spec: UNetSpec, stage: int, axis: int) -> int:
    """Its own voxels that a stage loses at the low end, between its downsampling and its decoded features."""
    strided = spec.downsampling == "strided"
    lost = spec.encoder_blocks[stage] * _convolutions_per_block(spec) - strided
    if stage == spec.stages - 1:
        return lost * _axis_border(spec, stage, axis)
    lost += spec.decoder_blocks[stage] * _convolutions_per_block(spec)
    return lost * _axis_border(spec, stage, axis) + _axis_skip_margin(spec, stage, axis)


def _nearest_side(spec: UNetSpec, axis: int, sides: Iterable[int]) -> int | None:
    return next((side for side in sides if _axis_trace(spec, axis, side) is not None), None)


def _misfit_message(spec: UNetSpec, input_shape: Shape) -> str:
    if spec.padding == "same":
        reason = f"its sides must be divisible by {spec.downsampling_factor}"
    else:
        reason = "its valid convolutions and strides must come out even"
    nearest = " and ".join(str(shape) for shape in fitting_shapes(spec, input_shape) if shape is not None)
    return f"input shape {input_shape} does not fit the network: {reason}; nearest that fit: {nearest}"
