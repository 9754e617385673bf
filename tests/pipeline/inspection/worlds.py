"""Small networks that the tests of this folder share."""

from __future__ import annotations

import torch

from pipeline.models.spec import UNetSpec


def small_spec(**changes: object) -> UNetSpec:
    """Three levels of 8, 16 and 32 channels."""
    values: dict[str, object] = {"features": (8, 16, 32), "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))}
    values |= {"kernel_shapes": ((3, 3, 3),) * 3, "encoder_blocks": (1, 1, 1), "decoder_blocks": (1, 1)}
    return UNetSpec.model_validate(values | changes)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def silence(parameter: torch.Tensor | None, *, first: int = 0, axis: int = 0) -> None:
    """From index `first` along `axis` on, a parameter becomes 0."""
    assert parameter is not None
    with torch.no_grad():
        parameter.narrow(axis, first, parameter.shape[axis] - first).zero_()
