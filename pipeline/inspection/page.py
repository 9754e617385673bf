"""One HTML page of an inspection: in words first, then in figures and pictures. One file, no network needed."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pipeline.files import write_text
from pipeline.inspection.contributions import Contributions
from pipeline.inspection.receptive import ReceptiveField
from pipeline.inspection.result import Inspection, level_rows
from pipeline.inspection.words import Sentence
from pipeline.report_page.charts import Bar, bar_chart
from pipeline.report_page.document import document
from pipeline.report_page.sections import table

GROUPS = {"zeroed": 0, "mean": 5, "cut": 1}
"""Colours of the page's style sheet, for what was done to the network."""

MOST_LABELS = 12
"""Whose lengths are drawn beside what the network sees."""

MEANINGS = (
    "Energy is the root mean square of a level's activations; silent are those at or below zero; the rank, an "
    "effective one, says how many directions its channels use (Roy and Vetterli 2007); a dead channel never rises "
    "above zero; one repeats that correlates with an earlier one by 0.95 or more."
)


def write_page(
    target: Path,
    found: Inspection,
    words: Sequence[Sentence],
    pictures: Sequence[Path],
    *,
    facts: Mapping[str, str],
) -> None:
    """Write the page of what was found; `pictures` as `write_pictures` gives them, `facts` say what was inspected how.

    Raises:
        RunError: the file cannot be written.
    """
    write_text(target, page(found, words, {path.stem: path.read_bytes() for path in pictures}, facts))


def page(found: Inspection, words: Sequence[Sentence], pictures: Mapping[str, bytes], facts: Mapping[str, str]) -> str:
    """The HTML text; the same for the same values. `pictures` are PNGs by name."""
    overview = {name: png for name, png in pictures.items() if name == "overview"}
    attention = {name: png for name, png in pictures.items() if name.startswith("attention")}
    sheets = {name: png for name, png in pictures.items() if name not in overview | attention}
    sections = [
        ("words", "In words", _words(words)),
        ("flow", "What flows through the network", _figures(overview)),
        ("parts", "What each part brings", _contributions(found.contributions)),
        ("levels", "Figures of every level", _levels(found)),
        ("sight", "How far it sees", _sight(found.receptive)),
        ("attention", "Attention", _figures(attention)),
        ("channels", "Channels of every level", _figures(sheets)),
        ("facts", "What was inspected", table([{"what": k, "value": v} for k, v in facts.items()], text=True)),
    ]
    heading = f"Inside {found.model}"
    return document(heading, heading, _lead(found), tiles=_tiles(found), sections=sections)


def _lead(found: Inspection) -> str:
    cases = f"case {found.cases[0]}" if len(found.cases) == 1 else f"{len(found.cases)} cases"
    return f"What flows through a network of {found.depth} levels, what its parts bring, how far it sees: {cases}"


def _tiles(found: Inspection) -> str:
    rows: list[tuple[str, str, str]] = []
    if found.contributions is not None and not math.isnan(found.contributions.dice):
        against = "as it is" if found.contributions.against == "reference" else "with itself: no reference"
        rows.append(("Dice", f"{found.contributions.dice:.3f}", against))
    channels = sum(level.channels for level in found.figures if level.kind != "skip")
    dead = sum(level.dead for level in found.figures if level.kind != "skip")
    rows.append(("dead channels", str(dead), f"of {channels}"))
    bottom = next((level for level in found.figures if level.kind == "bottleneck"), None)
    if bottom is not None:
        rows.append(("effective rank, bottleneck", f"{bottom.effective_rank:.1f}", f"of {bottom.channels} channels"))
    if found.receptive.radius_mm is not None:
        rows.append(("radius it really uses", f"{found.receptive.radius_mm:.1f} mm", "95 % of the gradient"))
    body = "".join(
        f'<div class="tile"><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for what, value, note in rows
    )
    return f'<div class="tiles">{body}</div>'


def _words(words: Sequence[Sentence]) -> str:
    items = "".join(f"<li>{escape(sentence.text)}</li>" for sentence in words)
    return f'<ul class="words">{items}</ul>' if items else ""


def _contributions(found: Contributions | None) -> str:
    """A bar a change: how much is lost by it, of the cases' mean Dice."""
    if found is None:
        return ""
    score = "Dice" if found.against == "reference" else "Agreement with the untouched result"
    bars = []
    for change in found.changed:
        fall, left = found.falls(change), found.dice_with(change)
        if math.isnan(fall):
            continue
        most = found.most_changed(change)
        worst = "" if most is None else f"; most changed: {most[0]}, by {-most[1]:+.4f}"
        bars.append(
            Bar(change.name, fall, f"{change.name}: {score} {left:.4f} ({-fall:+.4f}){worst}", GROUPS[change.how])
        )
    if not bars:
        return ""
    keys = "".join(
        f'<span class="key"><i class="k{GROUPS[how]}"></i>{text}</span>'
        for how, text in (
            ("zeroed", "a skip that gives nothing"),
            ("mean", "a skip by its mean: only its detail is lost"),
            ("cut", "levels below by their means"),
        )
        if any(change.how == how for change in found.changed)
    )
    chart = bar_chart(bars, x_label=f"{score} that is lost (of {found.dice:.3f})")
    note = "Nothing is trained again: a part whose loss costs nothing here brings nothing to this network."
    return f'<p>{keys}</p>{chart}<p class="soft">{note} Rest on a bar to see its figures.</p>'


def _levels(found: Inspection) -> str:
    return f'{table(level_rows(found))}<p class="soft">{MEANINGS}</p>'


def _sight(sight: ReceptiveField) -> str:
    """What the network sees, along the shortest axis, beside the longest side of each object."""
    bars = [Bar("a patch", min(sight.patch_mm), f"a patch: {_mm(sight.patch_mm)} mm", 6)]
    if sight.deepest_mm is not None:
        bars.append(
            Bar("the deepest level", min(sight.deepest_mm), f"the deepest level: {_mm(sight.deepest_mm)} mm", 6)
        )
    if sight.radius_mm is not None:
        told = f"95 % of the gradient lies within {sight.radius_mm:.1f} mm of a voxel"
        bars.append(Bar("95 % of its answer", 2 * sight.radius_mm, told, 0))
    longest = sorted(sight.extents_mm.items(), key=lambda item: -item[1])[:MOST_LABELS]
    bars += [Bar(name, mm, f"{name}: longest side {mm:.1f} mm", 2) for name, mm in longest]
    keys = (
        '<span class="key"><i class="k6"></i>what it can see</span>'
        '<span class="key"><i class="k0"></i>what its answers really depend on</span>'
        '<span class="key"><i class="k2"></i>the object</span>'
    )
    note = (
        "Of a patch and a level, the shortest of three axes; of an object, the longest side of its largest piece; of "
        "an answer, the width of the ball around it that holds 95 % of its gradient's energy (Luo et al. 2016)."
    )
    return f'<p>{keys}</p>{bar_chart(bars, x_label="mm")}<p class="soft">{note}</p>'


def _figures(pictures: Mapping[str, bytes]) -> str:
    return "".join(
        f'<figure class="picture"><img alt="{escape(_caption(name))}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}"></figure>'
        for name, png in pictures.items()
    )


def _caption(name: str) -> str:
    """For those who cannot see it: the picture's own title."""
    return name.replace("_", " ").capitalize()


def _mm(sides_mm: Sequence[float]) -> str:
    return " x ".join(f"{mm:.1f}" for mm in sides_mm)
