"""What an evaluation found, as tables that fit a terminal of 80 columns: what is not there takes no room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report_values import FigureSummary, Interval, LabelSummary, OverallFigure, Report

Cell = str | int | float | None
Row = dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """Rows that share their keys, which are the names of the columns."""

    title: str
    rows: tuple[Row, ...]


def tables(report: Report) -> list[Table]:
    """Dice, surfaces, volumes, lesions where they are counted, folds where there are any, and what was not scored."""
    found = [
        Table("Dice", _dice_rows(report)),
        Table(f"Surfaces, means over cases; {_tolerances(report)}", _surface_rows(report)),
        Table("Volumes, means over cases", _volume_rows(report)),
        Table("Lesions", _lesion_rows(report)),
        Table("Mean Dice of each fold", _fold_rows(report)),
        Table("Dice that the model expected by its own probabilities", _expectation_rows(report)),
        Table("Cases", _count_rows(report)),
    ]
    return [table for table in found if table.rows]


def _dice_rows(report: Report) -> tuple[Row, ...]:
    rows = [
        {
            "label": summary.label,
            "cases": summary.n_scored,
            "mean": summary.mean,
            "95 %": _range(summary.interval_95),
            "median": summary.median,
            "quartiles": _range(_quartiles(summary)),
            "worst case": _worst(summary),
        }
        for summary in report.summaries
    ]
    overall = report.overall
    worst = f"{overall.worst[0].dice:.3f} {overall.worst[0].case_id}" if overall.worst else None
    last: Row = {"label": report.headline, "cases": overall.n_cases, "mean": overall.mean}
    last |= {"95 %": _range(overall.interval_95), "worst case": worst}
    return (*rows, {column: last.get(column) for column in rows[0]})


def _surface_rows(report: Report) -> tuple[Row, ...]:
    """Empty for a report from before there were such figures."""
    rows = [_surface_row(summary.label, summary.figures) for summary in report.summaries]
    if all(row["surface Dice"] is None for row in rows):
        return ()
    return (*rows, _surface_row(report.headline, report.overall.figures))


def _surface_row(label: str, figures: Sequence[FigureSummary] | Sequence[OverallFigure]) -> Row:
    found = {figure.name: figure for figure in figures}
    share = found.get("surface_dice")
    return {
        "label": label,
        "surface Dice": share.mean if share else None,
        "95 %": _range(share.interval_95) if share else None,
        **{
            column: found[name].mean if name in found else None
            for column, name in (
                ("HD95 mm", "hausdorff_95_mm"),
                ("HD mm", "hausdorff_mm"),
                ("ASSD mm", "average_distance_mm"),
            )
        },
    }


def _volume_rows(report: Report) -> tuple[Row, ...]:
    rows = []
    for column, summary in enumerate(report.summaries):
        volumes = [case.scores[column].reference_mm3 for case in report.cases if case.scores[column].reference_mm3]
        difference = summary.figure("volume_difference_mm3")
        if difference is None:
            continue
        row: Row = {
            "label": summary.label,
            "reference ml": sum(v for v in volumes if v) / len(volumes) / 1000 if volumes else None,
            "too much ml": difference.mean / 1000 if difference.mean is not None else None,
            "95 %": _range(difference.interval_95, 1000),
        }
        for name in ("sensitivity", "precision"):
            figure = summary.figure(name)
            row[name] = figure.mean if figure else None
        rows.append(row)
    return tuple(rows)


def _lesion_rows(report: Report) -> tuple[Row, ...]:
    rows: list[Row] = []
    for column, summary in enumerate(report.summaries):
        share, quality = summary.figure("lesion_f1"), summary.figure("lesion_dice")
        if share is None or quality is None:
            continue
        scores = [case.scores[column] for case in report.cases]
        expected, predicted, matched = (
            sum(getattr(score, f"lesions_{which}") or 0 for score in scores)
            for which in ("expected", "predicted", "matched")
        )
        row: Row = {"label": summary.label, "lesions": expected, "found": matched, "false": predicted - matched}
        row |= {"mean F1": share.mean, "95 %": _range(share.interval_95), "mean lesion Dice": quality.mean}
        rows.append(row)
    return tuple(rows)


def _fold_rows(report: Report) -> tuple[Row, ...]:
    if len(report.overall.folds) < 2:
        return ()
    named = [*((summary.label, summary.folds) for summary in report.summaries), (report.headline, report.overall.folds)]
    return tuple({"label": label, **{f"fold {f.fold}": f.mean for f in folds}} for label, folds in named)


def _expectation_rows(report: Report) -> tuple[Row, ...]:
    return tuple(
        {
            "label": found.label,
            "cases": found.n,
            "expected": found.expected,
            "Dice": found.found,
            "Spearman": found.spearman,
            "95 %": _range(found.interval_95),
            "Pearson": found.pearson,
            "not found": found.not_found,
        }
        for found in report.expectations
    )


def _count_rows(report: Report) -> tuple[Row, ...]:
    """Empty where every label is on both sides in every case."""
    columns = ("missed", "false", "absent", "unannotated")
    rows = []
    for summary in report.summaries:
        counts = {column: getattr(summary, f"n_{column}") for column in columns}
        both = summary.n_scored - summary.n_missed - summary.n_false
        rows.append({"label": summary.label, "on both sides": both, **counts})
    used = [column for column in columns if any(row[column] for row in rows)]
    kept = ["label", "on both sides", *used]
    return tuple({column: row[column] for column in kept} for row in rows) if used else ()


def _tolerances(report: Report) -> str:
    own = {
        name: limit
        for name, limit in (report.settings.tolerances_mm or {}).items()
        if limit != report.settings.tolerance_mm
    }
    text = f"tolerance {report.settings.tolerance_mm:g} mm"
    return text + "".join(f", {name} {limit:g} mm" for name, limit in own.items())


def _quartiles(summary: LabelSummary) -> Interval | None:
    low, high = summary.first_quartile, summary.third_quartile
    return None if low is None or high is None else (low, high)


def _range(interval: Interval | None, unit: float = 1.0) -> str | None:
    if interval is None:
        return None
    low, high = (end / unit for end in interval)
    return f"{low:.3f} to {high:.3f}" if low < 0 else f"{low:.3f}–{high:.3f}"


def _worst(summary: LabelSummary) -> str | None:
    return f"{summary.worst[0].dice:.3f} {summary.worst[0].case_id}" if summary.worst else None
