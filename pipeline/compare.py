"""Two evaluations of the same cases: is one better, by how much, and where.

Everything is paired by case. A difference is always B minus A in the figure's own unit; which sign is a gain depends on
the figure: of an overlap more is better, of a distance less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

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
    rank_sign: int
    wins: int
    losses: int
    ties: int

    @property
    def evident_sign(self) -> int:
        """1 where the figure of B is more, -1 where it is less, 0 where there is no evidence of either."""
        if self.difference is None:
            return 0
        return evident_sign(self.difference, self.interval_95, p_value=self.p_corrected, rank_sign=self.rank_sign)


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
        told = [self._sentence(row, better) for row in (self.overall, *self.labels) if (better := self.better(row))]
        if not told:
            return f"no evidence of a difference in {self.figure} over {self.overall.n_cases} shared cases"
        return "; ".join(told)

    def better(self, row: Difference) -> Literal["A", "B"] | None:
        """Which of the two there is evidence for, in a row of this comparison."""
        if not row.evident_sign:
            return None
        return "B" if (row.evident_sign > 0) == self.more_is_better else "A"

    def to_json(self) -> dict[str, Any]:
        """A JSON value of all figures, with the verdict."""
        return {"format": "volseg-comparison-1", "verdict": self.verdict} | asdict(self)

    def _sentence(self, row: Difference, better: str) -> str:
        return f"{row.label}: {better} is better by {abs(row.difference or 0.0):.4g} (p = {row.p_corrected:.2g})"


def compare(a: Report, b: Report, *, figure: str = "dice", settings: EvaluateConfig) -> Comparison:
    """Compare two reports over the cases that both have scored. Their order changes nothing.

    Cases of one patient are no independent evidence: intervals resample patients, and tests are on the mean of each
    patient's cases. Sources: Wilcoxon 1945 (Biometrics Bulletin 1:80); Holm 1979 (Scandinavian Journal of Statistics
    6:65); for the resampling see `metrics.resampled_means`.

    Raises:
        RunError: other labels, no shared case, no value of the figure in both, or a case of two patients.
        ValueError: no such figure.
    """
    pairs = _pairs(a.cases, b.cases, figure)
    rows = [pairs.row(name, pairs.values[:, :, column], settings) for column, name in enumerate(pairs.names)]
    corrected = holm([row.p_value for row in rows])
    ids_a, ids_b = ({case.case_id for case in report.cases} for report in (a, b))
    return Comparison(
        figure=figure,
        more_is_better=FIGURES[figure],
        overall=pairs.row(a.headline, pairs.means, settings),
        labels=tuple(replace(row, p_corrected=p) for row, p in zip(rows, corrected, strict=True)),
        changed=_changed(pairs.case_ids, pairs.means),
        only_in_a=tuple(sorted(ids_a - ids_b)),
        only_in_b=tuple(sorted(ids_b - ids_a)),
    )


def mean_dice_difference(a: Sequence[CaseScores], b: Sequence[CaseScores], *, settings: EvaluateConfig) -> Difference:
    """That of the mean over labels, or over regions where there are any, alone: `compare(...).overall`.

    Raises:
        RunError: as `compare`.
    """
    pairs = _pairs(a, b, "dice")
    return pairs.row("mean", pairs.means, settings)


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


def evident_sign(
    mean: float, interval_95: tuple[float, float] | None, *, p_value: float | None, rank_sign: int
) -> Literal[-1, 0, 1]:
    """Which way differences go beyond doubt: what everything here calls evidence.

    The test is two-sided and of ranks: many small losses beside a few large gains have a small p and a mean above 0. So
    the ranks, the mean and its interval must lie on one side of 0.
    """
    if p_value is None or p_value >= SIGNIFICANT or interval_95 is None:
        return 0
    low, high = interval_95
    if mean > 0 and rank_sign > 0 and low > 0:
        return 1
    return -1 if mean < 0 and rank_sign < 0 and high < 0 else 0


def rank_sign(differences: Floats) -> int:
    """Sign of the sum of signed ranks, zeros left out: the side that `signed_rank_p` is evidence for."""
    from scipy.stats import rankdata

    moved = differences[np.abs(differences) > TIE]
    return int(np.sign((rankdata(np.abs(moved)) * np.sign(moved)).sum()))


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


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The cases that two evaluations share, with a figure's values (2, N, L) of labels, then regions, NaN where either
    has none, and `means` (2, N) over regions, or over labels where there are none. `patients` (N,) are numbers."""

    case_ids: tuple[str, ...]
    names: tuple[str, ...]
    values: Floats
    means: Floats
    patients: npt.NDArray[np.int64]
    more_is_better: bool

    def row(self, label: str, values: Floats, settings: EvaluateConfig) -> Difference:
        """Of values (2, N)."""
        return _difference(label, values, self.patients, more_is_better=self.more_is_better, settings=settings)


def _pairs(a: Sequence[CaseScores], b: Sequence[CaseScores], figure: str) -> _Pairs:
    if figure not in FIGURES:
        raise ValueError(f"no figure '{figure}' to compare; there are {', '.join(FIGURES)}")
    cases_a, cases_b = ({case.case_id: case for case in cases} for cases in (a, b))
    shared = sorted(cases_a.keys() & cases_b.keys())
    if not shared:
        raise RunError("the two evaluations share no case; compare runs of the same dataset")
    names = _names(a, b)
    values = np.array([[_values(cases[i], figure) for i in shared] for cases in (cases_a, cases_b)])
    values[:, np.isnan(values).any(axis=0)] = np.nan
    if bool(np.isnan(values).all()):
        raise RunError(f"no case has a {figure} in both evaluations; evaluate both again with this version")
    patients = _patients([cases_a[i] for i in shared], [cases_b[i] for i in shared])
    means = _row_means(values[:, :, len(a[0].labels) :] if a[0].regions else values)
    return _Pairs(tuple(shared), tuple(names), values, means, patients, FIGURES[figure])


def _names(a: Sequence[CaseScores], b: Sequence[CaseScores]) -> list[str]:
    names, others = ([score.label for score in cases[0].scores] for cases in (a, b))
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
    change, gain = b - a, b - a if more_is_better else a - b
    of_patients = means_of_patients(change, patients[both])
    # Of a single patient nothing can be said of the next.
    p_value = signed_rank_p(of_patients) if of_patients.size > 1 else None
    return Difference(
        label=label,
        n_cases=int(both.sum()),
        mean_a=_mean(a),
        mean_b=_mean(b),
        difference=_mean(change),
        interval_95=interval_of_mean(change, patients[both], settings),
        p_value=p_value,
        p_corrected=p_value,
        rank_sign=rank_sign(of_patients),
        wins=int((gain > TIE).sum()),
        losses=int((gain < -TIE).sum()),
        ties=int((np.abs(gain) <= TIE).sum()),
    )


def means_of_patients(values: Floats, patients: npt.NDArray[np.int64]) -> Floats:
    """(P,) from the values (N,) of cases; `patients` (N,) numbers each case's, in any way."""
    _, owners = np.unique(patients, return_inverse=True)
    counts = np.bincount(owners)
    return np.asarray(np.bincount(owners, weights=values) / counts)


def interval_of_mean(
    values: Floats, patients: npt.NDArray[np.int64], settings: EvaluateConfig
) -> tuple[float, float] | None:
    """95 % interval of the mean of values (N,), from resampled patients; None of fewer than two."""
    found, owners = np.unique(patients, return_inverse=True)
    if len(found) < 2:
        return None
    generator = np.random.default_rng(settings.seed)
    resampled = resampled_means(values[:, None], owners, samples=settings.bootstrap_samples, generator=generator)
    return percentile_interval(resampled[:, 0])


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _changed(case_ids: Sequence[str], means: Floats) -> tuple[ChangedCase, ...]:
    rows = [
        ChangedCase(case_id, float(a), float(b), float(b - a))
        for case_id, a, b in zip(case_ids, *means, strict=True)
        if abs(b - a) > TIE
    ]
    return tuple(sorted(rows, key=lambda row: (-abs(row.difference), row.case_id))[:MOST_CHANGED])
