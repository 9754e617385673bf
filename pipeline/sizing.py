"""Budget -> network, patch and batch: the widest network on the largest patch that time and memory admit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from pipeline.config import PlanConfig
from pipeline.errors import PlanError
from pipeline.models.cost import patch_flops, step_gb
from pipeline.models.shape import fitting_shapes
from pipeline.models.spec import UNetSpec
from pipeline.plan import Budget, Fingerprint, Triple
from pipeline.topology import SMALLEST_PATCH_SIDE, SMALLEST_SIDE, Topology

WIDTHS = (32, 24, 16, 12, 8)
"""Channels at full resolution that the planner chooses among, widest first."""

WANTED_PATCHES, WANTED_ROUNDS = 3000, 30
"""Patches in all, and patches of each case, that a training wants to see before a wider network pays
(measured on hippocampus, benchmarks/LOG.md)."""

LEAST_PATCHES, LEAST_ROUNDS = 1000, 15
"""What the narrowest network on the smallest patch must see for a training to be worth its time."""

MIRRORED_ROUNDS = 100
"""Patches of each case from which on training on mirrored ones is expected to pay; below, it cost 0.02 Dice
(benchmarks/LOG.md)."""

TRAINING_SHARE = 0.85
"""Part of the time budget that is left for updates after validation and checkpoints."""

BACKWARD_FACTOR = 3.0
"""Work of forward and backward together, as a multiple of forward's."""

CPU_BATCH, CUDA_MOST_BATCH = 2, 16
"""A CPU gains nothing from larger batches; small ones take more steps."""

PATCH_KEPT = 0.75
"""Width gives way before a patch loses more than a quarter of what it needs to see."""

ROOM_AROUND_LABEL, LEAST_VIEW = 1.5, 64
"""What a patch needs to see of each axis: the largest label this many times over, and at least so many voxels."""

Sized = tuple[UNetSpec, Triple]


@dataclass(frozen=True)
class Sizer:
    """Chooses network, patch and batch within the budget."""

    fingerprint: Fingerprint
    budget: Budget
    settings: PlanConfig
    topology: Topology
    median_shape: Triple

    def choose(self, reasons: dict[str, str]) -> Sized:
        """Network and patch.

        Raises:
            PlanError: the patch set by hand does not fit the network, or no network fits the budget; the nearest that
                does is named.
        """
        if self.settings.patch_shape is not None:
            unet, patch = self._with_fixed_patch(self.settings.patch_shape)
        else:
            unet, patch = self._sized()
        unet = self.topology.fitted(unet, patch)
        least = self.topology.needs.least_stages
        if unet.stages < least:
            raise PlanError(
                f"network '{self.topology.network.name}' needs {least} resolutions, but patches of {_times(patch)} "
                f"voxels are halved to {unet.stages}: use network.name=unet"
            )
        self._explain(unet, patch, reasons)
        return unet, patch

    def batch_size(self, unet: UNetSpec, patch: Triple, reasons: dict[str, str]) -> int:
        """Patches in a step."""
        if self.settings.batch_size is not None:
            reasons["batch_size"] = "set by hand"
            return self.settings.batch_size
        if not self._fits_memory(unet, patch, CPU_BATCH) and self._fits_memory(unet, patch, 1):
            reasons["batch_size"] = f"two patches do not fit {self.budget.memory_gb:g} GB"
            return 1
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
        if not self.topology.needs.follows("checkpointing"):
            reasons["checkpointing"] = f"off: network '{self.topology.network.name}' has none"
            return plain
        if self.topology.network.checkpointing != "auto":
            reasons["checkpointing"] = "set by hand"
            return saving if self.topology.network.checkpointing == "on" else plain
        needed = self.memory_gb(plain, patch, batch)
        on = needed > self.budget.memory_gb
        reasons["checkpointing"] = (
            f"{'on' if on else 'off'}: {needed:.2f} GB without it, {self.budget.memory_gb:g} GB allowed"
        )
        return saving if on else plain

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
        return step_gb(self.topology.network.name, unet, self.topology.network_shape(patch), batch)

    def patch_gflop(self, unet: UNetSpec, patch: Triple) -> float:
        """Work of a forward pass over one patch."""
        return patch_flops(self.topology.network.name, unet, self.topology.network_shape(patch)) / 1e9

    def _sized(self) -> Sized:
        """With two patches in a step if they fit, else with one."""
        batches = (CPU_BATCH, 1) if self.settings.batch_size is None else (self.settings.batch_size,)
        wanted, least = self._wanted(), self._least()
        for enough, batch in product((wanted, least), batches):
            for width in self._widths():
                fitting = (sized for sized in self._candidates(width) if self._fits_memory(*sized, batch))
                # Only what would otherwise not be worth its time makes do with patches that see too little.
                narrowest = width == self._widths()[-1] and enough == least
                for unet, patch in fitting if narrowest else self._worth_their_width(fitting):
                    if self._patches(unet, patch) >= enough:
                        return unet, patch
        smallest = list(self._candidates(self._widths()[-1]))[-1]
        # A network with widths of its own cannot give way to time; it sees fewer patches than it wants.
        if self.topology.needs.features and self._fits_memory(*smallest, batches[-1]):
            return smallest
        raise PlanError(self._nearest_budget(*smallest, batches[-1]))

    def _candidates(self, width: int) -> Iterator[Sized]:
        """Ever smaller patches, each with its network."""
        start = self._grown(self.median_shape)
        unet = self.topology.spec(start, width)
        patch = self._rounded(start, unet)
        yield unet, patch
        while (smaller := self._shrunk(patch, unet)) is not None:
            unet = self.topology.spec(smaller, width)
            patch = self._cut(smaller, unet)
            yield unet, patch

    def _worth_their_width(self, sizes: Iterator[Sized]) -> Iterator[Sized]:
        """Those of `sizes` whose patches keep most of what they need to see.

        A preset stands by its width as long as time allows: most of the first patch that memory admits will do.
        """
        whole = None if self.topology.network.preset else math.prod(self._needed())
        for unet, patch in sizes:
            whole = whole or math.prod(patch)
            if math.prod(patch) < PATCH_KEPT * whole:
                return
            yield unet, patch

    def _nearest_budget(self, unet: UNetSpec, patch: Triple, batch: int) -> str:
        saving = unet.model_copy(update={"checkpointing": self._may_checkpoint()})
        needed_gb = _ceil(self.memory_gb(saving, patch, batch))
        allowed, sets = [f"{self.budget.memory_gb:g} GB"], []
        if needed_gb > self.budget.memory_gb:
            sets.append(f"--set plan.memory_gb={needed_gb:g}")
        if self.budget.minutes is not None:
            allowed.append(f"{self.budget.minutes:g} minutes")
            minutes = _ceil(self.budget.minutes * self._least() / self._patches(unet, patch))
            sets += [f"--set train.budget_minutes={minutes:g}"] if minutes > self.budget.minutes else []
        return (
            f"no network fits {' and '.join(allowed)}; the nearest plan that does has patches of {_times(patch)} and "
            f"{unet.features[0]} channels: {' '.join(sets)}"
        )

    def _with_fixed_patch(self, patch: Triple) -> Sized:
        if min(patch) < 1:
            raise PlanError(f"plan.patch_shape: {list(patch)} must be positive")
        slice_axis = self.topology.slice_axis
        if slice_axis is not None and patch[slice_axis] != 1:
            raise PlanError(
                f"plan.patch_shape: {list(patch)} must have 1 on axis {'IJK'[slice_axis]}, the axis across slices"
            )
        for width in self._widths():
            # Topology is that of the volume, so that a wrong patch is told what the network needs.
            unet = self.topology.spec(self._grown(self.median_shape), width)
            self._check_divisible(unet, patch)
            batch = self.settings.batch_size or CPU_BATCH
            if self._fits_memory(unet, patch, batch) and self._patches(unet, patch) >= self._wanted():
                break
        return unet, patch

    def _check_divisible(self, unet: UNetSpec, patch: Triple) -> None:
        shape = self.topology.network_shape(patch)
        factor = unet.downsampling_factor
        if any(n % f for n, f in zip(shape, factor, strict=True)):
            fitting = [self.topology.with_slice_axis(s) for s in fitting_shapes(unet, shape) if s is not None]
            raise PlanError(
                f"plan.patch_shape: {list(patch)} must be divisible by {list(self.topology.factor(unet))}; "
                f"the nearest are {' and '.join(str(list(s)) for s in fitting)}"
            )
        if shape == factor and unet.normalisation == "instance":
            raise PlanError(
                f"plan.patch_shape: {list(patch)} leaves one voxel at the bottleneck, which instance normalisation "
                "turns into a constant; make at least one side twice as long"
            )

    def _widths(self) -> tuple[int, ...]:
        features = self.topology.needs.features or self.settings.features
        return WIDTHS if features is None else (features[0],)

    def _grown(self, shape: Triple) -> Triple:
        """Sides of the median volume, at least one bottleneck's worth each; 1 across slices."""
        sides = [max(n, SMALLEST_SIDE) for n in shape]
        if self.topology.slice_axis is not None:
            sides[self.topology.slice_axis] = 1
        return sides[0], sides[1], sides[2]

    def _needed(self) -> Triple:
        """Sides of a patch that holds the largest label with room around it, at most those of the median case."""
        extents = [sides for case in self.fingerprint.cases for sides in case.label_extents_mm.values()]
        largest_mm = [max(sides) for sides in zip(*extents, strict=True)] or [0.0] * 3
        i, j, k = (
            min(most, max(LEAST_VIEW, math.ceil(ROOM_AROUND_LABEL * mm / spacing)))
            for most, mm, spacing in zip(
                self._grown(self.median_shape), largest_mm, self.topology.spacing_mm, strict=True
            )
        )
        return i, j, k

    def _rounded(self, patch: Triple, unet: UNetSpec) -> Triple:
        """Each side to the nearest multiple of what the strides need, at least one; more than a voxel is left."""
        factor = self.topology.factor(unet)
        sides = [max(1, math.floor(n / f + 0.5)) * f for n, f in zip(patch, factor, strict=True)]
        if tuple(sides) == factor and unet.normalisation == "instance":
            inside = [axis for axis in range(3) if axis != self.topology.slice_axis]
            longest = max(inside, key=lambda axis: patch[axis] / factor[axis])
            sides[longest] *= 2
        return sides[0], sides[1], sides[2]

    def _cut(self, patch: Triple, unet: UNetSpec) -> Triple:
        """Each side down to a multiple of what the strides need: a patch that shrinks never grows again."""
        i, j, k = (n // f * f for n, f in zip(patch, self.topology.factor(unet), strict=True))
        return i, j, k

    def _shrunk(self, patch: Triple, unet: UNetSpec) -> Triple | None:
        """One stride factor smaller on the axis that is longest in mm, or None at the end."""
        factor, spacing_mm = self.topology.factor(unet), self.topology.spacing_mm
        least = factor if self.topology.needs.features else (SMALLEST_PATCH_SIDE,) * 3
        lengths = [
            n * mm if n - f >= low else 0.0 for n, mm, f, low in zip(patch, spacing_mm, factor, least, strict=True)
        ]
        axis = lengths.index(max(lengths))
        sides = list(patch)
        sides[axis] -= factor[axis]
        one_voxel = tuple(sides) == factor and unet.normalisation == "instance"
        return None if lengths[axis] == 0 or one_voxel else (sides[0], sides[1], sides[2])

    def _may_checkpoint(self) -> bool:
        return self.topology.network.checkpointing != "off" and self.topology.needs.follows("checkpointing")

    def _fits_memory(self, unet: UNetSpec, patch: Triple, batch: int) -> bool:
        saving = unet.model_copy(update={"checkpointing": self._may_checkpoint()})
        return self.memory_gb(saving, patch, batch) <= self.budget.memory_gb

    def _wanted(self) -> int:
        return max(WANTED_PATCHES, WANTED_ROUNDS * len(self.fingerprint.cases))

    def _least(self) -> int:
        return max(LEAST_PATCHES, LEAST_ROUNDS * len(self.fingerprint.cases))

    def _patches(self, unet: UNetSpec, patch: Triple) -> float:
        """Patches that the time budget admits."""
        if self.budget.minutes is None:
            return math.inf
        work = BACKWARD_FACTOR * self.patch_gflop(unet, patch)
        return TRAINING_SHARE * self.budget.minutes * 60 * self.budget.gflops / work

    def _explain(self, unet: UNetSpec, patch: Triple, reasons: dict[str, str]) -> None:
        by_hand = "set by hand; " if self.settings.patch_shape is not None else ""
        reasons["patch_shape"] = (
            f"{by_hand}{_times(patch)} voxels beside a median case of {_times(self.median_shape)}; "
            f"each side is divisible by {_times(unet.downsampling_factor)}, which the strides need"
        )
        if self.topology.needs.features is not None:
            name = self.topology.network.name
            seen = self._patches(unet, patch)
            few = f"; the time admits {seen:.0f} patches, {self._wanted()} were wanted" if seen < self._wanted() else ""
            reasons["stages"] = f"{unet.stages} resolutions: those of network '{name}'"
            reasons["features"] = f"those of network '{name}'{few}"
            return
        reasons["stages"] = (
            f"{unet.stages} resolutions: axes are halved while {SMALLEST_SIDE} voxels remain, coarse axes later"
        )
        reasons["features"] = self._why_features(unet, patch)

    def _why_features(self, unet: UNetSpec, patch: Triple) -> str:
        if self.settings.features is not None:
            spare = len(self.settings.features) - unet.stages
            left = f"; the last {spare} are left out, since no axis is long enough to halve again" if spare else ""
            return f"set by hand{left}"
        budget = "no time limit" if self.budget.minutes is None else f"{self.budget.minutes:g} minutes"
        wanted = self._wanted() if self._patches(unet, patch) >= self._wanted() else self._least()
        seen = "" if self.budget.minutes is None else f" give about {self._patches(unet, patch):.0f} patches; "
        return (
            f"{unet.features[0]} channels at full resolution: {budget} at {self.budget.gflops:g} GFLOP/s{seen or ': '}"
            f"the widest of {', '.join(map(str, WIDTHS))} with which {wanted} patches can be seen "
            f"and {self.budget.memory_gb:g} GB suffice"
        )


def _ceil(amount: float) -> float:
    """Rounded up to three digits, so that what is asked for is enough."""
    scale = 10.0 ** (2 - math.floor(math.log10(amount)))
    return math.ceil(scale * amount) / scale


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
