"""Whether the Dice that a model expects of itself tells its bad cases from its good ones: correlations over cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.config import EvaluateConfig
from pipeline.metrics import percentile_interval
from pipeline.quality import QualityEstimate
from pipeline.report_values import CaseScores, Expectation, LabelScore, Report

Floats = npt.NDArray[np.float64]

FEWEST_CASES = 3
"""Two points always lie on a line."""

FEWEST_PATIENTS = 5
"""Of fewer, resamples say little of the next patients."""

MOST_SAMPLES = 1000

TELLING = 0.5
"""A rank correlation below this puts too many bad cases among the good ones to sort by."""


def with_expected(report: Report, estimates: Mapping[str, QualityEstimate]) -> Report:
    """The report, with what was expected of its cases; by case id, and by the names of labels or regions."""
    cases = tuple(
        case.model_copy(update={part: _expected(getattr(case, part), estimates.get(case.case_id)) for part in _PARTS})
        for case in report.cases
    )
    return report.model_copy(update={"cases": cases, "expectations": expectations_of(cases, report.settings)})


def expectations_of(cases: Sequence[CaseScores], settings: EvaluateConfig) -> tuple[Expectation, ...]:
    """Of every label or region that any case has an expectation of, then of the mean over the headline's."""
    if not any(score.expected_dice is not None for case in cases for score in case.scores):
        return ()
    names = [score.label for score in cases[0].scores]
    columns = {name: [case.scores[n : n + 1] for case in cases] for n, name in enumerate(names)}
    is_by_region = bool(cases[0].regions)
    columns[_MEAN[is_by_region]] = [case.regions or case.labels for case in cases]
    patients = np.unique([case.patient_id for case in cases], return_inverse=True)[1]
    found = (_expectation(name, scores, patients, settings) for name, scores in columns.items())
    return tuple(expectation for expectation in found if expectation is not None)


def sentence_of(expectations: Sequence[Expectation]) -> str | None:
    """What a reader should make of the last, which is of the whole case; None where nothing was expected."""
    if not expectations:
        return None
    whole = expectations[-1]
    if whole.spearman is None:
        return "whether the expected Dice tells bad cases from good ones cannot be told from these cases"
    interval = whole.interval_95
    figures = f"rank correlation {whole.spearman:.2f}, {whole.n} cases"
    if interval is not None:
        figures += f", 95 % {interval[0]:.2f} to {interval[1]:.2f}"
    if whole.not_found:
        figures += f"; of {whole.not_found} cases a label was not found, of which nothing is expected"
    if interval is None or interval[0] <= 0:
        return f"it is not shown that the expected Dice tells bad cases from good ones ({figures})"
    if whole.spearman < TELLING:
        return f"the expected Dice tells bad cases from good ones only in part ({figures})"
    return f"the expected Dice tells bad cases from good ones ({figures})"


def correlation(first: Floats, second: Floats) -> float | None:
    """Pearson's of values (n,); None where a side does not vary."""
    a, b = first - first.mean(), second - second.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    # What rounding leaves of equal values is no variation.
    if norm <= 1e-12 * max(1.0, float(np.abs(first).max() * np.abs(second).max())):
        return None
    return float(np.clip((a @ b) / norm, -1, 1))


def ranks(values: Floats) -> Floats:
    """Ranks (n,) from 1 on; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[places], dtype=np.float64)


_PARTS = ("labels", "regions")
_MEAN = ("mean of labels", "mean of regions")


def _expected(scores: Sequence[LabelScore], estimate: QualityEstimate | None) -> tuple[LabelScore, ...]:
    known = {} if estimate is None else {label.label: label.expected_dice for label in estimate.labels}
    return tuple(score.model_copy(update={"expected_dice": known.get(score.label)}) for score in scores)


def _expectation(
    name: str, scores: Sequence[Sequence[LabelScore]], patients: npt.NDArray[np.intp], settings: EvaluateConfig
) -> Expectation | None:
    known = [
        [(s.expected_dice, s.dice) for s in case if s.expected_dice is not None and s.dice is not None]
        for case in scores
    ]
    both = np.array([bool(pairs) for pairs in known])
    if not both.any():
        return None
    # Both means of a case are over the same labels.
    expected, found = np.array([np.mean(pairs, axis=0) for pairs in known if pairs], dtype=np.float64).T
    missed = (any(s.status == "missed" and s.expected_dice is None for s in case) for case in scores)
    enough = both.sum() >= FEWEST_CASES
    return Expectation(
        label=name,
        n=int(both.sum()),
        expected=float(expected.mean()),
        found=float(found.mean()),
        spearman=correlation(ranks(expected), ranks(found)) if enough else None,
        interval_95=_interval(expected, found, patients[both], settings) if enough else None,
        pearson=correlation(expected, found) if enough else None,
        not_found=sum(missed),
    )


def _interval(
    expected: Floats, found: Floats, patients: npt.NDArray[np.intp], settings: EvaluateConfig
) -> tuple[float, float] | None:
    """Of Spearman's correlation, over patients drawn with replacement, each with all of its cases."""
    cases_of = [np.flatnonzero(patients == patient) for patient in np.unique(patients)]
    if len(cases_of) < FEWEST_PATIENTS:
        return None
    generator = np.random.default_rng(settings.seed)
    samples = []
    for _ in range(min(MOST_SAMPLES, settings.bootstrap_samples)):
        drawn = np.concatenate([cases_of[n] for n in generator.integers(len(cases_of), size=len(cases_of))])
        samples.append(correlation(ranks(expected[drawn]), ranks(found[drawn])))
    return percentile_interval(np.array([np.nan if value is None else value for value in samples]))
