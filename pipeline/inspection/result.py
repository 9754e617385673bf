"""What was found in a network, of all cases together, as one value that tables, words and files are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from pipeline.inspection.case import Look
from pipeline.inspection.contributions import Against, Contributions
from pipeline.inspection.figures import LevelFigures, figures_of
from pipeline.inspection.receptive import Millimetres, ReceptiveField, deepest_field
from pipeline.plan import Plan
from transforms.labels import LabelSchema


@dataclass(frozen=True)
class Inspection:
    """Of a network, over `cases`, by name: figures of each level, what its parts bring, how far it sees.

    `features` are the plan's for each level, None for a network that is not ours; `contributions` None where they were
    not asked for.
    """

    model: str
    cases: tuple[str, ...]
    features: tuple[int, ...] | None
    figures: tuple[LevelFigures, ...]
    contributions: Contributions | None
    receptive: ReceptiveField

    @property
    def depth(self) -> int:
        """Its levels."""
        return max(each.level for each in self.figures)

    def to_json(self) -> dict[str, Any]:
        """Everything, with null for what is not known."""
        value = {
            "format": "volseg-inspection-1",
            "model": self.model,
            "cases": list(self.cases),
            "levels": [asdict(each) for each in self.figures],
            "contributions": None
            if self.contributions is None
            else _contributions_json(self.contributions, self.cases),
            "receptive_field": asdict(self.receptive),
        }
        found: dict[str, Any] = _without_nan(value)
        return found


def inspection_of(
    model: str, plan: Plan, schema: LabelSchema, looks: Sequence[Look], *, against: Against
) -> Inspection:
    """All that was found in the cases, of which there is at least one."""
    names = {name: None for look in looks for name in look.sums}
    figures = figures_of({name: reduce(add, (look.sums[name] for look in looks)) for name in names})
    contributions = None
    if looks[0].changed:
        headline = tuple(region.name for region in schema.regions) or schema.names
        rows = {change: tuple(look.changed[change] for look in looks) for change in looks[0].changed}
        contributions = Contributions(against, headline, tuple(look.untouched for look in looks), rows)
    ours = plan.network == "unet" and plan.monai is None
    return Inspection(
        model=model,
        cases=tuple(look.name for look in looks),
        features=plan.unet.features if ours else None,
        figures=figures,
        contributions=contributions,
        receptive=_receptive(plan, looks),
    )


def level_rows(found: Inspection) -> list[dict[str, Any]]:
    """The figures of every level, a row each, as tables show them."""
    return [
        {
            "part": level.name,
            "channels": level.channels,
            "voxels": "x".join(map(str, level.shape)),
            "dead": level.dead,
            "silent": f"{level.sparsity:.0%}",
            "energy": level.energy,
            "rank": f"{level.effective_rank:.1f}",
            "repeat": f"{level.redundant_share:.0%}",
        }
        for level in found.figures
    ]


def _receptive(plan: Plan, looks: Sequence[Look]) -> ReceptiveField:
    spacing_mm, deepest = looks[0].spacing_mm, deepest_field(plan)
    radii = [look.radius_mm for look in looks if look.radius_mm is not None]
    reaches = [look.reach_mm for look in looks if look.reach_mm is not None]
    extents: dict[str, float] = {}
    for look in looks:
        extents |= {name: max(mm, extents.get(name, 0.0)) for name, mm in look.extents_mm.items()}
    return ReceptiveField(
        deepest_voxels=deepest,
        deepest_mm=None if deepest is None else _times(deepest, spacing_mm),
        patch_mm=_times(plan.patch_shape, spacing_mm),
        radius_mm=sum(radii) / len(radii) if radii else None,
        reach_mm=_mean(reaches) if reaches else None,
        voxels=sum(look.asked for look in looks),
        extents_mm=extents,
        slice_axis=plan.slice_axis,
    )


def _mean(rows: Sequence[Millimetres]) -> Millimetres:
    i, j, k = (sum(axis) / len(rows) for axis in zip(*rows, strict=True))
    return i, j, k


def _times(counts: Sequence[float], spacing_mm: Sequence[float]) -> Millimetres:
    i, j, k = (n * mm for n, mm in zip(counts, spacing_mm, strict=True))
    return i, j, k


def _contributions_json(found: Contributions, cases: Sequence[str]) -> dict[str, Any]:
    return {
        "dice_against": found.against,
        "dice": found.dice,
        "cases": [{"case": case, "dice": dict(row)} for case, row in zip(cases, found.untouched, strict=True)],
        "changes": [
            {
                "change": change.name,
                "how": change.how,
                "level": change.level,
                "dice": found.dice_with(change),
                "falls_by": found.falls(change),
                "cases": [{"case": case, "dice": dict(row)} for case, row in zip(cases, rows, strict=True)],
            }
            for change, rows in found.changed.items()
        ],
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
