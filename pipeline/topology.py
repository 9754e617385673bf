"""Patch and spacing -> the stages of a network: strides, kernels, widths, blocks. Pure; no budget is known here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.config import NetworkConfig
from pipeline.errors import PlanError
from pipeline.models.needs import Needs, needs_of
from pipeline.models.shape import bottleneck_shape
from pipeline.models.spec import UNetSpec
from pipeline.plan import Spacing, Triple

SMALLEST_SIDE = 4
"""Axes are halved as long as at least this many voxels remain in the bottleneck."""

SMALLEST_PATCH_SIDE = 4 * SMALLEST_SIDE
"""Patches do not shrink below this along any axis that has as many voxels: two halvings, and a bottleneck."""

MOST_STAGES = 6
MOST_FEATURES = {2: 512, 3: 320}
HEAD_CHANNELS = 32
"""Channels of one head of a transformer, where the config does not say how many heads there are."""

RESIDUAL_ENCODER_BLOCKS = (1, 3, 4, 6, 6, 6)
"""Residual blocks of each encoder stage of the presets; the decoder has one plain block a stage
(nnU-Net's residual encoders, Isensee et al. 2024, arXiv 2404.09556; their stem is left out)."""

PRESET_GB = {"resenc_m": 8.0, "resenc_l": 24.0, "resenc_xl": 40.0}
"""Memory that each preset is meant to fill: they differ in patch and batch alone."""


@dataclass(frozen=True)
class Topology:
    """What is fixed about a network before its patch and width are chosen. `features` are those set by hand."""

    network: NetworkConfig
    in_channels: int
    out_channels: int
    spacing_mm: Spacing
    slice_axis: int | None
    features: tuple[int, ...] | None = None

    @property
    def needs(self) -> Needs:
        """What the network asks for."""
        return needs_of(self.network.name)

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return self.network.dimensions

    def spec(self, patch: Triple, width: int) -> UNetSpec:
        """The network for patches of about that size, `width` channels wide at full resolution.

        Raises:
            PlanError: no network can be built like that; the message names the key of the config.
        """
        strides, kernels = self._own_stages() if self.needs.features else self._planned_stages(patch)
        stages = len(strides)
        features = self.needs.features or self.features
        features = features or tuple(min(width * 2**s, MOST_FEATURES[self.dimensions]) for s in range(stages))
        values: dict[str, Any] = {
            "dimensions": self.dimensions,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "features": features[:stages],
            "strides": strides,
            "kernel_shapes": kernels,
            "checkpointing": self.network.checkpointing == "on",
            **self._blocks(stages),
        }
        values |= self._choices(features[stages - 1], self.network_shape(patch), strides) if self.needs.ours else {}
        try:
            return UNetSpec.model_validate(values)
        except ValidationError as error:
            raise PlanError(f"network.{error.errors()[0]['msg'].removeprefix('Value error, ')}") from error

    def fitted(self, unet: UNetSpec, patch: Triple) -> UNetSpec:
        """`unet` with what depends on the very patch: where learned positions lie."""
        if unet.bottleneck == "convolution" or unet.positions == "rotary":
            return unet
        return unet.model_copy(update={"position_grid": bottleneck_shape(unet, self.network_shape(patch))})

    def network_shape(self, patch: Triple) -> tuple[int, ...]:
        """The patch without the axis across slices."""
        return tuple(n for axis, n in enumerate(patch) if axis != self.slice_axis)

    def with_slice_axis(self, shape: Sequence[int]) -> Triple:
        """The network's axes as three, with 1 across slices."""
        sides = list(shape)
        if self.slice_axis is not None:
            sides.insert(self.slice_axis, 1)
        return sides[0], sides[1], sides[2]

    def factor(self, unet: UNetSpec) -> Triple:
        """What the sides of a patch must be divisible by; 1 across slices."""
        return self.with_slice_axis(unet.downsampling_factor)

    def _own_stages(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        count = len(self.needs.features or ())
        ones, twos, threes = ((n,) * self.dimensions for n in (1, 2, 3))
        return (ones, *(twos,) * (count - 1)), (threes,) * count

    def _planned_stages(self, patch: Triple) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        sides = list(self.network_shape(patch))
        spacing = [s for a, s in enumerate(self.spacing_mm) if a != self.slice_axis]
        strides, kernels = [(1,) * self.dimensions], [_kernel(spacing)]
        most = MOST_STAGES if self.features is None else len(self.features)
        while len(strides) < most:
            stride = _next_stride(sides, spacing)
            if max(stride) == 1:
                break
            sides = [math.ceil(n / s) for n, s in zip(sides, stride, strict=True)]
            spacing = [x * s for x, s in zip(spacing, stride, strict=True)]
            strides.append(stride)
            kernels.append(_kernel(spacing))
        return tuple(strides), tuple(kernels)

    def _blocks(self, stages: int) -> dict[str, Any]:
        """Kinds and counts of the blocks of every stage."""
        if self.network.preset is not None:
            return {
                "block": "residual",
                "decoder_block": "plain",
                "encoder_blocks": RESIDUAL_ENCODER_BLOCKS[:stages],
                "decoder_blocks": (1,) * (stages - 1),
            }
        if self.needs.ours:
            return {
                "block": self.network.block,
                "encoder_blocks": (2,) * stages,
                # Full resolution costs most and gains least from a second convolution (benchmarks/LOG.md).
                "decoder_blocks": (1, *(2,) * (stages - 2)) if stages > 1 else (),
            }
        residual = self.needs.residual or (self.needs.follows("block") and self.network.block == "residual")
        count = 1 if residual else 2  # of two convolutions each, or of one
        return {
            "block": "residual" if residual else "plain",
            "encoder_blocks": (count,) * stages,
            "decoder_blocks": (count,) * (stages - 1),
        }

    def _choices(self, channels: int, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What the config says of our U-Net, as the spec has it."""
        names = ("normalisation", "skip", "upsampling", "deep_supervision", "bottleneck", "drop_path")
        values = {name: getattr(self.network, name) for name in (*names, "weight_standardisation")}
        if self.network.bottleneck == "convolution":
            return values
        coarse = [math.prod(stage[axis] for stage in strides) for axis in range(len(shape))]
        return values | {
            "transformer_layers": self.network.transformer_layers,
            "transformer_heads": self.network.transformer_heads or _heads(channels),
            "positions": self.network.positions,
            "position_grid": tuple(max(1, n // c) for n, c in zip(shape, coarse, strict=True)),
        }


def _heads(channels: int) -> int:
    """One for every 32 channels or so, such that all are equal."""
    return next(count for count in range(max(channels // HEAD_CHANNELS, 1), 0, -1) if channels % count == 0)


def _next_stride(sides: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Halve the axes that are long enough and not yet much coarser than the finest such axis."""
    able = [n >= 2 * SMALLEST_SIDE for n in sides]
    if not any(able):
        return (1,) * len(sides)
    finest = min(s for s, a in zip(spacing_mm, able, strict=True) if a)
    return tuple(2 if a and s < 2 * finest else 1 for s, a in zip(spacing_mm, able, strict=True))


def _kernel(spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """3, but 1 across an axis at least twice as coarse as the finest: neighbours there are far away."""
    return tuple(1 if s >= 2 * min(spacing_mm) else 3 for s in spacing_mm)
