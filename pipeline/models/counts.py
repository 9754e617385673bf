"""What a U-Net costs, counted from its spec alone: torch-free, for the planner.

`_walk` follows the data through the network and writes down each convolution. Parameters, operations and
memory are sums over that list, so that the counts cannot disagree with one another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.models.shape import Shape, fitting_shapes, output_shape
from pipeline.models.spec import MLP_FACTOR, UNetSpec

FLOAT_BYTES = 4
POOL_INDEX_BYTES = 8  # max-pooling remembers where each maximum came from, as an int64


def parameter_count(spec: UNetSpec) -> int:
    """Number of trainable values."""
    _, smallest = fitting_shapes(spec, (1,) * spec.dimensions)
    return sum(stage.parameters for stage in _walk(spec, smallest))


def forward_flops(spec: UNetSpec, patch_shape: Shape) -> int:
    """Multiplications and additions of all convolutions, linear layers and attention in one forward pass over one
    patch.

    Raises:
        ValueError: the patch does not fit the network.
    """
    output_shape(spec, patch_shape)
    return sum(stage.flops for stage in _walk(spec, patch_shape))


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
        kept = batch_size * (image + sum(stage.kept_bytes for stage in stages))
        return kept + sum(stage.kept_once_bytes for stage in stages)
    # Backward takes the stages in reverse, so that what later ones were given is gone by then.
    entered = itertools.accumulate((stage.output_bytes for stage in stages), initial=image)
    return max(
        batch_size * (held + stage.kept_bytes) + stage.kept_once_bytes
        for held, stage in zip(entered, stages, strict=False)
    )


@dataclass(frozen=True)
class _Convolution:
    """One convolution, applied at every voxel of `shape`; backward keeps `kept` results of that shape."""

    in_channels: int
    out_channels: int
    kernel: Shape
    shape: Shape
    biased: bool = True
    normalised: bool = False
    standardised: bool = False
    kept: int = 0

    @property
    def weights(self) -> int:
        return self.in_channels * self.out_channels * math.prod(self.kernel)

    @property
    def parameters(self) -> int:
        weights = self.weights
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
    """A stage of the encoder or decoder, or the bottleneck's transformer: its convolutions (a linear layer is one
    of a single voxel), what else backward keeps for each patch, what else it has and does, and what leaves it.
    """

    convolutions: tuple[_Convolution, ...]
    other_bytes: int
    output_channels: int
    output_shape: Shape
    other_parameters: int = 0
    other_flops: int = 0
    other_once_bytes: int = 0

    @property
    def parameters(self) -> int:
        return self.other_parameters + sum(layer.parameters for layer in self.convolutions)

    @property
    def flops(self) -> int:
        return self.other_flops + sum(layer.flops for layer in self.convolutions)

    @property
    def kept_bytes(self) -> int:
        return self.other_bytes + sum(layer.kept_bytes for layer in self.convolutions)

    @property
    def kept_once_bytes(self) -> int:
        """Whatever the batch: standardised weights, angles of rotary positions."""
        return self.other_once_bytes + sum(
            layer.weights * FLOAT_BYTES for layer in self.convolutions if layer.standardised
        )

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
    if spec.bottleneck == "transformer":
        yield _transformer_stage(spec, shape)
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
    kinds: list[str] = [spec.block] * spec.encoder_blocks[index]
    stem: list[_Convolution] = []
    if index == 0 and spec.stem_channels:
        stem, _ = _plain_block(spec, 0, channels=channels, shape=shape, stride=stride, out_channels=spec.stem_channels)
        channels, shape = spec.stem_channels, stem[0].shape
    layers, pooled_bytes, shape = _blocks(spec, index, kinds, channels=channels, shape=shape, stride=stride)
    layers = stem + layers
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
    kinds, ones = [spec.block_of_decoder] * spec.decoder_blocks[index], (1,) * spec.dimensions
    layers_of_blocks, _, shape = _blocks(spec, index, kinds, channels=2 * fine, shape=upsampled, stride=ones)
    layers += layers_of_blocks
    if index == 0 or spec.deep_supervision:
        layers.append(_head(spec, index, shape))
    return _Stage(tuple(layers), other_bytes, fine, shape)


def _transformer_stage(spec: UNetSpec, shape: Shape) -> _Stage:
    """For each layer backward keeps, in channels a token: what comes in, twice normalised, queries, keys and values,
    what attention gives, what comes of it and that normalised, the perceptron's inside twice. And for attention's
    softmax a number a head, for each normalisation two.
    """
    channels, tokens, layers = spec.features[-1], math.prod(shape), spec.transformer_layers
    one = (1,) * spec.dimensions
    widths = ((1, 2), (1, 1), (1, 1), (1, MLP_FACTOR), (MLP_FACTOR, 1))
    linear = [_Convolution(a * channels, b * channels, one, shape) for a, b in widths] * layers
    kept = layers * ((8 + 2 * MLP_FACTOR) * channels + spec.transformer_heads + 4)
    learned = spec.positions == "learned"
    turned = 0 if learned else channels // spec.transformer_heads // (2 * spec.dimensions) * spec.dimensions
    return _Stage(
        tuple(linear),
        # The first layer is given what the convolutions keep already, unless positions were added to it.
        _float_bytes(kept + channels * learned, shape),
        channels,
        shape,
        other_parameters=layers * 2 * 2 * channels + learned * channels * math.prod(spec.position_grid),
        other_flops=layers * 2 * 2 * tokens * tokens * channels,
        other_once_bytes=_float_bytes(2 * turned, shape),
    )


def _head(spec: UNetSpec, index: int, shape: Shape) -> _Convolution:
    return _Convolution(spec.features[index], spec.out_channels, (1,) * spec.dimensions, shape)


def _blocks(
    spec: UNetSpec, index: int, kinds: Sequence[str], *, channels: int, shape: Shape, stride: Shape
) -> tuple[list[_Convolution], int, Shape]:
    """The convolutions of blocks of those kinds, further bytes that they keep, and the shape after them."""
    layers: list[_Convolution] = []
    other_bytes = 0
    for kind in kinds:
        block = _plain_block if kind == "plain" else _residual_block
        added, added_bytes = block(spec, index, channels=channels, shape=shape, stride=stride)
        layers += added
        other_bytes += added_bytes
        shape = layers[-1].shape
        channels, stride = spec.features[index], (1,) * spec.dimensions
    return layers, other_bytes, shape


def _plain_block(
    spec: UNetSpec, index: int, *, channels: int, shape: Shape, stride: Shape, out_channels: int | None = None
) -> tuple[list[_Convolution], int]:
    """Convolution, normalisation (keeps its input), activation (keeps its result)."""
    kernel, normalised = spec.kernel_shapes[index], spec.normalisation != "none"
    return [
        _Convolution(
            channels,
            out_channels or spec.features[index],
            kernel,
            _convolved(spec, shape, kernel, stride),
            biased=spec.biased_convolutions or not normalised,
            normalised=normalised,
            standardised=spec.weight_standardisation,
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
