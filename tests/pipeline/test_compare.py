"""Comparing two evaluations: worlds whose statistics can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.compare import Comparison, compare, evident_sign, holm, rank_sign, signed_rank_p
from pipeline.config import EvaluateConfig
from pipeline.errors import RunError
from pipeline.report_values import CaseScores, LabelScore, Report
from pipeline.summary import summarise

SETTINGS = EvaluateConfig(bootstrap_samples=500)


def report(dices: Mapping[str, Sequence[float | None]], *, patients: Mapping[str, str] | None = None) -> Report:
    """A report of labels a, b, ... from the Dice of each case's labels."""
    cases = [
        CaseScores(
            case_id=case_id,
            patient_id=(patients or {}).get(case_id, case_id),
            labels=tuple(_score(name, dice) for name, dice in zip("abcdef", row, strict=False)),
        )
        for case_id, row in dices.items()
    ]
    return summarise(cases, settings=SETTINGS)


def _score(name: str, dice: float | None) -> LabelScore:
    facts: dict[str, Any] = {"prediction_mm3": 1.0, "reference_mm3": 1.0}
    if dice is not None:
        facts["hausdorff_95_mm"] = 10.0 * (1.0 - dice)
    return LabelScore(label=name, status="absent" if dice is None else "scored", dice=dice, **facts)


def compared(
    a: Mapping[str, Sequence[float | None]], b: Mapping[str, Sequence[float | None]], **how: Any
) -> Comparison:
    return compare(report(a), report(b), settings=SETTINGS, **how)


def test_a_run_against_itself_is_no_evidence_of_anything() -> None:
    one = {f"case_{n}": [0.5 + n / 100] for n in range(10)}
    found = compared(one, one)
    assert found.verdict == "no evidence of a difference in dice over 10 shared cases"
    assert (found.overall.wins, found.overall.losses, found.overall.ties) == (0, 0, 10)
    assert found.changed == ()


def test_the_same_gain_in_every_case_is_evidence_from_six_cases_on() -> None:
    def gain(count: int) -> Comparison:
        a = {f"case_{n}": [0.5 + n / 100] for n in range(count)}
        return compared(a, {i: [dices[0] + 0.01 * (n + 1)] for n, (i, dices) in enumerate(a.items())})

    # All signs equal: 2 of 2**n equally likely outcomes are as extreme.
    assert gain(5).overall.p_value == pytest.approx(2 / 2**5)
    assert gain(6).overall.p_value == pytest.approx(2 / 2**6)
    assert "no evidence" in gain(5).verdict
    assert gain(6).verdict.startswith("mean of labels: B is better by 0.035")


def test_differences_are_b_minus_a_and_of_a_distance_less_is_better() -> None:
    a, b = {f"c{n}": [0.6] for n in range(8)}, {f"c{n}": [0.7 + n / 100] for n in range(8)}
    dice, distance = compared(a, b), compared(a, b, figure="hausdorff_95_mm")
    assert dice.overall.difference == pytest.approx(0.135)
    assert distance.overall.difference == pytest.approx(-1.35)
    assert (dice.overall.wins, distance.overall.wins, distance.overall.losses) == (8, 8, 0)
    assert "B is better by 1.35" in distance.verdict


def test_labels_are_corrected_by_holm() -> None:
    # Holm 1979: sorted 0.005, 0.01, 0.03, 0.04 are multiplied by 4, 3, 2, 1 and never fall.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02], nan_ok=True)
    assert holm([0.7, 0.8]) == [1.0, 1.0]


def test_cases_of_one_patient_are_one_piece_of_evidence() -> None:
    a = {f"c{n}": [0.5] for n in range(8)}
    b = {f"c{n}": [0.6 + n / 1000] for n in range(8)}
    owners = {f"c{n}": f"p{n // 2}" for n in range(8)}
    found = compare(report(a, patients=owners), report(b, patients=owners), settings=SETTINGS)
    assert found.overall.p_value == pytest.approx(2 / 2**4)
    assert found.overall.n_cases == 8


def test_only_cases_that_both_scored_count_and_the_others_are_named() -> None:
    found = compared(
        {"x": [0.5, None], "y": [0.4, 0.4], "z": [0.1, 0.1]}, {"w": [1, 1], "x": [0.7, 0.9], "y": [0.4, 0.5]}
    )
    assert (found.only_in_a, found.only_in_b) == (("z",), ("w",))
    assert [row.n_cases for row in found.labels] == [2, 1]
    assert found.labels[0].mean_b == pytest.approx(0.55)
    assert [row.case_id for row in found.changed] == ["x", "y"]
    assert found.changed[0].difference == pytest.approx(0.2)


def test_a_label_that_no_case_holds_has_no_figures() -> None:
    found = compared({"x": [0.5, None], "y": [0.5, None]}, {"x": [0.5, None], "y": [0.6, None]})
    row = found.labels[1]
    assert (row.n_cases, row.mean_a, row.difference, row.p_value, row.interval_95) == (0, None, None, None, None)


def test_the_interval_holds_the_difference_and_the_order_of_cases_changes_nothing() -> None:
    random = np.random.default_rng(0)
    a = {f"c{n}": [float(d)] for n, d in enumerate(random.uniform(0.4, 0.6, 30))}
    b = {i: [row[0] + float(random.normal(0.02, 0.05))] for i, row in a.items()}
    found = compared(a, b)
    low, high = found.overall.interval_95 or (math.nan, math.nan)
    assert low < (found.overall.difference or math.nan) < high
    assert compared(dict(reversed(a.items())), b) == found


def test_what_cannot_be_compared_is_told_in_one_line() -> None:
    with pytest.raises(RunError, match="share no case"):
        compared({"x": [0.5]}, {"y": [0.5]})
    with pytest.raises(RunError, match="other labels: a against a, b"):
        compared({"x": [0.5]}, {"x": [0.5, 0.5]})
    with pytest.raises(RunError, match="no case has a surface_dice in both"):
        compared({"x": [0.5]}, {"x": [0.5]}, figure="surface_dice")
    with pytest.raises(RunError, match="case x belongs to another patient"):
        compare(report({"x": [0.5]}, patients={"x": "p"}), report({"x": [0.5]}), settings=SETTINGS)


def few_gain_much(sign: float = 1.0) -> list[float]:
    """What 37 of 40 patients lose, all of it together less than what the other three gain."""
    return [sign * (-0.004 - n / 1e6) for n in range(37)] + [sign * (0.1 + n / 100) for n in range(3)]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ranks_that_say_harm_are_no_evidence_of_a_mean_that_gains(sign: float) -> None:
    a = {f"c{n:02}": [0.5] for n in range(40)}
    found = compared(a, {i: [0.5 + change] for i, change in zip(a, few_gain_much(sign), strict=True)})
    row = found.overall
    assert (row.difference or 0.0) * sign > 0.004
    assert row.p_corrected is not None
    assert row.p_corrected < 0.001
    assert row.rank_sign == -sign
    assert (row.evident_sign, found.better(row)) == (0, None)
    assert "no evidence" in found.verdict


def test_ranks_mean_and_interval_must_lie_on_one_side() -> None:
    assert evident_sign(0.1, (0.05, 0.2), p_value=0.01, rank_sign=1) == 1
    assert evident_sign(-0.1, (-0.2, -0.05), p_value=0.01, rank_sign=-1) == -1
    for mean, interval, p_value, sign in (
        (0.1, (0.05, 0.2), 0.05, 1),
        (0.1, (0.05, 0.2), None, 0),
        (0.1, (-0.01, 0.2), 0.01, 1),
        (0.1, (0.05, 0.2), 0.01, -1),
        (-0.1, (-0.2, 0.01), 0.01, -1),
        (0.1, None, 0.01, 1),
    ):
        assert evident_sign(mean, interval, p_value=p_value, rank_sign=sign) == 0


def test_nothing_differs_is_no_test() -> None:
    assert signed_rank_p(np.zeros(5)) is None
    assert rank_sign(np.zeros(5)) == 0


def test_signed_ranks_are_counted_exactly_with_and_without_equal_sizes() -> None:
    """SciPy counts without equal sizes; with them, every way in which the signs could fall is gone through here."""
    from itertools import product

    from scipy.stats import rankdata, wilcoxon

    random = np.random.default_rng(3)
    for size in (1, 6, 23, 50):
        plain = random.normal(0.3, 1.0, size)
        assert signed_rank_p(plain) == pytest.approx(wilcoxon(plain, method="exact").pvalue)
    for _ in range(5):
        tied = random.integers(1, 4, 9) * random.choice([-0.01, 0.01], 9)
        ranks = rankdata(np.abs(np.round(tied, 6)))
        sums = [ranks[np.array(signs)].sum() for signs in product([False, True], repeat=9)]
        found = ranks[tied > 0].sum()
        low, high = np.mean(np.array(sums) <= found), np.mean(np.array(sums) >= found)
        assert signed_rank_p(np.round(tied, 6)) == pytest.approx(min(1.0, 2 * min(low, high)))
    assert signed_rank_p(np.arange(1.0, 80.0)) == pytest.approx(0.0, abs=1e-10)
