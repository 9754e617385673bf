"""What a training step takes, in bytes and operations, whichever network it is: torch-free, for the planner."""

from __future__ import annotations

from functools import lru_cache

from pipeline.models.counts import FLOAT_BYTES, activation_bytes, parameter_count
from pipeline.models.shape import Shape
from pipeline.models.spec import UNetSpec

WORKSPACE_FACTOR = 1.25
"""Memory over weights, optimiser and kept activations: gradients in flight, convolution workspaces."""

OPTIMISER_COPIES = 5
"""Weights, gradients, two moments and the averaged weights."""


def step_gb(unet: UNetSpec, shape: Shape, batch_size: int) -> float:
    """Estimate of the peak of a training step in GB (1e9 bytes), in float32; `shape` has the network's axes.

    Raises:
        ValueError: the patch does not fit the network.
    """
    kept = activation_bytes(unet, shape, batch_size) + FLOAT_BYTES * OPTIMISER_COPIES * weight_count(unet)
    return WORKSPACE_FACTOR * kept / 1e9


@lru_cache(maxsize=64)
def weight_count(unet: UNetSpec) -> int:
    """Number of trainable values; asked for at every patch that is tried, and the same for all."""
    return parameter_count(unet)
