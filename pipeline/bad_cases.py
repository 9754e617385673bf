"""Which cases of an evaluation are bad, and whether the model or a header made them so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.header_faults import explain
from pipeline.report_values import CaseScores
from transforms.labels import LabelSchema
from transforms.volume import Volume

BAD_DICE = 0.5
"""A case below it is bad, however the others fare."""

FENCE = 1.5
"""A case further below the first quartile than this many interquartile ranges is bad too (Tukey 1977)."""

MOST_CASES = 10
"""The worst that are looked into: each is scored some fifty times."""


def mean_dice(case: CaseScores) -> float | None:
    """The mean over a case's regions, or labels if there are none; None where nothing was scored."""
    scored = [score.dice for score in case.regions or case.labels if score.dice is not None]
    return sum(scored) / len(scored) if scored else None


def bad_cases(cases: Sequence[CaseScores]) -> tuple[str, ...]:
    """Ids of the bad ones, worst first, at most `MOST_CASES`."""
    ranked = sorted((mean, case.case_id) for case in cases if (mean := mean_dice(case)) is not None)
    if not ranked:
        return ()
    first, third = np.percentile([mean for mean, _ in ranked], (25, 75))
    limit = max(BAD_DICE, float(first - FENCE * (third - first)))
    return tuple(case_id for mean, case_id in ranked if mean < limit)[:MOST_CASES]


def explain_case(prediction: Volume, reference: Volume, schema: LabelSchema) -> str | None:
    """What of header or names would make a good prediction of this one, in a sentence, or None.

    `reference` holds label ids of the schema; both lie on one grid.
    """
    names = {label.id: label.name for label in schema.labels}
    codes = reference.geometry.axis_codes
    found = explain(prediction.voxels, reference.voxels, names=names, axis_codes=codes)
    return None if found is None else found.sentence
