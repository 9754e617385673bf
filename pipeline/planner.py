"""Fingerprint -> Plan: every size that a training needs, each with its reason. Pure, deterministic, numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import NetworkConfig, PlanConfig
from pipeline.errors import PlanError
from pipeline.fitting import advice_when_too_large
from pipeline.models.cost import step_gb
from pipeline.models.counts import forward_flops
from pipeline.models.shape import fitting_shapes, receptive_field
from pipeline.models.spec import UNetSpec
from pipeline.plan import Budget, ChannelFingerprint, ChannelPlan, Fingerprint, Plan, Spacing, Triple
from transforms.intensity_spec import Normalisation

__all__ = ["advice_when_too_large", "make_plan", "percentile"]

ANISOTROPIC = 3.0
"""A dataset whose coarsest median spacing exceeds its finest by this factor keeps more of its coarse axis."""

COARSE_AXIS_PERCENTILE = 10
"""Percentile of spacings that such a coarse axis takes (nnU-Net, Isensee et al. 2021)."""

SMALLEST_SIDE = 4
"""Axes are halved as long as at least this many voxels remain in the bottleneck."""

MOST_STAGES = 6
MOST_FEATURES = {2: 512, 3: 320}
WIDTHS = (32, 24, 16, 12, 8)
"""Channels at full resolution that the planner chooses among, widest first."""

WANTED_PATCHES, WANTED_ROUNDS = 1000, 15
"""Patches in all, and patches of each case, that a training wants to see before a wider network pays
(measured on hippocampus, benchmarks/LOG.md)."""

MIRRORED_ROUNDS = 100
"""Patches of each case from which on training on mirrored ones is expected to pay; below, it cost 0.02 Dice
(benchmarks/LOG.md)."""

TRAINING_SHARE = 0.85
"""Part of the time budget that is left for updates after validation and checkpoints."""

BACKWARD_FACTOR = 3.0
"""Work of forward and backward together, as a multiple of forward's."""

CPU_BATCH, CUDA_MOST_BATCH = 2, 16
"""A CPU gains nothing from larger batches; small ones take more steps."""


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
        PlanError: a patch or spacing set by hand does not fit the network, or the budget admits no network.
    """
    reasons: dict[str, str] = {}
    spacing_mm = _spacing(fingerprint, settings, reasons)
    median_shape = _median_shape(fingerprint, spacing_mm, reasons)
    channels = tuple(_channel(facts, reasons) for facts in fingerprint.channels)
    _explain_outputs(fingerprint, reasons)
    slice_axis = _slice_axis(spacing_mm, network, reasons)
    sizer = _Sizer(fingerprint, budget, settings, network, spacing_mm, median_shape, slice_axis)
    unet, patch_shape = sizer.choose(reasons)
    batch_size = sizer.batch_size(unet, patch_shape, reasons)
    unet = sizer.with_checkpointing(unet, patch_shape, batch_size, reasons)
    field_mm = _receptive_field_mm(unet, spacing_mm, slice_axis)
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
        patch_gflop=round(forward_flops(unet, _network_shape(patch_shape, slice_axis)) / 1e9, 3),
        reasons=reasons,
        warnings=_warnings(field_mm, extent_mm, slice_axis),
    )


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


@dataclass(frozen=True)
class _Sizer:
    """Chooses network and patch within the budget."""

    fingerprint: Fingerprint
    budget: Budget
    settings: PlanConfig
    network: NetworkConfig
    spacing_mm: Spacing
    median_shape: Triple
    slice_axis: int | None

    def choose(self, reasons: dict[str, str]) -> tuple[UNetSpec, Triple]:
        """The widest network on the largest patch that the budget admits."""
        if self.settings.patch_shape is not None:
            return self._with_fixed_patch(self.settings.patch_shape, reasons)
        start = self._grown(self.median_shape)
        for width in self._widths():
            unet = self._topology(start, width)
            patch = self._rounded(start, unet)
            while True:
                if self._fits_memory(unet, patch) and self._fits_time(unet, patch):
                    self._explain(unet, patch, reasons)
                    return unet, patch
                smaller = self._shrunk(patch, unet)
                # Width gives way before a patch loses more than a quarter of what it could see.
                least = 0.0 if width == self._widths()[-1] else 0.75
                if smaller is None or math.prod(smaller) < least * math.prod(start):
                    break
                unet = self._topology(smaller, width)
                patch = self._cut(smaller, unet)
        raise PlanError(
            f"no network fits {self.budget.memory_gb:g} GB"
            f"{'' if self.budget.minutes is None else f' and {self.budget.minutes:g} minutes'}; allow more"
        )

    def batch_size(self, unet: UNetSpec, patch: Triple, reasons: dict[str, str]) -> int:
        """Patches in a step."""
        if self.settings.batch_size is not None:
            reasons["batch_size"] = "set by hand"
            return self.settings.batch_size
        most = CPU_BATCH if self.budget.device == "cpu" else CUDA_MOST_BATCH
        batch = CPU_BATCH
        while batch * 2 <= most and self.memory_gb(unet, patch, batch * 2) <= self.budget.memory_gb:
            batch *= 2
        reasons["batch_size"] = (
            "small, since a CPU gains nothing from a larger one and more steps learn more"
            if self.budget.device == "cpu"
            else f"the largest power of two up to {CUDA_MOST_BATCH} that fits {self.budget.memory_gb:g} GB"
        )
        return batch

    def with_checkpointing(self, unet: UNetSpec, patch: Triple, batch: int, reasons: dict[str, str]) -> UNetSpec:
        """Switch gradient checkpointing as the config or the memory asks."""
        plain, saving = (unet.model_copy(update={"checkpointing": c}) for c in (False, True))
        if self.network.checkpointing != "auto":
            reasons["checkpointing"] = "set by hand"
            return saving if self.network.checkpointing == "on" else plain
        needed = self.memory_gb(plain, patch, batch)
        if needed <= self.budget.memory_gb:
            reasons["checkpointing"] = f"off: {needed:.2f} GB without it, {self.budget.memory_gb:g} GB allowed"
            return plain
        reasons["checkpointing"] = f"on: {needed:.2f} GB without it, {self.budget.memory_gb:g} GB allowed"
        return saving

    def mirror_axes(
        self, unet: UNetSpec, patch: Triple, wanted: Literal["auto"] | tuple[int, ...], reasons: dict[str, str]
    ) -> tuple[int, ...]:
        """Left to right where there is time to learn it; other axes never, since every case is brought to RAS."""
        if wanted != "auto":
            reasons["mirror_axes"] = "set by hand (augment.mirror_axes), for training and prediction alike"
            return tuple(sorted(set(wanted)))
        rounds = self._patches(unet, patch) / len(self.fingerprint.cases)
        if rounds < MIRRORED_ROUNDS:
            reasons["mirror_axes"] = (
                f"none: {rounds:.0f} patches of each case are too few to learn mirrored patients as well "
                f"(from {MIRRORED_ROUNDS} on it pays)"
            )
            return ()
        twins = " and exchanges the labels that are left/right twins" if self.fingerprint.has_twins else ""
        reasons["mirror_axes"] = f"mirroring left to right gives another plausible patient{twins}"
        return (0,)

    def memory_gb(self, unet: UNetSpec, patch: Triple, batch: int) -> float:
        """Estimate of a training step's peak."""
        return step_gb(unet, _network_shape(patch, self.slice_axis), batch)

    def _with_fixed_patch(self, patch: Triple, reasons: dict[str, str]) -> tuple[UNetSpec, Triple]:
        if min(patch) < 1:
            raise PlanError(f"plan.patch_shape: {list(patch)} must be positive")
        if self.slice_axis is not None and patch[self.slice_axis] != 1:
            raise PlanError(
                f"plan.patch_shape: {list(patch)} must have 1 on axis {'IJK'[self.slice_axis]}, the axis across slices"
            )
        for width in self._widths():
            # Topology is that of the volume, so that a wrong patch is told what the network needs.
            unet = self._topology(self._grown(self.median_shape), width)
            self._check_divisible(unet, patch)
            if width == self._widths()[-1] or (self._fits_memory(unet, patch) and self._fits_time(unet, patch)):
                break
        self._explain(unet, patch, reasons)
        reasons["patch_shape"] = "set by hand; " + reasons["patch_shape"]
        return unet, patch

    def _check_divisible(self, unet: UNetSpec, patch: Triple) -> None:
        shape = _network_shape(patch, self.slice_axis)
        factor = unet.downsampling_factor
        if any(n % f for n, f in zip(shape, factor, strict=True)):
            near = " and ".join(str(self._with_slice_axis(s)) for s in fitting_shapes(unet, shape) if s is not None)
            raise PlanError(
                f"plan.patch_shape: {list(patch)} must be divisible by {self._factors(unet)}; the nearest are {near}"
            )
        if shape == factor and unet.normalisation == "instance":
            raise PlanError(
                f"plan.patch_shape: {list(patch)} leaves one voxel at the bottleneck, which instance normalisation "
                "turns into a constant; make at least one side twice as long"
            )

    def _widths(self) -> tuple[int, ...]:
        return (self.settings.features[0],) if self.settings.features is not None else WIDTHS

    def _grown(self, shape: Triple) -> Triple:
        """Sides of the median volume, at least one bottleneck's worth each; 1 across slices."""
        sides = [max(n, SMALLEST_SIDE) for n in shape]
        if self.slice_axis is not None:
            sides[self.slice_axis] = 1
        return sides[0], sides[1], sides[2]

    def _topology(self, patch: Triple, width: int) -> UNetSpec:
        sides = list(_network_shape(patch, self.slice_axis))
        spacing = [s for a, s in enumerate(self.spacing_mm) if a != self.slice_axis]
        dimensions = len(sides)
        strides, kernels = [(1,) * dimensions], [_kernel(spacing)]
        most = MOST_STAGES if self.settings.features is None else len(self.settings.features)
        while len(strides) < most:
            stride = _next_stride(sides, spacing)
            if max(stride) == 1:
                break
            sides = [math.ceil(n / s) for n, s in zip(sides, stride, strict=True)]
            spacing = [x * s for x, s in zip(spacing, stride, strict=True)]
            strides.append(stride)
            kernels.append(_kernel(spacing))
        stages = len(strides)
        features = self.settings.features or tuple(
            min(width * 2**stage, MOST_FEATURES[dimensions]) for stage in range(stages)
        )
        return UNetSpec(
            dimensions=3 if dimensions == 3 else 2,
            in_channels=len(self.fingerprint.channels),
            out_channels=self.fingerprint.output_count,
            features=features[:stages],
            strides=tuple(strides),
            kernel_shapes=tuple(kernels),
            encoder_blocks=(2,) * stages,
            # Full resolution costs most and gains least from a second convolution (benchmarks/LOG.md).
            decoder_blocks=(1, *(2,) * (stages - 2)) if stages > 1 else (),
            block=self.network.block,
            normalisation=self.network.normalisation,
            skip=self.network.skip,
            upsampling=self.network.upsampling,
            deep_supervision=self.network.deep_supervision,
            checkpointing=self.network.checkpointing == "on",
        )

    def _rounded(self, patch: Triple, unet: UNetSpec) -> Triple:
        """Each side to the nearest multiple of what the strides need, at least one."""
        sides = [max(1, math.floor(n / f + 0.5)) * f for n, f in zip(patch, self._factors(unet), strict=True)]
        return sides[0], sides[1], sides[2]

    def _cut(self, patch: Triple, unet: UNetSpec) -> Triple:
        """Each side down to a multiple of what the strides need: a patch that shrinks never grows again."""
        sides = [n // f * f for n, f in zip(patch, self._factors(unet), strict=True)]
        return sides[0], sides[1], sides[2]

    def _factors(self, unet: UNetSpec) -> list[int]:
        return self._with_slice_axis(unet.downsampling_factor)

    def _with_slice_axis(self, shape: Sequence[int]) -> list[int]:
        """The network's axes as three, with 1 across slices."""
        sides = list(shape)
        if self.slice_axis is not None:
            sides.insert(self.slice_axis, 1)
        return sides

    def _shrunk(self, patch: Triple, unet: UNetSpec) -> Triple | None:
        """One stride factor smaller on the axis that is longest in mm, or None at the end."""
        factors = self._factors(unet)
        lengths = [
            n * s if n - f >= SMALLEST_SIDE else 0.0 for n, s, f in zip(patch, self.spacing_mm, factors, strict=True)
        ]
        axis = lengths.index(max(lengths))
        if lengths[axis] == 0:
            return None
        sides = list(patch)
        sides[axis] -= factors[axis]
        return sides[0], sides[1], sides[2]

    def _fits_memory(self, unet: UNetSpec, patch: Triple) -> bool:
        batch = self.settings.batch_size or CPU_BATCH
        saving = unet.model_copy(update={"checkpointing": self.network.checkpointing != "off"})
        return self.memory_gb(saving, patch, batch) <= self.budget.memory_gb

    def _fits_time(self, unet: UNetSpec, patch: Triple) -> bool:
        return self._patches(unet, patch) >= self._wanted()

    def _wanted(self) -> int:
        return max(WANTED_PATCHES, WANTED_ROUNDS * len(self.fingerprint.cases))

    def _patches(self, unet: UNetSpec, patch: Triple) -> float:
        """Patches that the time budget admits."""
        if self.budget.minutes is None:
            return math.inf
        work = BACKWARD_FACTOR * forward_flops(unet, _network_shape(patch, self.slice_axis)) / 1e9
        return TRAINING_SHARE * self.budget.minutes * 60 * self.budget.gflops / work

    def _explain(self, unet: UNetSpec, patch: Triple, reasons: dict[str, str]) -> None:
        factor = "x".join(str(f) for f in unet.downsampling_factor)
        reasons["patch_shape"] = (
            f"{'x'.join(map(str, patch))} voxels beside a median case of {'x'.join(map(str, self.median_shape))}; "
            f"each side is divisible by {factor}, which the strides need"
        )
        reasons["stages"] = (
            f"{unet.stages} resolutions: axes are halved while {SMALLEST_SIDE} voxels remain, coarse axes later"
        )
        if self.settings.features is not None:
            spare = len(self.settings.features) - unet.stages
            left = f"; the last {spare} are left out, since no axis is long enough to halve again" if spare else ""
            reasons["features"] = f"set by hand{left}"
            return
        budget = "no time limit" if self.budget.minutes is None else f"{self.budget.minutes:g} minutes"
        seen = "" if self.budget.minutes is None else f" give about {self._patches(unet, patch):.0f} patches; "
        reasons["features"] = (
            f"{unet.features[0]} channels at full resolution: {budget} at {self.budget.gflops:g} GFLOP/s{seen or ': '}"
            f"the widest of {', '.join(map(str, WIDTHS))} with which {self._wanted()} patches can be seen "
            f"and {self.budget.memory_gb:g} GB suffice"
        )


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


def _network_shape(patch: Triple, slice_axis: int | None) -> tuple[int, ...]:
    return tuple(n for a, n in enumerate(patch) if a != slice_axis)


def _receptive_field_mm(unet: UNetSpec, spacing_mm: Spacing, slice_axis: int | None) -> Spacing:
    field = list(receptive_field(unet))
    if slice_axis is not None:
        field.insert(slice_axis, 1)
    i, j, k = (round(n * s, 3) for n, s in zip(field, spacing_mm, strict=True))
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
