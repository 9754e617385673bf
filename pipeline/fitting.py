"""What to do when a plan turned out too large for the device: the nearest plan that is smaller, from the plan alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pipeline.models.cost import step_gb
from pipeline.models.needs import NEEDS
from pipeline.models.spec import UNetSpec
from pipeline.plan import Plan, Triple

NARROWED = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
"""Widths that are tried, as parts of the plan's."""

LEAST_KEPT = 0.5
"""Part of the patch's volume below which a narrower network is tried instead of a smaller patch."""

WHAT_FAILED = 0.75
"""A plan that ran out of memory is taken to have less than its own estimate: this part of it."""


def advice_when_too_large(plan: Plan, memory_gb: float | None = None) -> str:
    """One line that names the nearest plan that fits `memory_gb`, in the words of the command line.

    For a training that ran out of memory with a single patch in the batch. `memory_gb` is what the device has for a
    step; where it is unknown (None), or no less than the plan says it needs, it is taken as three quarters of what
    the plan with one patch in a batch was estimated to need, since that has just failed.
    """
    needed_gb = _one_patch_gb(plan, plan.unet, plan.patch_shape)
    limit_gb = min(WHAT_FAILED * needed_gb, math.inf if memory_gb is None else memory_gb)
    found = nearest_fitting(plan, limit_gb)
    if found is None:
        return (
            f"one patch of {_times(plan.patch_shape)} needs about {needed_gb:.2g} GB, and no smaller plan of this "
            f"network fits {limit_gb:.2g} GB: use a device with more memory"
        )
    unet, patch = found
    keys = [f"plan.patch_shape={_plain(patch)}"]
    keys += [f"plan.features={_plain(unet.features)}"] if NEEDS[plan.network].features is None else []
    keys += ["network.checkpointing=on"] if unet.checkpointing and not plan.unet.checkpointing else []
    sets = " ".join(f"--set {key}" for key in keys)
    return f"the nearest plan that fits: {sets}, or --set plan.memory_gb={_floor(limit_gb):g} to have it chosen anew"


def nearest_fitting(plan: Plan, memory_gb: float) -> tuple[UNetSpec, Triple] | None:
    """Network and patch nearest to the plan's of which a single patch fits `memory_gb`; None if there are none.

    Gradient checkpointing comes first, since it changes no result; then a smaller patch; then a narrower network.
    """
    smallest: tuple[UNetSpec, Triple] | None = None
    for unet in _narrower(plan):
        for patch in _smaller(plan):
            if _one_patch_gb(plan, unet, patch) > memory_gb:
                continue
            if math.prod(patch) >= LEAST_KEPT * math.prod(plan.patch_shape):
                return unet, patch
            smallest = smallest or (unet, patch)
            break
    return smallest


def _narrower(plan: Plan) -> Iterator[UNetSpec]:
    needs = NEEDS[plan.network]
    saving = plan.unet.model_copy(update={"checkpointing": needs.follows("checkpointing")})
    for share in NARROWED if needs.features is None else (1.0,):
        features = tuple(max(4, round(n * share / 4) * 4) if share < 1 else n for n in plan.unet.features)
        yield saving.model_copy(update={"features": features})


def _smaller(plan: Plan) -> Iterator[Triple]:
    """The plan's patch, then ever smaller ones: one stride factor off the side that is longest in mm."""
    patch = plan.patch_shape
    while math.prod(patch) > math.prod(plan.factor):
        yield patch
        lengths = [n * mm if n > f else 0.0 for n, mm, f in zip(patch, plan.spacing_mm, plan.factor, strict=True)]
        axis = lengths.index(max(lengths))
        sides = list(patch)
        sides[axis] -= plan.factor[axis]
        patch = (sides[0], sides[1], sides[2])


def _one_patch_gb(plan: Plan, unet: UNetSpec, patch: Triple) -> float:
    return step_gb(plan.network, unet, tuple(n for axis, n in enumerate(patch) if axis != plan.slice_axis), 1)


def _floor(gb: float) -> float:
    """Rounded down to three digits, so that what is told is no more than what there is."""
    scale = 10.0 ** (2 - math.floor(math.log10(gb)))
    return math.floor(scale * gb) / scale


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _plain(numbers: Sequence[int]) -> str:
    """As the command line takes it, without blanks."""
    return f"[{','.join(map(str, numbers))}]"
