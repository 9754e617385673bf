"""Two evaluations of the same cases: is one better, by how much, and where.

Everything is paired by case. A difference is always B minus A in the figure's own unit; which sign is a gain depends on
the figure: of an overlap more is better, of a distance less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import report_values
from pipeline.config import EvaluateConfig
from pipeline.errors import RunError
from pipeline.metrics import percentile_interval, resampled_means
from pipeline.report_values import CaseScores, LabelScore, Report

Floats = npt.NDArray[np.float64]

SIGNIFICANT = 0.05
"""A corrected p-value below it is called evidence of a difference."""

TIE = 1e-9
"""Differences not larger than this are neither a win nor a loss; they are rounding."""

MOST_CHANGED = 5

MOST_EXACT = 50
"""Differences up to which a test counts every way in which their signs could fall."""

FIGURES: Mapping[str, bool] = {"dice": True} | {
    figure.name: figure.worst == "lowest" for figure in report_values.FIGURES if figure.worst != "farthest from 0"
}
"""What can be compared, and whether more of it is better."""


@dataclass(frozen=True)
class Difference:
    """B minus A of one label, one region, or the mean over them (`label` names which).

    `interval_95` is of the mean difference, from resampled patients. `p_value` is of Wilcoxon's signed-rank test on the
    patients' mean differences, two-sided; `p_corrected` the same after Holm's correction over the labels (of the mean
    over them, which is one test, the same). None where too few differ to test. Wins are cases where B is better.
    """

    label: str
    n_cases: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    interval_95: tuple[float, float] | None
    p_value: float | None
    p_corrected: float | None
    wins: int
    losses: int
    ties: int

    @property
    def is_evident(self) -> bool:
        """True when the difference is more than chance explains."""
        return self.p_corrected is not None and self.p_corrected < SIGNIFICANT


@dataclass(frozen=True)
class ChangedCase:
    """A case, and by how much its mean over labels differs."""

    case_id: str
    value_a: float
    value_b: float
    difference: float


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found. `changed` has the largest changes first, for better or worse."""

    figure: str
    more_is_better: bool
    overall: Difference
    labels: tuple[Difference, ...]
    changed: tuple[ChangedCase, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """What it all says, in a sentence or two."""
        evident = [row for row in self.labels if row.is_evident]
        told = [self._sentence(row) for row in ([self.overall] if self.overall.is_evident else []) + evident]
        if not told:
            return f"no evidence of a difference in {self.figure} over {self.overall.n_cases} shared cases"
        return "; ".join(told)

    def to_json(self) -> dict[str, Any]:
        """A JSON value of all figures, with the verdict."""
        return {"format": "volseg-comparison-1", "verdict": self.verdict} | asdict(self)

    def _sentence(self, row: Difference) -> str:
        difference = row.difference or 0.0
        better = "B is better" if (difference > 0) == self.more_is_better else "A is better"
        return f"{row.label}: {better} by {abs(difference):.4g} (p = {row.p_corrected:.2g})"


def compare(a: Report, b: Report, *, figure: str = "dice", settings: EvaluateConfig) -> Comparison:
    """Compare two reports over the cases that both have scored. Their order changes nothing.

    Cases of one patient are no independent evidence: intervals resample patients, and tests are on the mean of each
    patient's cases. Sources: Wilcoxon 1945 (Biometrics Bulletin 1:80); Holm 1979 (Scandinavian Journal of Statistics
    6:65); for the resampling see `metrics.resampled_means`.

    Raises:
        RunError: other labels, no shared case, no value of the figure in both, or a case of two patients.
        ValueError: no such figure.
    """
    if figure not in FIGURES:
        raise ValueError(f"no figure '{figure}' to compare; there are {', '.join(FIGURES)}")
    cases_a, cases_b = ({case.case_id: case for case in report.cases} for report in (a, b))
    shared = sorted(cases_a.keys() & cases_b.keys())
    if not shared:
        raise RunError("the two evaluations share no case; compare runs of the same dataset")
    names = _names(a, b)
    values = np.array([[_values(cases[i], figure) for i in shared] for cases in (cases_a, cases_b)])
    values[:, np.isnan(values).any(axis=0)] = np.nan
    if bool(np.isnan(values).all()):
        raise RunError(f"no case has a {figure} in both evaluations; evaluate both again with this version")
    patients = _patients([cases_a[i] for i in shared], [cases_b[i] for i in shared])
    row_of = partial(_difference, patients=patients, more_is_better=FIGURES[figure], settings=settings)
    rows = [row_of(name, values[:, :, column]) for column, name in enumerate(names)]
    corrected = holm([row.p_value for row in rows])
    means = _row_means(values[:, :, len(a.labels) :] if a.regions else values)
    return Comparison(
        figure=figure,
        more_is_better=FIGURES[figure],
        overall=row_of(a.headline, means),
        labels=tuple(replace(row, p_corrected=p) for row, p in zip(rows, corrected, strict=True)),
        changed=_changed(shared, means),
        only_in_a=tuple(sorted(cases_a.keys() - cases_b.keys())),
        only_in_b=tuple(sorted(cases_b.keys() - cases_a.keys())),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: each p times the number of hypotheses that are not rejected before it, never less
    than a smaller one's. None stays None and is no hypothesis. Source: Holm 1979."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, i) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p))
        corrected[i] = least
    return corrected


def signed_rank_p(differences: Floats) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test, zeros left out; None when nothing differs.

    Exact up to `MOST_EXACT` differences, those of equal sizes sharing their mean rank; beyond, by the normal
    approximation with SciPy's correction for ties.
    """
    from scipy.stats import rankdata, wilcoxon

    moved = differences[np.abs(differences) > TIE]
    if not moved.size:
        return None
    if moved.size > MOST_EXACT:
        return float(wilcoxon(moved, zero_method="wilcox", method="asymptotic").pvalue)
    # Twice the ranks are whole numbers, so all sums that signs can make are counted one rank after the other.
    ranks = np.rint(2 * rankdata(np.abs(moved))).astype(np.int64)
    chance = np.zeros(int(ranks.sum()) + 1)
    chance[0] = 1.0
    for rank in ranks.tolist():
        chance[rank:] = chance[rank:] / 2 + chance[:-rank] / 2
        chance[:rank] /= 2
    found = int(ranks[moved > 0].sum())
    return min(1.0, 2 * float(min(chance[: found + 1].sum(), chance[found:].sum())))


def _names(a: Report, b: Report) -> list[str]:
    names, others = ([score.label for score in report.cases[0].scores] for report in (a, b))
    if names != others:
        raise RunError(
            f"the evaluations have other labels: {', '.join(names)} against {', '.join(others)}; "
            "compare runs of the same labels"
        )
    return names


def _values(case: CaseScores, figure: str) -> list[float]:
    return [_value(score, figure) for score in case.scores]


def _value(score: LabelScore, figure: str) -> float:
    value = getattr(score, figure)
    return math.nan if value is None else float(value)


def _patients(a: Sequence[CaseScores], b: Sequence[CaseScores]) -> npt.NDArray[np.int64]:
    other = [left.case_id for left, right in zip(a, b, strict=True) if left.patient_id != right.patient_id]
    if other:
        raise RunError(f"case {other[0]} belongs to another patient in each evaluation; compare runs of one manifest")
    _, numbers = np.unique([case.patient_id for case in a], return_inverse=True)
    return numbers.astype(np.int64)


def _row_means(values: Floats) -> Floats:
    """(2, N, L) to (2, N): the mean of what is defined, NaN where nothing is."""
    defined = ~np.isnan(values)
    counts = defined.sum(axis=2)
    sums = np.where(defined, values, 0.0).sum(axis=2)
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def _difference(
    label: str, values: Floats, patients: npt.NDArray[np.int64], *, more_is_better: bool, settings: EvaluateConfig
) -> Difference:
    """One row from values (2, N) of A and B; not yet corrected for how many rows are tested."""
    both = ~np.isnan(values).any(axis=0)
    a, b = values[:, both]
    gain = b - a if more_is_better else a - b
    interval, p_value = _evidence(b - a, patients[both], settings)
    return Difference(
        label=label,
        n_cases=int(both.sum()),
        mean_a=_mean(a),
        mean_b=_mean(b),
        difference=_mean(b - a),
        interval_95=interval,
        p_value=p_value,
        p_corrected=p_value,
        wins=int((gain > TIE).sum()),
        losses=int((gain < -TIE).sum()),
        ties=int((np.abs(gain) <= TIE).sum()),
    )


def _evidence(
    change: Floats, patients: npt.NDArray[np.int64], settings: EvaluateConfig
) -> tuple[tuple[float, float] | None, float | None]:
    """Interval and p of paired differences (N,); neither where they are of fewer than two patients."""
    _, owners = np.unique(patients, return_inverse=True)
    counts = np.bincount(owners)
    if len(counts) < 2:
        return None, None
    generator = np.random.default_rng(settings.seed)
    resampled = resampled_means(change[:, None], owners, samples=settings.bootstrap_samples, generator=generator)
    return percentile_interval(resampled[:, 0]), signed_rank_p(np.bincount(owners, weights=change) / counts)


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _changed(case_ids: Sequence[str], means: Floats) -> tuple[ChangedCase, ...]:
    rows = [
        ChangedCase(case_id, float(a), float(b), float(b - a))
        for case_id, a, b in zip(case_ids, *means, strict=True)
        if abs(b - a) > TIE
    ]
    return tuple(sorted(rows, key=lambda row: (-abs(row.difference), row.case_id))[:MOST_CHANGED])
