"""Every figure summed up over cases, folds and patients, and the tables that show it: worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.cli_console import show_table
from pipeline.cli_evaluate import Wishes, settings_of
from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError, RunError
from pipeline.report_tables import tables
from pipeline.report_values import CaseScores, LabelScore, Report
from pipeline.summary import summarise

SETTINGS = EvaluateConfig(bootstrap_samples=300, seed=3)


def score(label: str, dice: float | None, **figures: Any) -> LabelScore:
    status = "absent" if dice is None else "scored"
    return LabelScore(label=label, status=status, dice=dice, prediction_mm3=1500.0, reference_mm3=1000.0, **figures)


def case(name: str, *scores: LabelScore, patient: str | None = None, fold: int | None = None) -> CaseScores:
    return CaseScores(case_id=name, patient_id=patient or name, fold=fold, labels=scores)


def with_distances(values: list[float | None], *, fold_count: int = 0) -> Report:
    cases = [
        case(
            f"c{i}",
            score(
                "liver",
                0.9,
                surface_dice=None if v is None else 1 - v / 10,
                hausdorff_95_mm=v,
                volume_difference_mm3=v,
            ),
            fold=i % fold_count if fold_count else None,
        )
        for i, v in enumerate(values)
    ]
    return summarise(cases, settings=SETTINGS)


class TestFigures:
    def test_by_hand(self) -> None:
        report = with_distances([1.0, 4.0, None, 2.0, -5.0], fold_count=2)
        [liver] = report.labels
        distance, share = liver.figure("hausdorff_95_mm"), liver.figure("surface_dice")
        assert distance is not None
        assert share is not None
        assert (distance.n, distance.mean, distance.median) == (4, 0.5, 1.5)
        assert (distance.minimum, distance.maximum) == (-5, 4)
        assert [w.case_id for w in distance.worst] == ["c1", "c3", "c0", "c4"]
        assert [w.case_id for w in share.worst] == ["c1", "c3", "c0", "c4"]
        assert [(f.fold, f.mean) for f in distance.folds] == [(0, -2.0), (1, 3.0)]
        assert liver.figure("hausdorff_mm") is None

    def test_a_difference_is_worst_farthest_from_0(self) -> None:
        figure = with_distances([1.0, 4.0, 2.0, -5.0]).labels[0].figure("volume_difference_mm3")
        assert figure is not None
        assert [(w.case_id, w.value) for w in figure.worst] == [("c3", -5.0), ("c1", 4.0), ("c2", 2.0), ("c0", 1.0)]

    def test_all_share_the_draws_of_patients(self) -> None:
        """A figure that is a line of another has the same line of its interval."""
        [liver] = with_distances([1.0, 4.0, 3.0, 2.0, 6.0]).labels
        distance, share = liver.figure("hausdorff_95_mm"), liver.figure("surface_dice")
        assert distance is not None
        assert share is not None
        low, high = distance.interval_95 or (0.0, 0.0)
        assert share.interval_95 == pytest.approx((1 - high / 10, 1 - low / 10))

    def test_the_mean_over_labels(self) -> None:
        cases = [
            case(n, score("a", 0.5, surface_dice=0.4), score("b", 0.5, surface_dice=x))
            for n, x in (("x", 0.8), ("y", None))
        ]
        overall = summarise(cases, settings=SETTINGS).overall
        assert {f.name: f.mean for f in overall.figures} == {"surface_dice": pytest.approx(0.6)}

    def test_a_signed_difference_has_no_mean_over_labels(self) -> None:
        names = [figure.name for figure in with_distances([1.0, 2.0]).overall.figures]
        assert names == ["surface_dice", "hausdorff_95_mm"]

    def test_json_there_and_back_and_from_before(self) -> None:
        report = with_distances([1.0, None, 3.0])
        value = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert Report.from_json(value) == report
        del value["overall"]["figures"], value["labels"][0]["figures"]
        for row in value["cases"]:
            row["labels"] = [
                {k: row["labels"][0][k] for k in ("label", "status", "dice", "prediction_mm3", "reference_mm3")}
            ]
        assert Report.from_json(value).labels[0].figures == ()


class TestLesions:
    def report(self, counts: list[int], **settings: Any) -> Report:
        cases = [
            case(f"c{i}", score("liver", 0.5, lesions_expected=n, lesion_f1=0.5, lesion_dice=0.25))
            for i, n in enumerate(counts)
        ]
        return summarise(cases, settings=EvaluateConfig(bootstrap_samples=100, **settings))

    @pytest.mark.parametrize(("counts", "is_counted"), [([1, 1, 3], False), ([1, 3], True), ([0, 0, 2], True)])
    def test_are_summed_up_where_half_of_the_cases_have_several(self, counts: list[int], is_counted: bool) -> None:
        """A case without any says nothing of how many a label has."""
        assert (self.report(counts).labels[0].figure("lesion_f1") is not None) == is_counted

    def test_are_summed_up_where_asked(self) -> None:
        figure = self.report([1, 1], lesions=("liver",)).labels[0].figure("lesion_dice")
        assert figure is not None
        assert figure.mean == 0.25


class TestTables:
    def test_of_a_full_report(self, capsys: pytest.CaptureFixture[str]) -> None:
        """No line is longer than a terminal of 80 columns."""
        figures = {
            "surface_dice": 0.987,
            "hausdorff_95_mm": 12.34,
            "hausdorff_mm": 123.4,
            "average_distance_mm": 1.234,
            "volume_difference_mm3": 500.0,
            "sensitivity": 0.9,
            "precision": 0.8,
            "lesions_predicted": 3,
            "lesions_expected": 2,
            "lesions_matched": 2,
            "lesion_f1": 0.8,
            "lesion_dice": 0.5,
        }
        cases = [case(f"case_{i:03}", score("Parotid-Lt", 0.9, **figures), fold=i % 5) for i in range(10)]
        report = summarise([*cases, case("case_x", score("Parotid-Lt", None))], settings=SETTINGS)
        found = tables(report)
        assert [table.title.split(",")[0] for table in found] == [
            "Dice",
            "Surfaces",
            "Volumes",
            "Lesions",
            "Mean Dice of each fold",
            "Cases",
        ]
        lesions = found[3].rows[0]
        assert (lesions["lesions"], lesions["found"], lesions["false"]) == (20, 20, 10)
        volumes = found[2].rows[0]
        assert (volumes["reference ml"], volumes["too much ml"]) == (1.0, 0.5)
        for table in found:
            show_table(table.title, table.rows)
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line.rstrip()) for line in lines) <= 80

    def test_what_is_not_there_takes_no_room(self) -> None:
        report = summarise([case("a", score("liver", 0.9)), case("b", score("liver", 0.8))], settings=SETTINGS)
        [dice] = tables(report)
        liver, overall = dice.rows
        assert (liver["cases"], liver["mean"], liver["worst case"]) == (2, pytest.approx(0.85), "0.800 b")
        assert liver["95 %"] == "0.800–0.900"
        assert (overall["label"], overall["mean"]) == ("mean of labels", pytest.approx(0.85))

    def test_what_was_not_scored(self) -> None:
        missed = score("liver", 0.0).model_copy(update={"status": "missed"})
        report = summarise([case("a", score("liver", 0.9)), case("b", missed)], settings=SETTINGS)
        assert tables(report)[-1].rows == ({"label": "liver", "on both sides": 1, "missed": 1},)

    def test_tolerances_are_told(self) -> None:
        settings = EvaluateConfig(bootstrap_samples=100, tolerances_mm={"liver": 1.5, "spleen": 2.0})
        report = summarise([case("a", score("liver", 0.9, surface_dice=0.5))], settings=settings)
        assert tables(report)[1].title == "Surfaces, means over cases; tolerance 2 mm, liver 1.5 mm"


class TestReportValue:
    report = summarise(
        [
            case("a", score("Anterior", 0.25), score("Posterior", None), fold=0),
            case("b", score("Anterior", 0.75), score("Posterior", 0.5), fold=1),
        ],
        settings=SETTINGS,
    )

    def test_json_there_and_back(self) -> None:
        text = json.dumps(self.report.to_json(), allow_nan=False)
        assert Report.from_json(json.loads(text)) == self.report

    def test_nan_cannot_enter(self) -> None:
        with pytest.raises(ValueError, match="finite"):
            score("Anterior", float("nan"))

    @pytest.mark.parametrize("value", [{}, [], {"format": "volseg-report-0"}])
    def test_what_is_no_report_is_refused(self, value: Any) -> None:
        with pytest.raises(RunError, match="not an evaluation report: "):
            Report.from_json(value)

    def test_csv(self) -> None:
        names = "volume_difference_mm3,sensitivity,precision,tolerance_mm,surface_dice,hausdorff_95_mm,hausdorff_mm"
        lesions = "lesions_predicted,lesions_expected,lesions_matched,lesion_f1,lesion_dice,expected_dice"
        assert self.report.to_csv().splitlines() == [
            "case_id,patient_id,fold,label,status,dice,prediction_mm3,reference_mm3,"
            f"{names},average_distance_mm,{lesions}",
            "a,a,0,Anterior,scored,0.25,1500.0,1000.0" + 14 * ",",
            "a,a,0,Posterior,absent,,1500.0,1000.0" + 14 * ",",
            "b,b,1,Anterior,scored,0.75,1500.0,1000.0" + 14 * ",",
            "b,b,1,Posterior,scored,0.5,1500.0,1000.0" + 14 * ",",
        ]


class TestWishes:
    def test_tolerances(self) -> None:
        settings = settings_of(Wishes(tolerances=("3", "Left=Lung=1.5"), lesions=("tumour",)))
        assert (settings.tolerance_mm, settings.tolerances_mm) == (3.0, {"Left=Lung": 1.5})
        assert settings.lesions == ("tumour",)
        assert settings_of(Wishes()) == EvaluateConfig()

    @pytest.mark.parametrize("text", ["liver", "liver=", "liver=-1", "nan", "inf", "liver=2mm"])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(ConfigError, match=f"--tolerance {text}: expected millimetres"):
            settings_of(Wishes(tolerances=(text,)))


def test_a_thousand_cases_are_summed_up_at_once() -> None:
    """Every figure of ten labels: one matrix product."""
    generator = np.random.default_rng(0)
    cases = [
        case(f"{i}", *(score(f"l{k}", float(generator.random()), hausdorff_mm=float(i)) for k in range(10)))
        for i in range(1000)
    ]
    assert summarise(cases, settings=EvaluateConfig()).overall.n_cases == 1000
