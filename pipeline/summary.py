"""What the scores of many cases say together: spreads, intervals, folds and the worst cases, per label and figure.

A label that neither side holds is counted as absent: no success and no failure, part of no mean. Nor is one that was
not annotated in the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.config import EvaluateConfig
from pipeline.expectation import expectations_of
from pipeline.metrics import percentile_interval, resampled_means
from pipeline.report_values import (
    FIGURES,
    CaseDice,
    CaseFailure,
    CaseFigure,
    CaseScores,
    Figure,
    FigureSummary,
    FoldMean,
    Interval,
    LabelScore,
    LabelSummary,
    Overall,
    OverallFigure,
    Report,
)

Floats = npt.NDArray[np.float64]

WORST_CASES = 5

_MOST_NAMES = 10  # in a message
_SEVERAL = 0.5
"""Part of the cases that must hold several lesions of a label for it to be counted lesion by lesion unasked."""

_DICE = Figure("dice", "lowest")


def summarise(
    cases: Sequence[CaseScores],
    *,
    settings: EvaluateConfig,
    failures: Sequence[CaseFailure] = (),
    missing_predictions: Sequence[str] = (),
    extra_predictions: Sequence[str] = (),
) -> Report:
    """Sum up cases that were scored with one schema. Their order changes nothing.

    Means are over cases; the overall ones are over regions where there are any, for these are what is learnt.
    Intervals come from resampling patients, all labels and figures together (see `resampled_means`); a figure that
    rests on one patient has none, as that says nothing about the next.

    Raises:
        ValueError: no cases, a case that stands twice, or cases with different labels.
    """
    tables = _tables(cases, settings)
    dice, rest = tables[0], tables[1:]
    labels = [_label_summary(column, dice, rest) for column in range(dice.values.shape[1])]
    return Report(
        settings=settings,
        overall=_overall(dice, rest),
        labels=tuple(labels[: dice.label_count]),
        regions=tuple(labels[dice.label_count :]),
        cases=dice.cases,
        failures=tuple(failures),
        missing_predictions=tuple(missing_predictions),
        extra_predictions=tuple(extra_predictions),
        expectations=expectations_of(dice.cases, settings),
    )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(names[:_MOST_NAMES]) or "none") + more


@dataclass(frozen=True)
class _Table:
    """One figure of all cases (N, L), NaN where there is none, and its resampled means (samples, L).

    Columns are the labels, then the regions. `patients` (N,) numbers each case's patient.
    """

    figure: Figure
    cases: tuple[CaseScores, ...]
    values: Floats
    resampled: Floats
    patients: npt.NDArray[np.int64]

    @property
    def label_count(self) -> int:
        """Columns before the regions."""
        return len(self.cases[0].labels)

    @property
    def headline(self) -> slice:
        """The columns that the overall figures are of."""
        return slice(self.label_count if self.cases[0].regions else 0, None)

    @property
    def badness(self) -> Floats:
        """(N, L), the higher the worse."""
        return {"lowest": -self.values, "highest": self.values, "farthest from 0": np.abs(self.values)}[
            self.figure.worst
        ]


def _tables(cases: Sequence[CaseScores], settings: EvaluateConfig) -> list[_Table]:
    """Of the Dice, then of the figures that any case has; all share the draws of patients."""
    ordered = _in_order(cases)
    _, patients = np.unique([case.patient_id for case in ordered], return_inverse=True)
    patients = patients.astype(np.int64)
    several = _of_several_lesions(ordered, settings.lesions)
    values = {_DICE: _values(ordered, _DICE)}
    for figure in FIGURES:
        found = _values(ordered, figure)
        if figure.is_of_lesions:
            found[:, ~several] = np.nan
        if not np.isnan(found).all():
            values[figure] = found
    generator = np.random.default_rng(settings.seed)
    columns = np.concatenate(list(values.values()), axis=1)
    means = resampled_means(columns, patients, samples=settings.bootstrap_samples, generator=generator)
    parts = np.split(means, len(values), axis=1)
    return [_Table(f, ordered, v, r, patients) for (f, v), r in zip(values.items(), parts, strict=True)]


def _in_order(cases: Sequence[CaseScores]) -> tuple[CaseScores, ...]:
    ordered = tuple(sorted(cases, key=lambda case: case.case_id))
    ids = [case.case_id for case in ordered]
    if not ordered:
        raise ValueError("there is no case to sum up")
    if repeated := sorted({a for a, b in pairwise(ids) if a == b}):
        raise ValueError(f"cases that stand twice: {some(repeated)}")
    if len({tuple(score.label for score in case.scores) for case in ordered}) > 1:
        raise ValueError("the cases were not scored with the same labels")
    return ordered


def _values(cases: Sequence[CaseScores], figure: Figure) -> Floats:
    rows = [[getattr(score, figure.name) for score in case.scores] for case in cases]
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _of_several_lesions(cases: Sequence[CaseScores], asked: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(L,) which labels are counted lesion by lesion."""
    columns = zip(*(case.scores for case in cases), strict=True)
    return np.array([scores[0].label in asked or _has_several(scores) for scores in columns])


def _has_several(scores: Sequence[LabelScore]) -> bool:
    counts = [score.lesions_expected for score in scores if score.lesions_expected]
    return bool(counts) and sum(count > 1 for count in counts) >= _SEVERAL * len(counts)


def _label_summary(column: int, dice: _Table, others: Sequence[_Table]) -> LabelSummary:
    values = dice.values[:, column]
    scored = ~np.isnan(values)
    statuses = [case.scores[column].status for case in dice.cases]
    figures = [_figure_summary(column, table) for table in others if not np.isnan(table.values[:, column]).all()]
    return LabelSummary(
        label=dice.cases[0].scores[column].label,
        n_scored=int(scored.sum()),
        n_absent=statuses.count("absent"),
        n_missed=statuses.count("missed"),
        n_false=statuses.count("false"),
        n_unannotated=statuses.count("unannotated"),
        interval_95=_interval(dice.resampled[:, column], dice.patients[scored]),
        worst=_worst_dice(dice, dice.badness[:, column], values),
        folds=_fold_means(dice, values[:, None]),
        figures=tuple(figures),
        **_spread(values[scored]),
    )


def _figure_summary(column: int, table: _Table) -> FigureSummary:
    values = table.values[:, column]
    defined = ~np.isnan(values)
    worst = _worst(table.badness[:, column])
    return FigureSummary(
        name=table.figure.name,
        n=int(defined.sum()),
        interval_95=_interval(table.resampled[:, column], table.patients[defined]),
        worst=tuple(CaseFigure(case_id=table.cases[i].case_id, value=float(values[i])) for i in worst),
        folds=_fold_means(table, values[:, None]),
        **_spread(values[defined]),
    )


def _spread(values: Floats) -> dict[str, float | None]:
    names = ("minimum", "first_quartile", "median", "third_quartile", "maximum")
    if not values.size:
        return dict.fromkeys(("mean", "std", *names))
    quantiles = np.percentile(values, (0, 25, 50, 75, 100))
    std = float(values.std(ddof=1)) if values.size > 1 else None
    return {"mean": float(values.mean()), "std": std} | dict(zip(names, quantiles.tolist(), strict=True))


def _overall(dice: _Table, others: Sequence[_Table]) -> Overall:
    means = np.array([_mean(row) for row in dice.values[:, dice.headline]])
    return Overall(
        n_cases=len(dice.cases),
        n_patients=int(dice.patients.max()) + 1,
        mean=_mean_of_means(dice.values[:, dice.headline]),
        interval_95=_overall_interval(dice),
        worst=_worst_dice(dice, -means, means),
        folds=_fold_means(dice, dice.values[:, dice.headline]),
        figures=tuple(_overall_figure(table) for table in others if table.figure.is_mean),
    )


def _overall_figure(table: _Table) -> OverallFigure:
    return OverallFigure(
        name=table.figure.name,
        mean=_mean_of_means(table.values[:, table.headline]),
        interval_95=_overall_interval(table),
        folds=_fold_means(table, table.values[:, table.headline]),
    )


def _overall_interval(table: _Table) -> Interval | None:
    resampled, scored = table.resampled[:, table.headline], ~np.isnan(table.values[:, table.headline])
    if not scored.any():
        return None
    # NaN where a resample lacks a label: without that label it would be another figure.
    means = resampled[:, scored.any(axis=0)].mean(axis=1)
    return _interval(means, table.patients[scored.any(axis=1)])


def _mean(values: Floats) -> float:
    """NaN left out; NaN when there is nothing else."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _mean_of_means(values: Floats) -> float | None:
    mean = _mean(np.array([_mean(column) for column in values.T]))
    return None if np.isnan(mean) else mean


def _interval(resampled: Floats, patients: npt.NDArray[np.int64]) -> Interval | None:
    return percentile_interval(resampled) if np.unique(patients).size > 1 else None


def _worst(badness: Floats) -> list[int]:
    """Numbers of the worst cases; those that are equally bad in the order of their ids."""
    order = [int(i) for i in np.argsort(-badness, kind="stable") if not np.isnan(badness[i])]
    return order[:WORST_CASES]


def _worst_dice(table: _Table, badness: Floats, values: Floats) -> tuple[CaseDice, ...]:
    return tuple(CaseDice(case_id=table.cases[i].case_id, dice=float(values[i])) for i in _worst(badness))


def _fold_means(table: _Table, values: Floats) -> tuple[FoldMean, ...]:
    folds = np.array([-1 if case.fold is None else case.fold for case in table.cases])
    return tuple(
        FoldMean(fold=int(fold), mean=_mean_of_means(values[folds == fold])) for fold in np.unique(folds) if fold >= 0
    )
