"""What a training step takes, in bytes and operations, whichever network it is: torch-free, for the planner."""

from __future__ import annotations

import math
from functools import lru_cache

from pipeline.models.counts import FLOAT_BYTES, activation_bytes, forward_flops, parameter_count
from pipeline.models.needs import NEEDS
from pipeline.models.shape import Shape, output_shape
from pipeline.models.spec import UNetSpec

WORKSPACE_FACTOR = 1.25
"""Memory over weights, optimiser and kept activations: gradients in flight, convolution workspaces."""

OPTIMISER_COPIES = 5
"""Weights, gradients, two moments and the averaged weights."""


def step_gb(name: str, unet: UNetSpec, shape: Shape, batch_size: int) -> float:
    """Estimate of the peak of a training step in GB (1e9 bytes), in float32; `shape` has the network's axes.

    Raises:
        ValueError: the patch does not fit the network.
    """
    kept = kept_bytes(name, unet, shape, batch_size) + FLOAT_BYTES * OPTIMISER_COPIES * weight_count(name, unet)
    return WORKSPACE_FACTOR * kept / 1e9


def kept_bytes(name: str, unet: UNetSpec, shape: Shape, batch_size: int) -> int:
    """Float32 bytes that backward keeps at its peak: counted for our U-Net, estimated for the others.

    Raises:
        ValueError: the patch does not fit the network.
    """
    needs = NEEDS[name]
    if needs.features is None:
        return round(needs.shares.kept * activation_bytes(unet, shape, batch_size))
    output_shape(unet, shape)
    cost = needs.costs[unet.dimensions]
    inside = cost.kept_bytes
    if unet.checkpointing and cost.checkpointed_bytes is not None:
        inside = cost.checkpointed_bytes
    image = FLOAT_BYTES * (unet.in_channels - 1)
    return round(batch_size * math.prod(shape) * (inside + image))


def patch_flops(name: str, unet: UNetSpec, shape: Shape) -> float:
    """Multiplications and additions of a forward pass over one patch.

    Raises:
        ValueError: the patch does not fit the network.
    """
    needs = NEEDS[name]
    if needs.features is None:
        return needs.shares.flops * forward_flops(unet, shape)
    output_shape(unet, shape)
    cost = needs.costs[unet.dimensions]
    channels = (unet.in_channels - 1) * cost.flops_in + (unet.out_channels - 2) * cost.flops_out
    return math.prod(shape) * (cost.flops + channels)


@lru_cache(maxsize=64)
def weight_count(name: str, unet: UNetSpec) -> int:
    """Number of trainable values; asked for at every patch that is tried, and the same for all."""
    needs = NEEDS[name]
    if needs.features is None:
        return round(needs.shares.parameters * parameter_count(unet))
    return needs.costs[unet.dimensions].parameters
