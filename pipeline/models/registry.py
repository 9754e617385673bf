"""Every network that can be trained, by name: our U-Net, and others from MONAI built from the same numbers.

The others take dimensions and channels from the spec; DynUNet and Attention U-Net its features and strides
too, DynUNet its kernels and blocks besides. All else that they are is written here. MONAI is imported inside
their builders: that takes seconds, and our own network does not need it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.errors import PlanError
from pipeline.models.needs import needs_of
from pipeline.models.shape import Shape, output_shape
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet


def build_network(
    name: str, spec: UNetSpec, patch_shape: Shape, *, generator: torch.Generator | None = None
) -> nn.Module:
    """The network called `name` in `NETWORKS`, with weights drawn from `generator` (or torch's global one).

    Raises:
        PlanError: no such network, one that cannot do what the spec asks, or a patch that does not fit it.
    """
    _check(name, spec, patch_shape)
    build = NETWORKS[name]
    if generator is None:
        return build(spec)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(spec)


def require_network(name: str) -> None:
    """Raise PlanError if there is no network of that name; the nearest and all others are named."""
    needs_of(name)


def _unet(spec: UNetSpec) -> nn.Module:
    return UNet(spec)


def _segresnet(spec: UNetSpec) -> nn.Module:
    """Myronenko 2018 (arXiv 1810.11654), without its variational branch."""
    from monai.networks.nets.segresnet import SegResNet

    return SegResNet(
        spatial_dims=spec.dimensions,
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        init_filters=16,
        blocks_down=(1, 2, 2, 4),
        blocks_up=(1, 1, 1),
    )


def _swin_unetr(spec: UNetSpec) -> nn.Module:
    """Hatamizadeh et al. 2022 (arXiv 2201.01266)."""
    from monai.networks.nets.swin_unetr import SwinUNETR

    return SwinUNETR(
        spatial_dims=spec.dimensions,
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        feature_size=24,
        use_checkpoint=spec.checkpointing,
    )


def _dynunet(spec: UNetSpec) -> nn.Module:
    """Isensee et al. 2021 (nnU-Net's network, arXiv 1904.08128), with MONAI's own layers."""
    from monai.networks.nets.dynunet import DynUNet

    return DynUNet(
        spatial_dims=spec.dimensions,
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        kernel_size=spec.kernel_shapes,
        strides=spec.strides,
        upsample_kernel_size=spec.strides[1:],
        filters=spec.features,
        res_block=spec.block == "residual",
    )


def _attention_unet(spec: UNetSpec) -> nn.Module:
    """Oktay et al. 2018 (arXiv 1804.03999); kernels are 3 along every axis."""
    from monai.networks.nets.attentionunet import AttentionUnet

    # MONAI hands a stride on to layers that take one per axis; its annotation says an int.
    strides: list[Any] = list(spec.strides[1:])
    return AttentionUnet(
        spatial_dims=spec.dimensions,
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        channels=spec.features,
        strides=strides,
    )


def _mednext(spec: UNetSpec) -> nn.Module:
    """Roy et al. 2023 (arXiv 2303.09975), size S with kernels of 3."""
    from monai.networks.nets.mednext import create_mednext

    return create_mednext(
        "S",
        spatial_dims=spec.dimensions,
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        kernel_size=3,
    )


def _check(name: str, spec: UNetSpec, patch_shape: Shape) -> None:
    """Raise PlanError if the network cannot be built for `spec` or run on `patch_shape`."""
    needs = needs_of(name)
    if needs.needs_package and importlib.util.find_spec(needs.needs_package) is None:
        raise PlanError(f"network '{name}' needs the package {needs.needs_package}: pip install {needs.needs_package}")
    if needs.ours:
        _check_unet(patch_shape, spec)
        return
    if spec.deep_supervision or spec.padding == "valid":
        raise PlanError(f"network '{name}' has same padding and no deep supervision: change the plan, or use 'unet'")
    if spec.stages < needs.least_stages:
        raise PlanError(f"network '{name}': found {spec.stages} stages, expected at least {needs.least_stages}")
    divisors = spec.downsampling_factor if needs.divisor is None else (needs.divisor,) * spec.dimensions
    _check_divisible(name, patch_shape, divisors)


def _check_unet(patch_shape: Shape, spec: UNetSpec) -> None:
    try:
        output_shape(spec, patch_shape)
    except ValueError as error:
        raise PlanError(f"network 'unet': {error}") from error


def _check_divisible(name: str, patch_shape: Shape, divisors: Shape) -> None:
    if len(patch_shape) != len(divisors):
        raise PlanError(f"network '{name}': patch {patch_shape} has {len(patch_shape)} axes, expected {len(divisors)}")
    larger = tuple(max(-(-side // d), 1) * d for side, d in zip(patch_shape, divisors, strict=True))
    if larger != patch_shape:
        raise PlanError(
            f"network '{name}': patch {patch_shape} is not divisible by {divisors}; the next one is {larger}"
        )
    if math.prod(patch_shape) == math.prod(divisors):
        raise PlanError(f"network '{name}': patch {patch_shape} leaves one voxel at the bottleneck; use a larger one")


NETWORKS: dict[str, Callable[[UNetSpec], nn.Module]] = {
    "unet": _unet,
    "segresnet": _segresnet,
    "swin_unetr": _swin_unetr,
    "dynunet": _dynunet,
    "attention_unet": _attention_unet,
    "mednext": _mednext,
}
"""Builders by name; what each asks of a plan is in `pipeline.models.needs`."""
