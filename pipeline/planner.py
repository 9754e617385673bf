"""Fingerprint -> Plan: every size that a training needs, each with its reason. Pure, deterministic, numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pipeline.config import NetworkConfig, PlanConfig
from pipeline.errors import PlanError
from pipeline.fitting import advice_when_too_large
from pipeline.models.needs import needs_of
from pipeline.models.shape import receptive_field
from pipeline.models.spec import UNetSpec
from pipeline.plan import Budget, ChannelFingerprint, ChannelPlan, Fingerprint, Plan, Spacing, Triple
from pipeline.sizing import Sizer
from pipeline.topology import PRESET_GB, RESIDUAL_ENCODER_BLOCKS, Topology
from transforms.intensity_spec import Normalisation

__all__ = ["advice_when_too_large", "make_plan", "percentile", "require_consistent"]

ANISOTROPIC = 3.0
"""A dataset whose coarsest median spacing exceeds its finest by this factor keeps more of its coarse axis."""

COARSE_AXIS_PERCENTILE = 10
"""Percentile of spacings that such a coarse axis takes (nnU-Net, Isensee et al. 2021)."""


def make_plan(
    fingerprint: Fingerprint,
    budget: Budget,
    *,
    settings: PlanConfig,
    network: NetworkConfig,
    mirror_axes: Literal["auto"] | tuple[int, ...] = "auto",
) -> Plan:
    """Derive a plan; the same arguments give the same plan.

    Raises:
        PlanError: what is set by hand does not fit the network, or the budget admits no network.
    """
    require_consistent(settings, network)
    reasons: dict[str, str] = {}
    budget = _with_preset(budget, settings, network, reasons)
    spacing_mm = _spacing(fingerprint, settings, reasons)
    median_shape = _median_shape(fingerprint, spacing_mm, reasons)
    channels = tuple(_channel(facts, reasons) for facts in fingerprint.channels)
    _explain_outputs(fingerprint, reasons)
    slice_axis = _slice_axis(spacing_mm, network, reasons)
    topology = Topology(
        network, len(fingerprint.channels), fingerprint.output_count, spacing_mm, slice_axis, settings.features
    )
    sizer = Sizer(fingerprint, budget, settings, topology, median_shape)
    unet, patch_shape = sizer.choose(reasons)
    batch_size = sizer.batch_size(unet, patch_shape, reasons)
    unet = sizer.with_checkpointing(unet, patch_shape, batch_size, reasons)
    field_mm = _receptive_field_mm(unet, topology, patch_shape)
    extent_mm = _largest_extent(fingerprint)
    return Plan(
        channels=channels,
        class_count=fingerprint.class_count,
        spacing_mm=spacing_mm,
        patch_shape=patch_shape,
        batch_size=batch_size,
        network=network.name,
        unet=unet,
        slice_axis=slice_axis,
        mirror_axes=sizer.mirror_axes(unet, patch_shape, mirror_axes, reasons),
        receptive_field_mm=field_mm,
        largest_label_extent_mm=extent_mm,
        memory_gb=round(sizer.memory_gb(unet, patch_shape, batch_size), 3),
        patch_gflop=round(sizer.patch_gflop(unet, patch_shape), 3),
        reasons=reasons,
        warnings=_warnings(field_mm, extent_mm, slice_axis),
    )


def require_consistent(settings: PlanConfig, network: NetworkConfig) -> None:
    """Raise PlanError where a key says nothing to the network that is named, or contradicts the preset."""
    needs = needs_of(network.name)
    for key, field in type(network).model_fields.items():
        if key in ("name", "dimensions") or needs.follows(key) or getattr(network, key) == field.default:
            continue
        if key == "checkpointing" and network.checkpointing == "off":
            continue
        follows = ", ".join(f"network.{other}" for other in sorted(needs.keys or ())) or "none of them"
        raise PlanError(
            f"network.{key}: says nothing to network '{network.name}', which follows {follows}: leave it out"
        )
    if settings.features is not None and needs.features is not None:
        raise PlanError(f"plan.features: network '{network.name}' has widths of its own: leave it out")
    if network.preset is not None and network.block == "plain":
        raise PlanError(
            f"network.block: plain, but network.preset {network.preset} has residual blocks down and plain ones up: "
            "leave one of the two out"
        )


def _with_preset(budget: Budget, settings: PlanConfig, network: NetworkConfig, reasons: dict[str, str]) -> Budget:
    """The budget with the memory that the preset is meant for, unless less is there or plan.memory_gb says."""
    if network.preset is None:
        return budget
    blocks = ", ".join(map(str, RESIDUAL_ENCODER_BLOCKS))
    target_gb = PRESET_GB[network.preset]
    if settings.memory_gb is not None:
        memory = f"plan.memory_gb says {budget.memory_gb:g}"
    elif budget.memory_gb < target_gb:
        memory = f"{budget.memory_gb:g} GB is what the device has, and wins"
    else:
        memory = "which is there"
    reasons["preset"] = (
        f"{network.preset}: residual blocks {blocks} down and one plain block a stage up (Isensee et al. 2024), "
        f"meant for {target_gb:g} GB; {memory}"
    )
    wins = settings.memory_gb is not None
    return replace(budget, memory_gb=budget.memory_gb if wins else min(budget.memory_gb, target_gb))


def _spacing(fingerprint: Fingerprint, settings: PlanConfig, reasons: dict[str, str]) -> Spacing:
    if settings.spacing_mm is not None:
        if min(settings.spacing_mm) <= 0:
            raise PlanError(f"plan.spacing_mm: {list(settings.spacing_mm)} must be positive")
        reasons["spacing_mm"] = "set by hand"
        return settings.spacing_mm
    per_axis = list(zip(*(case.spacing_mm for case in fingerprint.cases), strict=True))
    spacing = [percentile(values, 50) for values in per_axis]
    reasons["spacing_mm"] = f"the median of {len(fingerprint.cases)} training cases on each axis"
    coarse = spacing.index(max(spacing))
    if spacing[coarse] / min(spacing) > ANISOTROPIC:
        spacing[coarse] = max(percentile(per_axis[coarse], COARSE_AXIS_PERCENTILE), min(spacing))
        reasons["spacing_mm"] += (
            f"; axis {'IJK'[coarse]} is over {ANISOTROPIC:g} times coarser than the finest, so it takes the "
            f"{COARSE_AXIS_PERCENTILE}th percentile to lose fewer slices"
        )
    return round(spacing[0], 6), round(spacing[1], 6), round(spacing[2], 6)


def _median_shape(fingerprint: Fingerprint, spacing_mm: Spacing, reasons: dict[str, str]) -> Triple:
    rows = [
        [max(1, round(n * s / t)) for n, s, t in zip(case.shape, case.spacing_mm, spacing_mm, strict=True)]
        for case in fingerprint.cases
    ]
    medians = [round(percentile(column, 50)) for column in zip(*rows, strict=True)]
    reasons["median_shape"] = f"the median case is {'x'.join(map(str, medians))} voxels at that spacing"
    return medians[0], medians[1], medians[2]


def _channel(facts: ChannelFingerprint, reasons: dict[str, str]) -> ChannelPlan:
    if facts.modality == "CT":
        how = Normalisation(
            kind="window",
            lower=round(facts.inside_percentile_00_5, 4),
            upper=round(facts.inside_percentile_99_5, 4),
            mean=round(facts.inside_mean, 4),
            deviation=round(facts.inside_deviation, 4),
        )
        reason = (
            f"CT has a physical unit: clipped to the 0.5 to 99.5 percentile inside labels "
            f"({how.lower:g} to {how.upper:g} HU), then one mean and deviation for all cases"
        )
    else:
        nonzero = facts.zero_share > 0.25
        how = Normalisation(kind="zscore", nonzero=nonzero)
        reason = f"{facts.modality} has no fixed unit: each volume by its own mean and deviation"
        if nonzero:
            reason += f", measured on nonzero voxels, since {facts.zero_share:.0%} are exactly 0 (masked background)"
    if facts.optional:
        count = "all" if facts.case_count is None else f"{facts.case_count} of the"
        reason += f"; optional ({count} training cases have it), and 0 everywhere where it is missing"
    reasons[f"normalisation of {facts.name}"] = reason
    return ChannelPlan(
        name=facts.name,
        modality=facts.modality,
        normalisation=how,
        lowest=facts.lowest,
        highest=facts.highest,
        optional=facts.optional,
    )


def _explain_outputs(fingerprint: Fingerprint, reasons: dict[str, str]) -> None:
    if fingerprint.regions:
        names = ", ".join(fingerprint.regions)
        reasons["outputs"] = f"regions that may overlap ({names}): one output each, a yes or no of its own (sigmoid)"


def _slice_axis(spacing_mm: Spacing, network: NetworkConfig, reasons: dict[str, str]) -> int | None:
    if network.dimensions == 3:
        return None
    axis = max(range(3), key=lambda a: (spacing_mm[a], a))
    reasons["slice_axis"] = f"slices across axis {'IJK'[axis]}, the coarsest ({spacing_mm[axis]:g} mm)"
    return axis


def _receptive_field_mm(unet: UNetSpec, topology: Topology, patch: Triple) -> Spacing:
    field = topology.with_slice_axis(receptive_field(unet))
    if unet.bottleneck == "transformer" or topology.needs.sees_patch:
        field = max(field[0], patch[0]), max(field[1], patch[1]), max(field[2], patch[2])
    i, j, k = (round(n * s, 3) for n, s in zip(field, topology.spacing_mm, strict=True))
    return i, j, k


def _largest_extent(fingerprint: Fingerprint) -> Spacing:
    """Per axis, the 95th percentile over cases of the largest label's box."""
    rows = [extent for case in fingerprint.cases for extent in case.label_extents_mm.values()]
    if not rows:
        return 0.0, 0.0, 0.0
    i, j, k = (round(percentile(column, 95), 3) for column in zip(*rows, strict=True))
    return i, j, k


def _warnings(field_mm: Spacing, extent_mm: Spacing, slice_axis: int | None) -> tuple[str, ...]:
    return tuple(
        f"along axis {'IJK'[axis]} labels reach {extent:.0f} mm but the bottleneck sees {field:.0f} mm: "
        "the network cannot see such a structure whole; a deeper network or a coarser spacing would"
        for axis, (field, extent) in enumerate(zip(field_mm, extent_mm, strict=True))
        if extent > field and axis != slice_axis
    )


def percentile(values: Sequence[float], q: float) -> float:
    """Linear percentile, as numpy's default, without importing it for a few numbers."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
