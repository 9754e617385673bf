"""What a run folder knows beside its scores: plan and reasons, folds, curves, versions, what was set aside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.history import read_history
from pipeline.report_page.charts import Line

MOST_POINTS = 400
"""Points of a curve that are drawn; more are averaged in groups."""


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class RunFacts:
    """Of a run folder, for its page. Empty where a run does not have it."""

    name: str
    command: str = ""
    plan: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    dataset: Mapping[str, Any] | None = None
    losses: tuple[Line, ...] = ()
    dices: tuple[Line, ...] = ()
    set_aside: tuple[tuple[str, str], ...] = ()


def read_run_facts(folder: Path, *, command: str = "") -> RunFacts:
    """Everything that a run folder, or one fold's folder in it, tells; what is not there is left out."""
    is_fold = folder.name.startswith("fold_")
    run, folds = (folder.parent, [folder]) if is_fold else (folder, sorted(folder.glob("fold_*")))
    histories = {fold.name.replace("_", " "): read_history(fold / "history.jsonl") for fold in folds}
    aside = [run / "set_aside.json", *(fold / "set_aside_predictions.json" for fold in folds)]
    return RunFacts(
        name=f"{run.name}, {folder.name.replace('_', ' ')}" if is_fold else run.name,
        command=command,
        plan=_read(run / "plan.json"),
        certificate=(_read(run / "folds.json") or {}).get("certificate"),
        provenance=_read(run / "provenance.json"),
        dataset=_read(run / "dataset.json"),
        losses=_lines(histories, "loss"),
        dices=tuple(part for line in _lines(histories, "dice/mean") for part in _without_last(line)),
        set_aside=tuple(row for path in aside for row in _set_aside(path)),
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _set_aside(path: Path) -> list[tuple[str, str]]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    rows = rows if isinstance(rows, list) else rows.get("failures", [])
    return [(str(row.get("case_id", "")), str(row.get("reason", ""))) for row in rows if isinstance(row, dict)]


def _lines(histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> tuple[Line, ...]:
    lines = []
    for group, (name, rows) in enumerate(histories.items()):
        points = [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
        if points:
            lines.append(Line(name, tuple(_thinned(points)), group))
    return tuple(lines)


def _without_last(line: Line) -> list[Line]:
    """The validations of a few cases as a curve, the last one, of all cases, as a point of its own."""
    early, last = line.points[:-1], line.points[-1:]
    parts = [Line(f"{line.name}, a few cases", early, line.group)] if early else []
    return [*parts, Line(f"{line.name}, all held-out cases", last, line.group)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of groups of neighbours, as many groups as are drawn at most."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
