"""Which post-processing helps, by what it does to cases that the model never saw; where that is not evident, none.

An action is chosen only if it evidently raises the Dice (`compare.evident_sign`), after Holm's correction over
everything that was tried and changes anything, if it harms no label of any case, and if what it gains is worth it. What
was chosen is then done: where all of it together harms a label of a case, what harms it there is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.cleaning_effects import CaseEffect
from pipeline.compare import TIE, evident_sign, holm, interval_of_mean, means_of_patients, rank_sign, signed_rank_p
from pipeline.config import EvaluateConfig
from pipeline.postprocessing import Action, Tried

Floats = npt.NDArray[np.float64]

LEAST_PATIENTS = 10
"""With fewer nothing is tried."""

LEAST_CHANGED = 6
"""Patients that differ: of five, all better, the two-sided test says p = 0.06."""

MOST_LOSS = 0.01
"""Of Dice, of a single label in a single case: what loses more is not chosen, whatever the others gain."""

LEAST_GAIN = 0.001
"""Of Dice, or of surface Dice where the Dice gains less: the mean over the cases that change."""

MOST_SHARED = 0.25
"""Of the voxels that a threshold moves, between two labels that both have one: what it moves more of, it decides."""

_TOGETHER = 1e-4
"""Gains closer than this are the same."""

SurfaceGain = Callable[[Action], Floats]
"""What an action adds to the surface Dice of each case (N,); NaN where it changes nothing or there is no surface."""

Worst = Callable[[Sequence[Action], Sequence[int]], Floats]
"""What actions, done together, do to the label or region that fares worst by it, in each of some cases (by number)."""


@dataclass(frozen=True)
class JudgedCase:
    """A case, whose it is, and the effect of every action on it."""

    case_id: str
    patient_id: str
    fold: int
    effects: tuple[CaseEffect, ...]


@dataclass(frozen=True, eq=False)
class Trials:
    """What is known only by doing it, so it is asked of few actions."""

    surface_gain: SurfaceGain
    worst: Worst

    def of(self, rows: Sequence[int]) -> Trials:
        """The same for some of the cases, by their numbers."""
        numbers = list(rows)
        return Trials(
            lambda action: self.surface_gain(action)[numbers],
            lambda actions, some: self.worst(actions, [numbers[row] for row in some]),
        )


def choose(
    actions: Sequence[Action], cases: Sequence[JudgedCase], *, trials: Trials, settings: EvaluateConfig
) -> tuple[tuple[Action, ...], tuple[Tried, ...]]:
    """What is chosen, and what came of everything that was tried.

    Of one structure at most one filling of holes and one other action are chosen, and of structures that hold each
    other either the larger or those in it, whichever gains more; of two labels that thresholds move voxels between the
    one that gains more: so what is measured of each holds for all of them together, but for what takes the place of an
    island. What harms for that reason is left out, and it is chosen again. Sources: as `compare.compare`.
    """
    tables = [_Table.of(number, action, cases) for number, action in enumerate(actions)]
    p_values = [table.p_value() for table in tables]
    judged = [
        _Judged(table, p, corrected, *_verdict(table, corrected, trials.surface_gain, settings))
        for table, p, corrected in zip(tables, p_values, holm(p_values), strict=True)
    ]
    refused: dict[int, str] = {}
    while harmful := _harmful(kept := _kept(judged, refused, trials.surface_gain), len(cases), trials.worst):
        refused |= harmful
    numbers = {row.table.number for row in kept}
    chosen = tuple(row.table.action for row in judged if row.table.number in numbers)
    return chosen, tuple(row.told(refused, is_chosen=row.table.number in numbers) for row in judged)


def _kept(judged: Sequence[_Judged], refused: Mapping[int, str], surface_gain: SurfaceGain) -> list[_Judged]:
    """Of what helps and was not refused, what goes together and gains most."""
    helpful = [row for row in judged if row.helps and row.table.number not in refused]
    return [
        row
        for fills in (False, True)
        for row in _apart(_best([row for row in helpful if (row.table.action.kind == "holes") == fills], surface_gain))
    ]


def _harmful(kept: Sequence[_Judged], count: int, worst: Worst) -> dict[int, str]:
    """Actions by which a label of one of so many cases loses too much when all that is kept is done, and why; where no
    single one does it, all of them."""
    if not kept:
        return {}
    losses = worst([row.table.action for row in kept], range(count))
    harmed = np.flatnonzero(losses < -MOST_LOSS).tolist()
    if not harmed:
        return {}
    alone = {row.table.number: float(worst([row.table.action], harmed).min()) for row in kept}
    guilty = {number: f"done, it costs a label of a case {-x:.3f}" for number, x in alone.items() if x < -MOST_LOSS}
    together = f"all that was chosen costs a label of a case {-losses.min():.3f}"
    return guilty or dict.fromkeys(alone, together)


@dataclass(frozen=True, eq=False)
class _Table:
    """One action over the cases whose labels were annotated: Dice (N,) before and after, and what was lost.

    `worst` is the change of the label that loses most in any case, `total` the mean gain of all its labels or regions
    together: comparable between a structure and its parts.
    """

    number: int
    action: Action
    rows: npt.NDArray[np.intp]
    patients: npt.NDArray[np.int64]
    before: Floats
    after: Floats
    is_changed: npt.NDArray[np.bool_]
    parts_lost: int
    worst: float
    total: float
    rivals: frozenset[str]

    @classmethod
    def of(cls, number: int, action: Action, cases: Sequence[JudgedCase]) -> _Table:
        """Rows are numbers of cases."""
        effects = [case.effects[number] for case in cases]
        rows = [row for row, effect in enumerate(effects) if effect.before is not None and effect.after is not None]
        _, patients = np.unique([cases[row].patient_id for row in rows], return_inverse=True)
        return cls(
            number,
            action,
            np.array(rows, dtype=np.intp),
            patients.astype(np.int64),
            np.array([effects[row].before for row in rows], dtype=np.float64),
            np.array([effects[row].after for row in rows], dtype=np.float64),
            np.array([effects[row].is_changed for row in rows], dtype=np.bool_),
            sum(effects[row].parts_lost for row in rows),
            min((effects[row].worst for row in rows), default=0.0),
            sum(effects[row].total for row in rows) / max(len(rows), 1),
            _rivals(effects[row] for row in rows),
        )

    @property
    def change(self) -> Floats:
        """Of the Dice, (N,)."""
        return self.after - self.before

    @property
    def patients_changed(self) -> int:
        """Whose Dice differs."""
        return int((np.abs(means_of_patients(self.change, self.patients)) > TIE).sum())

    def gain_where_changed(self, gains: Floats) -> float:
        """The mean of `gains` (N,) over the cases that differ and have one; 0 where there is none."""
        found = gains[self.is_changed & ~np.isnan(gains)]
        return float(found.mean()) if found.size else 0.0

    def p_value(self) -> float | None:
        """None where nothing differs."""
        changes = means_of_patients(self.change, self.patients)
        return signed_rank_p(changes) if changes.size > 1 else None

    def is_better(self, p_corrected: float | None, settings: EvaluateConfig) -> bool:
        """Whether the Dice is evidently higher after."""
        interval_95 = interval_of_mean(self.change, self.patients, settings)
        side = rank_sign(means_of_patients(self.change, self.patients))
        return evident_sign(float(self.change.mean()), interval_95, p_value=p_corrected, rank_sign=side) > 0


@dataclass(frozen=True, eq=False)
class _Judged:
    table: _Table
    p_value: float | None
    p_corrected: float | None
    helps: bool
    why: str

    @property
    def gain(self) -> float:
        """Of Dice, of all labels or regions together."""
        return self.table.total

    def told(self, refused: Mapping[int, str], *, is_chosen: bool) -> Tried:
        """`refused` are reasons that came up later, by the number of the action."""
        table = self.table
        why = self.why or refused.get(table.number, "helps, another is chosen")
        return Tried(
            action=table.action,
            cases=len(table.rows),
            patients_changed=table.patients_changed,
            before=float(table.before.mean()) if table.rows.size else None,
            after=float(table.after.mean()) if table.rows.size else None,
            worst_change=min(table.worst, 0.0),
            parts_lost=table.parts_lost,
            p_value=self.p_value,
            p_corrected=self.p_corrected,
            is_chosen=is_chosen,
            why="chosen" if is_chosen else why,
        )


def _verdict(
    table: _Table, p_corrected: float | None, surface_gain: SurfaceGain, settings: EvaluateConfig
) -> tuple[bool, str]:
    """Whether the action helps, and if not why not."""
    if not table.is_changed.any():
        return False, "changes nothing"
    if table.parts_lost:
        return False, f"deletes {table.parts_lost} part{'s' if table.parts_lost > 1 else ''} that had been found"
    if table.worst < -MOST_LOSS:
        return False, f"a label of a case loses {-table.worst:.3f}"
    if table.change.mean() <= 0:
        return False, "gains nothing"
    if table.patients_changed < LEAST_CHANGED:
        count = table.patients_changed
        return False, f"only {count} patient{'s' if count > 1 else ''} changed, too few to tell"
    if not table.is_better(p_corrected, settings):
        return False, "no evidence that it helps"
    if max(table.gain_where_changed(table.change), _surface(table, surface_gain)) < LEAST_GAIN:
        return False, "gains too little"
    return True, ""


def _surface(table: _Table, surface_gain: SurfaceGain) -> float:
    """Asked only where the Dice gains too little: it takes a look at the volumes."""
    if table.gain_where_changed(table.change) >= LEAST_GAIN:
        return 0.0
    return table.gain_where_changed(surface_gain(table.action)[table.rows])


def _best(helpful: Sequence[_Judged], surface_gain: SurfaceGain) -> list[_Judged]:
    """Structures that share no label, each with its best action, so that they gain most together."""
    of_structure: dict[frozenset[str], list[_Judged]] = {}
    for row in helpful:
        of_structure.setdefault(frozenset(row.table.action.labels), []).append(row)
    taken: list[_Judged] = []
    for labels in sorted(of_structure, key=lambda labels: (len(labels), sorted(labels))):
        best = _best_of_one(of_structure[labels], surface_gain)
        inside = [row for row in taken if labels.issuperset(row.table.action.labels)] if len(labels) > 1 else []
        if _total(inside) + _TOGETHER < best.gain or not inside:
            taken = [row for row in taken if row not in inside] + [best]
    return taken


def _apart(rows: Sequence[_Judged]) -> list[_Judged]:
    """Without thresholds of labels that another, which gains more, takes voxels from or gives them to; of equal ones
    that of the label which needs it most stays."""
    taken: list[_Judged] = []
    for row in sorted(rows, key=lambda row: (-round(row.gain / _TOGETHER), float(row.table.before.mean()))):
        if not any(_compete(row.table, other.table) for other in taken):
            taken.append(row)
    return taken


def _compete(one: _Table, other: _Table) -> bool:
    return one.action.name in other.rivals or other.action.name in one.rivals


def _rivals(effects: Iterable[CaseEffect]) -> frozenset[str]:
    """Labels with which a threshold exchanges more than `MOST_SHARED` of the voxels that it moves."""
    counts: Counter[str] = Counter()
    for effect in effects:
        counts.update(dict(effect.moved))
    return frozenset(name for name, count in counts.items() if name and count > MOST_SHARED * counts.total())


def _best_of_one(rows: Sequence[_Judged], surface_gain: SurfaceGain) -> _Judged:
    """The largest gain of Dice; of equal ones that of surface Dice; of these again the one that does least."""
    most = max(row.gain for row in rows)
    equal = [row for row in rows if row.gain > most - _TOGETHER]
    mildest = min(equal, key=_reach)
    # Where all do the same to every case there is nothing to measure.
    if all(np.allclose(row.table.after, mildest.table.after, rtol=0, atol=TIE) for row in equal):
        return mildest
    gains = [float(np.nansum(surface_gain(row.table.action)[row.table.rows])) / len(row.table.rows) for row in equal]
    best = max(gains)
    return min((row for row, gain in zip(equal, gains, strict=True) if gain > best - _TOGETHER), key=_reach)


def _reach(row: _Judged) -> tuple[int, float, float]:
    """How much an action does: cases that it changes, the size of its islands, how far from a half its threshold is."""
    action = row.table.action
    return int(row.table.is_changed.sum()), action.below_mm3 or np.inf, abs((action.threshold or 0.5) - 0.5)


def _total(rows: Iterable[_Judged]) -> float:
    return sum(row.gain for row in rows)
