"""What a prediction holds in memory, worked out before it begins: its stages, their parts, and what was chosen.

Bytes are of the whole process, resident. The limit decides only how much is worked on at a time, never a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import PlanError

SLAB_PLANES = (16, 8, 4, 2, 1)
"""Planes of finished scores that are restored at a time: more share what is done for each slab."""

MOST_SLAB_BYTES = 1 << 28
"""A slab is no larger than this unless one plane is: beyond, nothing gets faster."""

HEADROOM = 1.15
"""Estimates of work fall short of what was measured by less than this (tests/pipeline/test_memory_plan.py)."""

_STEP_BYTES = 10_000_000


@dataclass(frozen=True)
class Stage:
    """A part of the work: its name, and what is held meanwhile, in bytes."""

    name: str
    parts: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """In all."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of a prediction, one after the other, and the choices that keep each below the limit.

    `limit_bytes` is of the whole process. `batch` windows pass through the network together; `slab_planes` planes of
    scores are restored at a time; with `skip_empty` the answer to windows of air is kept and not asked for again.
    """

    stages: tuple[Stage, ...]
    limit_bytes: int
    batch: int
    slab_planes: int
    skip_empty: bool = True

    @property
    def peak_bytes(self) -> int:
        """What the process will hold at most."""
        return max(stage.size for stage in self.stages)

    def lines(self) -> tuple[str, ...]:
        """For people: a line a stage, then the peak and the limit, then what was chosen."""
        rows = [
            f"{stage.name}: {shown(stage.size)} ({', '.join(f'{name} {shown(size)}' for name, size in stage.parts)})"
            for stage in self.stages
        ]
        chosen = f"windows at a time: {self.batch}; planes restored at a time: {self.slab_planes}"
        if not self.skip_empty:
            chosen += "; windows of air pass through the network one by one"
        return (*rows, f"at most {shown(self.peak_bytes)} of {shown(self.limit_bytes)}", chosen)


@dataclass(frozen=True)
class Demand:
    """What a study and a model ask for in ordinary memory, in bytes, before anything is chosen.

    `process` is held already, without the study's own voxels. `network` is for one batch of windows with the answer,
    and for adding up its passes. `live` are scores that are not finished; `slab_plane` is what each plane of a slab
    takes, `restoring` what restoring takes besides; `empty` is the answer to windows of air, if it is kept. On a GPU
    (`is_on_host` False) these five are 0. Where more is asked for than labels, `gathered` is what is held of it from
    the first window on, `finishing` what bringing it to the study's grid takes besides, and `finished` what is held of
    it from then on. `cleaning` is what post-processing of the finished labels takes.
    """

    process: int
    study: int
    preparing: int
    image: int
    network: int
    live: int
    slab_plane: int
    restoring: int
    label_map: int
    empty: int = 0
    gathered: int = 0
    finishing: int = 0
    finished: int = 0
    cleaning: int = 0
    is_on_host: bool = True

    def stages(self, slab_planes: int, *, skip_empty: bool) -> tuple[Stage, ...]:
        """In the order of the work."""
        held = (("process", self.process), ("study", self.study))
        image, labels = ("image", self.image), ("label map", self.label_map)
        beside = (("uncertainty and scores", self.gathered),) if self.gathered else ()
        after = (*held, labels, *((("uncertainty and scores", self.finished),) if self.finished else ()))
        scores = (
            ("unfinished scores", self.live),
            *((("answer to air", self.empty),) if skip_empty and self.empty else ()),
        )
        slab = ("finished scores", slab_planes * self.slab_plane + self.restoring)
        return (
            Stage("preparing", (*held, ("work", round(HEADROOM * self.preparing)), image)),
            Stage("network", (*held, image, labels, *beside, *scores, ("network", round(HEADROOM * self.network)))),
            Stage("restoring", (*held, image, labels, *beside, *scores, slab)),
            *(
                (Stage("uncertainty", (*held, image, labels, *beside, ("work", self.finishing))),)
                if self.finishing
                else ()
            ),
            Stage("labels", (*after, ("work", 2 * self.label_map))),
            *((Stage("post-processing", (*after, ("work", self.cleaning))),) if self.cleaning else ()),
        )


def plan_memory(demand: Demand, *, limit_bytes: int, batch: int) -> MemoryPlan:
    """The largest slabs that stay below the limit, with the answer to windows of air kept if that goes along.

    Raises:
        PlanError: none do; the message names the least that suffices.
    """
    counts = [n for n in SLAB_PLANES if n * demand.slab_plane <= MOST_SLAB_BYTES] or [1]
    plans = [
        MemoryPlan(demand.stages(n, skip_empty=skip), limit_bytes, batch, n, skip)
        for skip in (True, False)
        for n in counts
    ]
    for plan in plans:
        if plan.peak_bytes <= limit_bytes:
            return plan
    # The next process, which is given it, may hold a little more from the start than this one.
    least = math.ceil((plans[-1].peak_bytes + _STEP_BYTES // 2) / _STEP_BYTES) * _STEP_BYTES
    raise PlanError(
        f"{shown(limit_bytes)} of memory do not suffice for this study and this model; the least that does is "
        f"{shown(least)}: give --max-memory {shown(least).replace(' ', '')} or more, or free memory"
    )


def shown(size: int) -> str:
    """In GB (1e9 bytes), or in MB where that would be hundredths."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
