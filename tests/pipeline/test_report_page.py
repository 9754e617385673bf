"""The page of a run: whole, self-contained, escaped, and drawn where the numbers are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.bad_cases import bad_cases
from pipeline.config import EvaluateConfig
from pipeline.report_page import Picture, RunFacts, read_run_facts, write_report_page
from pipeline.report_page.charts import Line, Point, Scale, Strip, line_chart, scatter_chart, strip_chart, ticks
from pipeline.report_values import CaseExplanation, CaseScores, LabelScore, Report
from pipeline.summary import summarise

from .html_tags import Tags


def report(count: int = 8, *, patient: str = "patient-of") -> Report:
    cases = [
        CaseScores(
            case_id=f"case_{n}",
            patient_id=f"{patient}-{n}",
            fold=n % 2,
            labels=tuple(
                LabelScore(
                    label=name,
                    status="scored",
                    dice=0.9 - 0.01 * n,
                    prediction_mm3=1000.0 + n,
                    reference_mm3=900.0 + 20 * n,
                    hausdorff_95_mm=1.0 + n,
                    surface_dice=0.95,
                )
                for name in ("left <b>kidney</b>", "right & liver")
            ),
        )
        for n in range(count)
    ]
    return summarise(cases, settings=EvaluateConfig(bootstrap_samples=200))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "my run"
    for fold in (0, 1):
        (run / f"fold_{fold}").mkdir(parents=True)
        rows = [{"step": 10 * n, "loss": 2.0 / n} for n in range(1, 900)]
        dices = [{"step": 4500, "dice/mean": 0.8}, {"step": 8990, "dice/mean": 0.85}]
        lines = "".join(json.dumps(row) + "\n" for row in [*rows, *dices])
        (run / f"fold_{fold}" / "history.jsonl").write_text(lines)
    plan = {"reasons": {"spacing_mm": "the median <of> cases"}, "spacing_mm": [1.0, 1.0, 2.5], "warnings": ["beware"]}
    (run / "plan.json").write_text(json.dumps(plan))
    folds = [{"fold": n, "patients": 4, "cases": 4} for n in (0, 1)]
    (run / "folds.json").write_text(json.dumps({"certificate": {"sound": True, "folds": folds}}))
    (run / "provenance.json").write_text(json.dumps({"volseg": "0.1.0", "git_commit": "abc"}))
    (run / "set_aside.json").write_text(json.dumps([{"case_id": "case_x", "reason": "no such file"}]))
    return run


def written(run: Path, found: Report, **more: object) -> str:
    target = run / "report.html"
    write_report_page(target, found, read_run_facts(run), **more)  # type: ignore[arg-type]
    return target.read_text(encoding="utf-8")


class TestPage:
    def test_it_is_whole_and_needs_no_network(self, run_folder: Path) -> None:
        text = written(run_folder, report(), pictures=[Picture("Worst: case_7", b"\x89PNG")])
        tags = Tags()
        tags.feed(text)
        assert tags.open == []
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in tags.references)
        assert "http" not in text
        for link in re.findall(r'href="#(\w+)"', text):
            assert f'<section id="{link}">' in text

    def test_names_are_text_and_patients_are_not_there(self, run_folder: Path) -> None:
        why = CaseExplanation(case_id="case_7", sentence="its axes <are> wrong")
        text = written(run_folder, report(patient="DOE^JOHN").model_copy(update={"explanations": (why,)}))
        assert "<b>kidney</b>" not in text
        assert "left &lt;b&gt;kidney&lt;/b&gt;" in text
        assert "its axes &lt;are&gt; wrong" in text
        assert "DOE" not in text

    def test_it_says_what_the_run_folder_knows(self, run_folder: Path) -> None:
        text = written(run_folder, report())
        for said in ("my run", "Cross-validation of 2 folds", "the median &lt;of&gt; cases", "1 x 1 x 2.5", "beware"):
            assert said in text
        for said in ("Sound: every case", "no such file", "abc", "fold 1, all held-out cases", "8</b>"):
            assert said in text

    def test_the_same_values_give_the_same_bytes(self, run_folder: Path) -> None:
        assert written(run_folder, report()) == written(run_folder, report())

    def test_a_bare_evaluation_has_a_page_without_the_parts_of_a_run(self, tmp_path: Path) -> None:
        write_report_page(tmp_path / "page.html", report(1), RunFacts("evaluation"))
        text = (tmp_path / "page.html").read_text()
        assert 'id="figures"' in text
        for part in ("curves", "plan", "pictures"):
            assert f'id="{part}"' not in text

    def test_a_long_curve_is_thinned_to_what_a_screen_shows(self, run_folder: Path) -> None:
        loss = read_run_facts(run_folder).losses[0]
        assert 200 < len(loss.points) <= 400
        assert loss.points[0] == pytest.approx(((10 + 20 + 30) / 3, (2.0 + 1.0 + 2 / 3) / 3))


class TestCharts:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            (0.83, 0.97, [0.85, 0.9, 0.95]),
            (-12.0, 30.0, [-10.0, 0.0, 10.0, 20.0, 30.0]),
            (3.0, 3.0, [3.0]),
        ],
    )
    def test_ticks_are_round_numbers(self, low: float, high: float, expected: list[float]) -> None:
        assert ticks(low, high) == pytest.approx(expected)

    def test_values_lie_between_the_ends_of_their_scale(self) -> None:
        scale = Scale(10.0, 20.0, 100.0, 300.0)
        assert [scale(v) for v in (10.0, 15.0, 20.0)] == [100.0, 200.0, 300.0]
        assert Scale(5.0, 5.0, 0.0, 10.0)(5.0) == 0.0

    def test_points_of_a_strip_lie_at_their_values(self) -> None:
        strip = Strip("a", (Point(0.5, 0, "here"),), (0.25, 0.5, 0.75), 0.5, (0.4, 0.6))
        drawn = strip_chart([strip], x_label="Dice", low=0.0, high=1.0, width=350)
        # 150 pixels for names, 16 on the right: 0.5 lies in the middle of what is left.
        assert 'cx="242.0"' in drawn
        assert '<rect class="box" x="196.0"' in drawn

    def test_more_is_higher(self) -> None:
        drawn = line_chart([Line("fold", ((0, 0.0), (1, 1.0)))], x_label="update", y_label="Dice")
        first, second = (float(y) for y in re.findall(r"[\d.]+,([\d.]+)", drawn.split('points="')[1].split('"')[0]))
        assert second < first

    def test_levels_are_drawn_and_named(self) -> None:
        points = [Point(1.0, -1.0, "a"), Point(2.0, 1.0, "b")]
        drawn = scatter_chart(points, x_label="x", y_label="y", levels=[(0.0, "mean")])
        assert drawn.count('class="level"') == 1
        assert ">mean</text>" in drawn


class TestBadCases:
    def test_outliers_and_cases_below_a_half_are_bad_worst_first(self) -> None:
        dices = [0.9, 0.91, 0.92, 0.9, 0.91] * 3 + [0.7, 0.3]
        cases = [CaseScores(case_id=f"c{n}", patient_id="p", labels=(_score(dice),)) for n, dice in enumerate(dices)]
        assert bad_cases(cases) == ("c16", "c15")
        assert bad_cases(cases[:15]) == ()
        assert bad_cases([]) == ()


def _score(dice: float) -> LabelScore:
    return LabelScore(label="a", status="scored", dice=dice, prediction_mm3=1.0, reference_mm3=1.0)
