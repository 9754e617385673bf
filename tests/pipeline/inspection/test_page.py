"""The page of an inspection: whole, self-contained, escaped; bars as long as what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.inspection.contributions import Change, Contributions
from pipeline.inspection.figures import LevelFigures
from pipeline.inspection.page import write_page
from pipeline.inspection.receptive import ReceptiveField
from pipeline.inspection.result import Inspection
from pipeline.inspection.words import words_of
from pipeline.report_page.charts import Bar, bar_chart
from tests.pipeline.html_tags import Tags

CHANGED = {Change("zeroed", 1): ({"left <b>lung</b>": 0.6},), Change("cut", 1): ({"left <b>lung</b>": 0.91},)}
SIGHT = ReceptiveField(
    (9, 9, 9), (9.0, 9.0, 18.0), (32.0, 32.0, 16.0), 6.5, (6.0, 6.0, 3.0), 8, {"left <b>lung</b>": 40.0}
)


def found(*, contributions: bool = True, sight: ReceptiveField = SIGHT) -> Inspection:
    figures = tuple(
        LevelFigures(name, kind, number, 8, (4, 4, 4), dead, 0.5, 0.7, 3.25, 0.0, 64)  # type: ignore[arg-type]
        for name, kind, number, dead in (
            ("encoder 1", "encoder", 1, 0.25),
            ("bottleneck 2", "bottleneck", 2, 0.0),
            ("skip 1", "skip", 1, 0.25),
        )
    )
    parts = Contributions("reference", ("left <b>lung</b>",), ({"left <b>lung</b>": 0.9},), CHANGED)
    return Inspection("fold 0 & more", ("case <i>1</i>",), (8, 8), figures, parts if contributions else None, sight)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{name}.png" for name in ("overview", "attention_gates", "encoder_1")]
    for number, file in enumerate(files):
        file.write_bytes(b"\x89PNG" + bytes([number]))
    return files


def written(inspection: Inspection, pictures: list[Path]) -> str:
    target = pictures[0].with_name("inspection.html")
    write_page(target, inspection, words_of(inspection), pictures, facts={"command": "volseg inspect <bundle>"})
    return target.read_text(encoding="utf-8")


def test_it_is_whole_and_needs_nothing_else(pictures: list[Path]) -> None:
    text = written(found(), pictures)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in tags.references)
    assert sum(reference.startswith("data:") for reference in tags.references) == 3
    links = {reference[1:] for reference in tags.references if reference.startswith("#")}
    assert links == set(re.findall(r'section id="(\w+)"', text))
    assert "http" not in text


def test_names_are_letters_and_no_markup(pictures: list[Path]) -> None:
    text = written(found(), pictures)
    assert "fold 0 &amp; more" in text
    assert "case &lt;i&gt;1&lt;/i&gt;" in text
    assert "left &lt;b&gt;lung&lt;/b&gt;" in text
    assert "<b>lung" not in text


def test_words_come_first_and_every_figure_is_there(pictures: list[Path]) -> None:
    text = written(found(), pictures)
    order = re.findall(r'section id="(\w+)"', text)
    assert order == ["words", "flow", "parts", "levels", "sight", "attention", "channels", "facts"]
    for sentence in words_of(found()):
        assert sentence.text.replace("<b>", "&lt;b&gt;").replace("</b>", "&lt;/b&gt;") in text
    assert "<span>dead channels</span><b>2</b><span>of 16</span>" in text  # the skip's are the encoder's
    assert "skip 1 zeroed: Dice 0.6000 (-0.3000)" in text
    assert "only level 1: Dice 0.9100 (+0.0100)" in text


def test_what_was_not_found_is_left_out(pictures: list[Path]) -> None:
    text = written(
        found(contributions=False, sight=ReceptiveField(None, None, (8.0, 8.0, 8.0), None, None, 0)), pictures[2:]
    )
    assert re.findall(r'section id="(\w+)"', text) == ["words", "levels", "sight", "channels", "facts"]
    assert "Dice" not in re.sub(r"<style>.*?</style>", "", text)


def test_bars_are_as_long_as_their_values() -> None:
    chart = bar_chart([Bar("a", 2.0, "a: 2"), Bar("b", 1.0, "b"), Bar("c", -0.5, "c", 1)], x_label="mm")
    bars = [
        (float(x), float(width))
        for x, width in re.findall(r'<rect class="c\d" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', chart)
    ]
    (a, a_width), (b, b_width), (c, c_width) = bars
    assert a_width / b_width == pytest.approx(2.0, rel=1e-2)
    assert c_width / b_width == pytest.approx(0.5, rel=1e-2)
    assert a == b == pytest.approx(c + c_width, abs=0.2)
    assert "<title>a: 2</title>" in chart


def test_a_chart_of_nothing_but_zeros_can_be_drawn() -> None:
    assert "<rect" in bar_chart([Bar("a", 0.0, "a")], x_label="Dice")
