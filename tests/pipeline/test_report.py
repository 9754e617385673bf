"""The pictures: what they name, which colours they use, and that files are whole or not there."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from pipeline.config import EvaluateConfig
from pipeline.errors import RunError
from pipeline.report import dice_distribution, learning_curves
from pipeline.report_values import CaseScores, LabelScore, Report
from pipeline.summary import summarise

BLUE, VERMILION, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)

HISTORY: list[dict[str, float | None]] = [
    {
        "step": float(step),
        "epoch": step / 100,
        "loss": 2.0 - step / 200,
        "loss/dice": 1.0 - step / 200,
        "loss/cross_entropy": 1.0,
        "learning_rate": 0.003,
        "patches_per_s": 4.0,
    }
    for step in range(0, 200, 10)
] + [{"step": 100.0, "dice/mean": 0.7, "dice/Anterior": 0.8, "dice/Posterior": 0.6}, {"step": 200.0}]


def report(*, names: tuple[str, ...] = ("Anterior", "Posterior"), fold_count: int = 0) -> Report:
    """Twelve cases; the last label is absent everywhere."""
    cases = []
    for i in range(12):
        scores = [
            LabelScore(label=name, status="scored", dice=0.7 + i / 60, prediction_mm3=1.0, reference_mm3=1.0)
            for name in names[:-1]
        ]
        scores.append(LabelScore(label=names[-1], status="absent", dice=None, prediction_mm3=0.0, reference_mm3=0.0))
        fold = i % fold_count if fold_count else None
        cases.append(CaseScores(case_id=f"c{i}", patient_id=f"p{i}", fold=fold, labels=tuple(scores)))
    return summarise(cases, settings=EvaluateConfig(bootstrap_samples=100))


def words(svg: Path) -> set[str]:
    """The texts in an SVG: matplotlib draws letters as outlines and keeps each text in a comment."""
    return set(re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8")))


def has_colour(png: Path, colour: tuple[float, ...]) -> bool:
    """True when some pixels have nearly that colour."""
    pixels = matplotlib.image.imread(png)[..., :3] * 255
    return int((np.abs(pixels - colour).max(axis=-1) < 4).sum()) > 5


class TestLearningCurves:
    def test_names_what_the_history_has(self, tmp_path: Path) -> None:
        learning_curves(HISTORY, tmp_path / "curves.svg")
        found = words(tmp_path / "curves.svg")
        assert {"Training loss", "Validation Dice", "Learning rate", "step"} <= found
        assert {"total", "dice", "cross_entropy", "mean", "Anterior", "Posterior"} <= found
        assert not {"patches_per_s", "epoch"} & found

    def test_leaves_out_what_it_has_not(self, tmp_path: Path) -> None:
        learning_curves([{"step": 1, "loss": 1.0, "dice/mean": None}], tmp_path / "curves.svg")
        found = words(tmp_path / "curves.svg")
        assert "Training loss" in found
        assert not {"Validation Dice", "Learning rate"} & found

    def test_as_png(self, tmp_path: Path) -> None:
        learning_curves(HISTORY, tmp_path / "curves.png")
        assert has_colour(tmp_path / "curves.png", BLUE)
        assert has_colour(tmp_path / "curves.png", VERMILION)
        assert not has_colour(tmp_path / "curves.png", GREEN)

    def test_names_are_not_read_as_formulas_or_hidden(self, tmp_path: Path) -> None:
        names = ("_private", "left $\\frac{$", "right")
        learning_curves([{"step": 1, **{f"dice/{name}": 0.5 for name in names}}], tmp_path / "curves.svg")
        assert {"_private", "left $\\frac{$", "right"} <= words(tmp_path / "curves.svg")

    def test_many_labels_have_room(self, tmp_path: Path) -> None:
        """A legend that is too tall makes matplotlib warn, which is an error here."""
        learning_curves([{"step": 1, **{f"dice/{i}": 0.5 for i in range(60)}}], tmp_path / "curves.svg")
        assert {str(i) for i in range(60)} <= words(tmp_path / "curves.svg")

    def test_a_loss_that_is_not_finite_is_a_gap(self, tmp_path: Path) -> None:
        rows = [{"step": float(i), "loss": float("nan") if i == 3 else 1.0} for i in range(9)]
        learning_curves(rows, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 0

    @pytest.mark.parametrize("history", [[], [{"step": 1, "epoch": 0.1}]])
    def test_nothing_to_draw(self, tmp_path: Path, history: list[dict[str, float]]) -> None:
        with pytest.raises(RunError, match="holds no loss, Dice or learning rate yet"):
            learning_curves(history, tmp_path / "curves.png")
        assert list(tmp_path.iterdir()) == []


class TestDiceDistribution:
    def test_says_what_the_report_says(self, tmp_path: Path) -> None:
        value = report()
        dice_distribution(value, tmp_path / "dice.svg")
        low, high = value.labels[0].interval_95 or (0.0, 0.0)
        found = words(tmp_path / "dice.svg")
        assert {"Anterior", "Posterior", "mean of labels", "no case has it"} <= found
        assert "Dice of 12 cases (12 patients)" in found
        assert f"{value.labels[0].mean:.3f} [{low:.3f}, {high:.3f}]  n = 12" in found

    def test_folds_are_told_apart(self, tmp_path: Path) -> None:
        dice_distribution(report(fold_count=3), tmp_path / "dice.svg")
        assert {"fold 0", "fold 1", "fold 2"} <= words(tmp_path / "dice.svg")
        dice_distribution(report(fold_count=2), tmp_path / "two.png")
        assert has_colour(tmp_path / "two.png", BLUE)
        assert has_colour(tmp_path / "two.png", VERMILION)
        assert not has_colour(tmp_path / "two.png", GREEN)
        # The points are seen through, those of the legend are not.
        on_white = tuple(0.7 * value + 0.3 * 255 for value in VERMILION)
        assert has_colour(tmp_path / "two.png", on_white)
        dice_distribution(report(), tmp_path / "none.png")
        assert not has_colour(tmp_path / "none.png", VERMILION)

    def test_nothing_scored(self, tmp_path: Path) -> None:
        dice_distribution(report(names=("Never",)), tmp_path / "dice.svg")
        assert "no case has it" in words(tmp_path / "dice.svg")

    def test_the_same_report_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            dice_distribution(report(fold_count=3), tmp_path / name)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    def test_a_folder_that_cannot_be_written_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match=r"cannot write .*dice\.png: "):
            dice_distribution(report(), tmp_path / "file" / "dice.png")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
