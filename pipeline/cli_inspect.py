"""The subcommand `inspect`: how features flow through a trained network, in figures, pictures and words."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.inspection.contributions import Contributions
    from pipeline.inspection.receptive import ReceptiveField
    from pipeline.inspection.result import Inspection

LINE = 80

MOST_LABELS = 8
"""Whose lengths are told."""


def inspect_network(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A model bundle, or the folder of one fold.")],
    cases: Annotated[
        list[str], typer.Argument(metavar="CASE...", help="Images as for predict; with --manifest, ids of its cases.")
    ],
    labels: Annotated[Path | None, typer.Option("--labels", help="The reference of the only case.")] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Manifest that the cases and their references are in.")
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder that the manifest's paths start from.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for inspection.json, a page, and pictures of every level.")
    ] = None,
    series: Annotated[
        str | None, typer.Option("--series", help="Which series, where a DICOM folder holds several.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what parts contribute, which takes three passes a level.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the inspection that is in --out.")] = False,
) -> None:
    """Show how features flow through a network: which levels work, what skips bring, how far it sees."""
    from pipeline.cli_console import TerminalConsole
    from pipeline.inspection.reading import Asked
    from pipeline.inspection.run import inspect_cases, open_model

    asked = Asked(tuple(cases), labels, manifest, root, series)
    console = TerminalConsole()
    try:
        opened = open_model(model, device)
        found, files = inspect_cases(opened, asked, console=console, out=out, quick=quick, force=force)
    finally:
        console.close()
    _show(found)
    for file in files:
        print(file)


def _show(found: Inspection) -> None:
    from pipeline.cli_console import show_table
    from pipeline.inspection.result import level_rows
    from pipeline.inspection.words import words_of

    cases = found.cases[0] if len(found.cases) == 1 else f"{len(found.cases)} cases"
    show_table(f"{found.model}: what flows through its levels, {cases}", level_rows(found))
    if found.contributions is not None:
        score = "Dice" if found.contributions.against == "reference" else "agreement"
        show_table(f"{score} without parts, {cases}", _contribution_rows(found.contributions, score))
    show_table("how far it sees", _sight_rows(found.receptive))
    for sentence in words_of(found):
        print(textwrap.fill(sentence.text, LINE, initial_indent="- ", subsequent_indent="  "))


def _contribution_rows(found: Contributions, score: str) -> list[dict[str, Any]]:
    first = {"network": "as it is", score: found.dice, "change": "", "most changed": "", "by": ""}
    rows: list[dict[str, Any]] = [first]
    for change in found.changed:
        most = found.most_changed(change)
        rows.append(
            {
                "network": change.name,
                score: found.dice_with(change),
                "change": _signed(-found.falls(change)),
                "most changed": "" if most is None else most[0],
                "by": "" if most is None else _signed(-most[1]),
            }
        )
    return rows


def _sight_rows(sight: ReceptiveField) -> list[dict[str, Any]]:
    rows = [{"what": "a patch", "mm": _times(sight.patch_mm)}]
    if sight.deepest_mm is not None:
        rows.append({"what": "the deepest level can see", "mm": _times(sight.deepest_mm)})
    if sight.reach_mm is not None and sight.radius_mm is not None:
        rows.append({"what": "95 % of the gradient, to either side along each axis", "mm": _times(sight.reach_mm)})
        rows.append({"what": "95 % of the gradient, within a radius of", "mm": f"{sight.radius_mm:.1f}"})
    else:
        rows.append({"what": "95 % of the gradient", "mm": "not known: no gradient, or no memory"})
    longest = sorted(sight.extents_mm.items(), key=lambda item: -item[1])[:MOST_LABELS]
    return rows + [{"what": f"{name}, longest side", "mm": f"{mm:.1f}"} for name, mm in longest]


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}"


def _times(sides_mm: Sequence[float]) -> str:
    return " x ".join(f"{mm:.1f}" for mm in sides_mm)
