"""What a model expects of itself: the Dice by hand, the table, and its correlation with the true one."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from pipeline.config import EvaluateConfig
from pipeline.dice_tally import DiceTally
from pipeline.errors import RunError
from pipeline.evaluate import evaluate_files
from pipeline.expectation import correlation, expectations_of, ranks, sentence_of, with_expected
from pipeline.quality import (
    QUALITY_CSV,
    LabelEstimate,
    QualityEstimate,
    look_first,
    quality_file,
    read_quality,
    record_quality,
    write_quality_table,
)
from pipeline.report_tables import tables
from pipeline.report_values import CaseScores, LabelScore, Report
from pipeline.summary import summarise
from transforms.labels import LabelSchema, Region, schema_from_names

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMA = schema_from_names({1: "a", 2: "b"})
LABELS = schema_from_names({1: "label 1", 2: "label 2"})
SETTINGS = EvaluateConfig(bootstrap_samples=200)


def estimate(expected_mm3: float = 1.0, **labels: float | None) -> QualityEstimate:
    """Of labels of 1 mm3, or of none."""
    found = (
        LabelEstimate(label=n, expected_dice=v, decided_mm3=0.0 if v is None else 1.0, expected_mm3=expected_mm3)
        for n, v in labels.items()
    )
    return QualityEstimate(labels=tuple(found), models=("f00d",))


class TestTally:
    def test_by_hand(self) -> None:
        tally = DiceTally(SCHEMA)
        # Four voxels in two planes: a, a, background, background; b nowhere.
        tally.add(torch.tensor([[0.1, 0.4], [0.9, 0.6], [0.0, 0.0]])[:, :, None])
        tally.add(torch.tensor([[0.7, 1.0], [0.3, 0.0], [0.0, 0.0]])[:, :, None])
        a, b = tally.estimate(2.0).labels
        assert a.expected_dice == pytest.approx(2 * (0.9 + 0.6) / (1.8 + 2))
        assert (a.decided_mm3, a.expected_mm3) == (4.0, pytest.approx(3.6))
        assert (b.expected_dice, b.decided_mm3) == (None, 0.0)
        assert tally.estimate(2.0).not_found == ("b",)
        assert tally.estimate(2.0).mean == a.expected_dice

    def test_a_sure_model_expects_to_be_right(self) -> None:
        tally = DiceTally(SCHEMA)
        tally.add(torch.eye(3)[:, :, None])
        assert [label.expected_dice for label in tally.estimate(1.0).labels] == [1.0, 1.0]

    def test_regions_are_each_a_yes_or_no(self) -> None:
        regions = (Region(name="whole", labels=("a", "b"), paints="b"), Region(name="core", labels=("a",), paints="a"))
        tally = DiceTally(LabelSchema(labels=SCHEMA.labels, regions=regions))
        tally.add(torch.tensor([[0.9, 0.8], [0.2, 0.4]])[:, :, None])
        whole, core = tally.estimate(1.0).labels
        assert (whole.label, whole.expected_dice) == ("whole", pytest.approx(2 * 1.7 / (1.7 + 2)))
        assert (core.label, core.expected_dice) == ("core", None)

    def test_it_is_the_dice_where_probabilities_are_right(self) -> None:
        """Truths drawn by the very probabilities: their mean Dice is what was expected."""
        generator = torch.Generator().manual_seed(0)
        p = torch.rand((1, 40, 40), generator=generator)
        tally = DiceTally(schema_from_names({1: "a"}))
        tally.add(torch.cat([1 - p, p]))
        expected = tally.estimate(1.0).labels[0].expected_dice
        decided, truths = p[0] > 0.5, torch.rand((200, 40, 40), generator=generator) < p
        dice = 2 * (truths & decided).sum((1, 2)) / (truths.sum((1, 2)) + decided.sum())
        assert expected == pytest.approx(float(dice.mean()), abs=0.003)


class TestTable:
    def test_the_first_row_is_to_be_looked_at_first(self, tmp_path: Path) -> None:
        for name, found in (
            ("good", estimate(a=0.9, b=0.8)),
            ("bad", estimate(a=0.4, b=None)),
            ("empty", estimate(a=None, b=None)),
            ("good", estimate(a=0.95, b=0.85)),
        ):
            record_quality(tmp_path, name, found)
        write_quality_table(tmp_path, read_quality(tmp_path))
        rows = list(csv.DictReader((tmp_path / QUALITY_CSV).read_text().splitlines()))
        assert [row["study"] for row in rows] == ["empty", "bad", "good"] == look_first(read_quality(tmp_path))
        assert [row["mean_expected_dice"] for row in rows] == ["", "0.4000", "0.9000"]
        assert [row["not_found"] for row in rows] == ["a b", "b", ""]
        assert read_quality(tmp_path)["bad"] == estimate(a=0.4, b=None)
        write_quality_table(tmp_path, {})
        assert not (tmp_path / QUALITY_CSV).exists()

    def test_what_was_expected_and_not_found_is_looked_at_before_what_is_not_there(self) -> None:
        found = {
            "whole": estimate(a=0.9, b=0.9),
            "poor": estimate(a=0.5, b=0.5),
            # A tenth of what b has elsewhere, and next to nothing.
            "missed": estimate(0.1, a=0.9, b=None),
            "without": estimate(0.01, a=0.8, b=None),
            "empty": estimate(0.01, a=None, b=None),
        }
        assert look_first(found) == ["empty", "missed", "poor", "without", "whole"]

    def test_there_may_be_none_but_no_damaged_one(self, tmp_path: Path) -> None:
        assert read_quality(tmp_path) == {}
        file = quality_file(tmp_path, "a")
        file.parent.mkdir()
        ours = '{"format": "volseg-quality-1", '
        for text in ("", "{", ours, ours + '"labels": []}', ours + '"labels": [1], "models": []}'):
            file.write_text(text)
            with pytest.raises(RunError, match="damaged"):
                read_quality(tmp_path)
        for text in ("[]", "3", "{}", '{"format": "another"}'):
            file.write_text(text)
            assert read_quality(tmp_path) == {}

    def test_a_study_is_written_and_read_without_the_others(self, tmp_path: Path) -> None:
        record_quality(tmp_path, "a b", estimate(a=0.5))
        quality_file(tmp_path, "c").write_text("damaged")
        record_quality(tmp_path, "a b", estimate(a=0.6))
        quality_file(tmp_path, "c").unlink()
        (quality_file(tmp_path, "c").parent / ".writing-x-c.quality.json").write_text("cut sh")
        assert read_quality(tmp_path) == {"a_b": estimate(a=0.6)}


class TestEvaluating:
    @pytest.fixture
    def predictions(self, tmp_path: Path) -> Path:
        """Three cases; of each the first label is found in full, and half of the second."""
        folder = tmp_path / "predictions"
        for n, name in enumerate("xyz", start=1):
            reference = np.zeros((6, 5, 4), np.uint8)
            reference[:n], reference[4:] = 1, 2
            prediction = reference.copy()
            prediction[5:] = 0
            for where, drawn in ((tmp_path / "references", reference), (folder, prediction)):
                where.mkdir(exist_ok=True)
                nib.save(nib.Nifti1Image(drawn, np.eye(4)), where / f"{name}.nii.gz")  # type: ignore[attr-defined]
            record_quality(folder, name, estimate(**{"label 1": 0.9 + n / 100, "label 2": 0.5}))
        return folder

    def test_what_was_expected_is_in_the_report(self, predictions: Path) -> None:
        (predictions / "quality.json").write_text("of another program")
        report = evaluate_files(predictions, predictions.parent / "references", LABELS)
        assert [x.expected for x in report.expectations] == [pytest.approx(v) for v in (0.92, 0.5, 0.71)]
        assert [x.found for x in report.expectations] == [pytest.approx(v) for v in (1.0, 2 / 3, 5 / 6)]

    def test_what_is_damaged_is_told_before_anything_is_measured(self, predictions: Path) -> None:
        quality_file(predictions, "y").write_text("cut sh")
        measured: list[int] = []
        with pytest.raises(RunError, match=r"y\.quality\.json: no quality estimate"):
            evaluate_files(
                predictions,
                predictions.parent / "references",
                LABELS,
                progress=lambda done, total: measured.append(done),
            )
        assert measured == []


def case(name: str, *dices: float | None, patient: str | None = None) -> CaseScores:
    labels = tuple(
        LabelScore(
            label=label,
            status="missed" if dice == 0 else "scored",
            dice=dice,
            prediction_mm3=float(dice != 0),
            reference_mm3=1.0,
        )
        for label, dice in zip("ab", dices, strict=False)
    )
    return CaseScores(case_id=name, patient_id=patient or name, labels=labels)


def report(expected: list[float | None], found: list[float | None]) -> Report:
    cases = [case(f"c{n:02}", dice) for n, dice in enumerate(found)]
    return with_expected(
        summarise(cases, settings=SETTINGS), {f"c{n:02}": estimate(a=v) for n, v in enumerate(expected)}
    )


class TestExpectation:
    def test_figures_are_those_of_scipy(self) -> None:
        generator = np.random.default_rng(1)
        expected = generator.uniform(size=30).round(1)
        found = (expected / 2 + generator.uniform(0, 0.4, size=30)).round(2)
        of_label, of_case = report(expected.tolist(), found.tolist()).expectations
        assert of_label.spearman == pytest.approx(spearmanr(expected, found).statistic)
        assert of_label.pearson == pytest.approx(pearsonr(expected, found).statistic)
        assert (of_label.expected, of_label.found) == (pytest.approx(expected.mean()), pytest.approx(found.mean()))
        assert of_label.interval_95 is not None
        assert of_label.interval_95[0] < of_label.spearman < of_label.interval_95[1]
        assert of_case.model_copy(update={"label": "a"}) == of_label

    def test_ranks_of_equals_are_shared(self) -> None:
        assert ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
        assert correlation(np.full(3, 0.1), np.array([1.0, 2.0, 3.0])) is None

    def test_only_cases_with_both_count(self) -> None:
        found = report([0.1, 0.2, 0.3, None, 0.9, 0.5], [0.2, 0.3, 0.4, 0.1, None, 0.5]).expectations[0]
        assert (found.n, found.spearman) == (4, pytest.approx(1.0))

    def test_a_case_is_the_mean_of_what_it_has(self) -> None:
        cases = [case(name, *dices) for name, *dices in (("x", 0.2, 0.4), ("y", 0.6, None), ("z", 0.9, 0.9))]
        estimates = {"x": estimate(a=0.5, b=None), "y": estimate(a=0.6, b=0.8), "z": estimate(a=0.8, b=0.8)}
        whole = with_expected(summarise(cases, settings=SETTINGS), estimates).expectations[-1]
        assert (whole.label, whole.n, whole.not_found) == ("mean of labels", 3, 0)
        # Both means are over the labels that have both: of x that is a, and of y too.
        assert whole.expected == pytest.approx((0.5 + 0.6 + 0.8) / 3)
        assert whole.found == pytest.approx((0.2 + 0.6 + 0.9) / 3)

    def test_what_was_missed_is_told_apart(self) -> None:
        """Of a label that was not found nothing is expected: it may not lower the one mean and not the other."""
        dices = [0.5, 0.6, 0.7, 0.8, 0.9]
        cases = [case(f"c{n}", dice, dice) for n, dice in enumerate(dices)]
        cases[3] = case("c3", 0.8, 0.0)
        cases[4] = case("c4", 0.0, 0.0)
        estimates = {f"c{n}": estimate(a=dice, b=dice) for n, dice in enumerate(dices)}
        estimates |= {"c3": estimate(a=0.8, b=None), "c4": estimate(a=None, b=None)}
        a, b, whole = with_expected(summarise(cases, settings=SETTINGS), estimates).expectations
        assert [(x.n, x.not_found) for x in (a, b, whole)] == [(4, 1), (3, 2), (4, 2)]
        assert whole.expected == whole.found == pytest.approx((0.5 + 0.6 + 0.7 + 0.8) / 4)
        assert whole.spearman == pytest.approx(1.0)
        assert "of 2 cases a label was not found" in (sentence_of([whole]) or "")

    def test_a_report_keeps_it(self) -> None:
        found = report([0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.1, 0.6])
        assert Report.from_json(found.to_json()) == found
        # Folds that are put together are looked at together.
        assert summarise(found.cases, settings=SETTINGS).expectations == found.expectations
        assert [t.title for t in tables(found)].count("Dice that the model expected by its own probabilities") == 1

    def test_without_expectations_nothing_is_said(self) -> None:
        found = with_expected(summarise([case("x", 0.2)], settings=SETTINGS), {})
        assert (found.expectations, sentence_of(found.expectations)) == ((), None)
        assert expectations_of(found.cases, SETTINGS) == ()

    def test_the_sentence_is_honest(self) -> None:
        rising = [n / 20 for n in range(20)]
        of_case = report(list(rising), list(rising)).expectations[-1]
        for rho, interval, words in (
            (0.8, (0.6, 0.9), "the expected Dice tells bad cases from good ones (rank correlation 0.80, 20 cases"),
            (0.4, (0.1, 0.6), "tells bad cases from good ones only in part"),
            (0.4, (-0.1, 0.6), "it is not shown that the expected Dice tells"),
            (0.9, None, "it is not shown that the expected Dice tells"),
        ):
            found = of_case.model_copy(update={"spearman": rho, "interval_95": interval})
            assert words in (sentence_of([found]) or "")
        # Of two cases nothing can be said, nor where all are the same.
        for expected, dices in (([0.1, 0.2], [0.1, 0.2]), ([0.5] * 8, rising[:8])):
            assert "cannot be told" in (sentence_of(report(list(expected), list(dices)).expectations) or "")
