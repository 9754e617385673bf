"""Are mirrored passes worth their time? Asked of the cases that a model never saw, scored with them and without."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.compare import mean_dice_difference
from pipeline.config import EvaluateConfig
from pipeline.report_values import CaseScores, Mirroring

WORTH_DICE = 0.001
"""Mirroring takes as many times as long as there are passes; for less than this it is not done."""


def weigh_mirroring(plain: Sequence[CaseScores], mirrored: Sequence[CaseScores], settings: EvaluateConfig) -> Mirroring:
    """Compare the same cases predicted in one pass and in mirrored ones, paired by patient (see `compare`).

    Raises:
        RunError: they do not have the same labels.
    """
    found, folds = _weighed(plain, mirrored, settings), sorted({case.fold for case in plain if case.fold is not None})
    if found.dice_plain is None or len(folds) < 2:
        return found
    nested: list[CaseScores] = []
    for fold in folds:
        others = _weighed(_without(plain, fold), _without(mirrored, fold), settings)
        nested += [case for case in (mirrored if others.worth_it else plain) if case.fold == fold]
    return found.model_copy(update={"dice_nested": mean_dice_difference(plain, nested, settings=settings).mean_b})


def _without(cases: Sequence[CaseScores], fold: int) -> list[CaseScores]:
    return [case for case in cases if case.fold != fold]


def _weighed(plain: Sequence[CaseScores], mirrored: Sequence[CaseScores], settings: EvaluateConfig) -> Mirroring:
    if not _share_a_dice(plain, mirrored):
        return Mirroring(n_cases=0, dice_plain=None, dice_mirrored=None, interval_95=None, p_value=None, worth_it=False)
    row = mean_dice_difference(plain, mirrored, settings=settings)
    return Mirroring(
        n_cases=row.n_cases,
        dice_plain=row.mean_a,
        dice_mirrored=row.mean_b,
        interval_95=row.interval_95,
        p_value=row.p_corrected,
        worth_it=row.evident_sign > 0 and (row.difference or 0.0) >= WORTH_DICE,
    )


def _share_a_dice(plain: Sequence[CaseScores], mirrored: Sequence[CaseScores]) -> bool:
    others = {case.case_id: case for case in mirrored}
    return any(
        one.dice is not None and other.dice is not None
        for case in plain
        if case.case_id in others
        for one, other in zip(case.scores, others[case.case_id].scores, strict=False)
    )
