"""Which shapes fit a U-Net, where its output lies and how far it sees, from its spec alone: torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from pipeline.models.spec import UNetSpec

Shape = tuple[int, ...]


def receptive_field(spec: UNetSpec) -> Shape:
    """Side per axis, in voxels of the input, of what one voxel of the bottleneck sees through convolutions.

    Instance and group normalisation look at the whole patch besides, and so does a transformer in the bottleneck;
    that is not counted.
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


def bottleneck_shape(spec: UNetSpec, input_shape: Shape) -> Shape:
    """Shape of the coarsest features for an input of `input_shape`.

    Raises:
        ValueError: the input does not fit the network; the message names the nearest shapes that do.
    """
    output_shape(spec, input_shape)
    traces = [_axis_trace(spec, axis, side) for axis, side in enumerate(input_shape)]
    return tuple(trace[0] for trace in traces if trace is not None)


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


def _encoder_convolutions(spec: UNetSpec, index: int) -> int:
    stem = index == 0 and spec.stem_channels > 0
    return spec.encoder_blocks[index] * (2 if spec.block == "residual" else 1) + stem


def _decoder_convolutions(spec: UNetSpec, index: int) -> int:
    return spec.decoder_blocks[index] * (2 if spec.block_of_decoder == "residual" else 1)


def _axis_receptive_field(spec: UNetSpec, axis: int) -> int:
    field, step = 1, 1
    for index in range(spec.stages):
        kernel, stride = spec.kernel_shapes[index][axis], spec.strides[index][axis]
        count = _encoder_convolutions(spec, index)
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
        count = _encoder_convolutions(spec, index) - strided
        side -= count * (kernel - 1) if valid else 0
        if side < 1:
            return None
    bottleneck = side
    for index in reversed(range(spec.stages - 1)):
        side *= spec.strides[index + 1][axis]
        count = _decoder_convolutions(spec, index)
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
    lost = _encoder_convolutions(spec, stage) - strided
    if stage == spec.stages - 1:
        return lost * _axis_border(spec, stage, axis)
    lost += _decoder_convolutions(spec, stage)
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
