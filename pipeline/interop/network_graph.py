"""A bundle's network as other runtimes record it, and how far what they make of it is from the bundle's own output."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.bundle import ModelBundle
from pipeline.models.layers import CONVOLUTION, StandardisedConvolution
from pipeline.models.shape import fitting_shapes
from pipeline.plan import Plan, Triple

TOLERANCE = 1e-4
"""Largest difference of a logit that is let through, as a part of the largest logit (and of 1)."""

FIXED_SIDES = frozenset({"swin_unetr", "SwinUNETR", "UNETR"})
"""Networks that decide by the sides of their input what they do, so that a recording holds for those sides alone."""

INSTANCE_NORMALISATION: dict[int, Callable[..., nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Difference:
    """Between two networks' logits: the largest, and the largest absolute logit of the first."""

    largest: float
    peak: float

    @property
    def passes(self) -> bool:
        """Within float32's rounding; never when a logit is not a number."""
        return self.within(TOLERANCE)

    def within(self, tolerance: float) -> bool:
        """Whether it is at most that part of the largest logit, and of 1."""
        return self.largest <= tolerance * max(1.0, self.peak)


def has_free_sides(plan: Plan) -> bool:
    """Whether a recording of the plan's network holds for volumes of other sides than it was recorded with."""
    return (plan.network if plan.monai is None else plan.monai.name) not in FIXED_SIDES


def recording_shape(plan: Plan) -> Triple:
    """Sides of the example that a network is recorded with: not the patch, where sides are free.

    At the patch itself learned positions are taken as they are; at any other shape they are interpolated, which is
    right for the patch too.
    """
    return larger_shape(plan) if has_free_sides(plan) else plan.patch_shape


def larger_shape(plan: Plan) -> Triple:
    """The next shape above the patch that fits the network, longer along every axis but that of the slices."""
    axes = [axis for axis in range(3) if axis != plan.slice_axis]
    wanted = tuple(plan.patch_shape[axis] + 1 for axis in axes)
    _, sides = fitting_shapes(plan.unet, wanted)
    shape = list(plan.patch_shape)
    for axis, side in zip(axes, sides, strict=True):
        shape[axis] = side
    return shape[0], shape[1], shape[2]


def checked_shapes(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Batches (B, C, I, J, K) that a recording is compared on: of one and of two patches, and another shape."""
    channels = len(plan.channels)
    shapes = [(1, channels, *plan.patch_shape), (2, channels, *plan.patch_shape)]
    return tuple(shapes + [(1, channels, *larger_shape(plan))] * has_free_sides(plan))


def example_of(shape: tuple[int, ...]) -> Tensor:
    """Normal noise, as normalised images are distributed; the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def difference(bundle: ModelBundle, run: Run) -> Difference:
    """How far `run` is from the bundle's own network on `checked_shapes`; both on the CPU and in float32."""
    largest, peak = 0.0, 0.0
    for shape in checked_shapes(bundle.plan):
        image = example_of(shape)
        with torch.inference_mode():
            expected = bundle.network(image)
            found = run(image)
        if found.shape != expected.shape:
            return Difference(math.inf, peak)
        # A comparison with NaN is false, which `passes` turns into a refusal.
        largest = float(torch.maximum(torch.tensor(largest), (found - expected).abs().max()))
        peak = max(peak, float(expected.abs().max()))
    return Difference(largest, peak)


def for_recording(bundle: ModelBundle) -> nn.Module:
    """A copy of the network on the CPU, in operations that other runtimes know as one.

    Instance normalisation, which a U-Net has as groups of one channel, is named so; standardised weights are
    computed once.
    """
    network = copy.deepcopy(bundle.network).cpu().float().eval()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, _plain(child, bundle.plan.unet.dimensions))
    return network.requires_grad_(False)


def _plain(layer: nn.Module, dimensions: int) -> nn.Module:
    if isinstance(layer, nn.GroupNorm) and layer.num_groups == layer.num_channels:
        plain = INSTANCE_NORMALISATION[dimensions](layer.num_channels, eps=layer.eps, affine=layer.affine)
        plain.load_state_dict(layer.state_dict())
        return plain.eval()
    if isinstance(layer, StandardisedConvolution):
        return _standardised(layer, dimensions)
    return layer


def _standardised(layer: StandardisedConvolution, dimensions: int) -> nn.Module:
    learnt = layer.layer
    assert isinstance(learnt, nn.Conv2d | nn.Conv3d)
    plain = CONVOLUTION[dimensions](
        learnt.in_channels,
        learnt.out_channels,
        learnt.kernel_size,
        stride=learnt.stride,
        padding=learnt.padding,
        bias=learnt.bias is not None,
    )
    weights = {"weight": layer.weight().detach()}
    plain.load_state_dict(weights if learnt.bias is None else {**weights, "bias": learnt.bias.detach()})
    return plain.eval()


@contextmanager
def quiet_recording() -> Iterator[None]:
    """No warnings inside: of recorders that torch is leaving, and of shapes that Python looks at while recording.

    What a recording gets wrong is found by running it on other shapes, which `difference` does.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
