"""Bundles of small networks with weights as drawn, one for each choice that a U-Net has."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.bundle import BundleIndex, ModelBundle
from pipeline.models.registry import build_network
from pipeline.models.slices import as_volume_network
from pipeline.models.spec import UNetSpec
from pipeline.plan import Plan
from transforms.labels import schema_from_names

TRANSFORMER = {"bottleneck": "transformer", "transformer_layers": 1, "transformer_heads": 1}
CHOICES: dict[str, dict[str, Any]] = {
    "instance normalisation": {},
    "group normalisation": {"normalisation": "group"},
    "batch normalisation": {"normalisation": "batch"},
    "no normalisation": {"normalisation": "none"},
    "interpolated upsampling": {"upsampling": "interpolated"},
    "attention gates": {"skip": "attention"},
    "transformer, rotary positions": TRANSFORMER,
    "transformer, learned positions": {**TRANSFORMER, "positions": "learned", "position_grid": (4, 2, 4)},
    "residual, standardised weights": {"block": "residual", "weight_standardisation": True},
    "deep supervision": {"deep_supervision": True},
    "maximum pooling": {"downsampling": "max_pool"},
}
"""What differs from the defaults of `bundle_of`."""


def bundle_of(plan: Plan, *, network: str = "unet", **choices: Any) -> ModelBundle:
    """`plan` with another network on patches of 16x8x16 (of one slice in 2D), not trained."""
    dimensions = choices.get("dimensions", 3)
    ones, twos = (1,) * dimensions, (2,) * dimensions
    spec: dict[str, Any] = {
        "dimensions": dimensions,
        "out_channels": 3,
        "features": (4, 6, 8),
        "strides": (ones, twos, twos),
        "kernel_shapes": ((3,) * dimensions,) * 3,
        "encoder_blocks": (1, 1, 1),
        "decoder_blocks": (1, 1),
    }
    unet = UNetSpec(**(spec | choices))
    patch, slice_axis = ((16, 8, 16), None) if dimensions == 3 else ((16, 1, 8), 1)
    changed = plan.model_copy(update={"network": network, "unet": unet, "patch_shape": patch, "slice_axis": slice_axis})
    sides = tuple(side for axis, side in enumerate(patch) if axis != slice_axis)
    built = build_network(network, unet, sides, generator=torch.Generator().manual_seed(7))
    _spread_statistics(built)
    index = BundleIndex(name="small", fold=None, mirror=False, tile_step=0.5, provenance={}, sha256={})
    schema = schema_from_names({1: "one", 5: "five"})
    return ModelBundle(index, changed, schema, as_volume_network(built, slice_axis).eval(), "0" * 64)


def _spread_statistics(network: torch.nn.Module) -> None:
    """Scales, shifts and running statistics as after a training: as drawn they change nothing."""
    generator = torch.Generator().manual_seed(8)
    for name, values in (*network.named_parameters(), *network.named_buffers()):
        if values.ndim == 1 and values.dtype == torch.float32:
            drawn = torch.rand(values.shape, generator=generator)
            values.data.copy_(drawn + 0.5 if name.endswith(("weight", "var")) else drawn - 0.5)
