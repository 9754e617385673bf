"""The parts of the page, each from values to HTML. An empty text is a part that has nothing to say."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.expectation import sentence_of
from pipeline.postprocessing_tables import honesty, postprocessing_tables
from pipeline.report_page.charts import COLOURS, Point, Strip, line_chart, scatter_chart, strip_chart
from pipeline.report_page.facts import Picture, RunFacts
from pipeline.report_tables import tables
from pipeline.report_values import CaseScores, FigureSummary, LabelScore, LabelSummary, Report

AGREEMENT = 1.96
"""Deviations of a difference between which 95 % of normally distributed ones lie (Bland and Altman 1986)."""

MOST_NAMES = 10
"""Cases that are named where there may be hundreds."""

FIGURE_NAMES = {
    "surface_dice": "surface Dice",
    "hausdorff_95_mm": "HD95 (mm)",
    "average_distance_mm": "average surface distance (mm)",
}


def tiles(report: Report) -> str:
    """The headline: what the run is worth, in a few numbers."""
    overall = report.overall
    rows = [(_number(overall.mean), f"Dice, {report.headline}", _interval(overall.interval_95))]
    for figure in overall.figures:
        if figure.name in FIGURE_NAMES and figure.mean is not None:
            rows.append((_number(figure.mean), FIGURE_NAMES[figure.name], _interval(figure.interval_95)))
    missed = sum(summary.n_missed for summary in report.summaries)
    false = sum(summary.n_false for summary in report.summaries)
    rows.append((str(overall.n_cases), "cases", f"of {overall.n_patients} patients"))
    rows.append((str(missed + false), "labels missed or invented", f"{missed} missed, {false} invented"))
    body = "".join(
        f'<div class="tile"><span>{escape(what)}</span><b>{value}</b><span>{escape(note)}</span></div>'
        for value, what, note in rows
    )
    return f'<div class="tiles">{body}</div>'


def figures(report: Report) -> str:
    """The tables that the terminal shows."""
    return "".join(f"<h3>{escape(t.title)}</h3>{table(t.rows)}" for t in tables(report))


def distributions(report: Report) -> str:
    """Every case of every label: Dice, and the distance that is looked at most."""
    parts = [_key_of_folds(report), _strips(report, "dice", "Dice", low=None, high=1.0)]
    parts.append(_strips(report, "hausdorff_95_mm", "95th percentile of surface distances (mm)", low=0.0, high=None))
    note = "A point is a case; the box holds the middle half, its line is the median; the diamond is the mean with its "
    return f'{"".join(parts)}<p class="soft">{note}95 % interval. Rest on a point to see which case it is.</p>'


def pictures(shown: Sequence[Picture]) -> str:
    """Overlays."""
    return "".join(
        f'<figure class="picture"><img alt="{escape(p.caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(p.png).decode()}"><figcaption>{escape(p.caption)}</figcaption></figure>'
        for p in shown
    )


def worst_cases(report: Report) -> str:
    """The cases to look at first, and what explains them where something does."""
    rows = [{"case": c.case_id, "mean Dice": c.dice} for c in report.overall.worst]
    body = table(rows)
    told = "".join(
        f'<p class="warning"><b>{escape(e.case_id)}</b>: {escape(e.sentence)}. Look at its header and its label table '
        "before the model.</p>"
        for e in report.explanations
    )
    return body + told


def volumes(report: Report) -> str:
    """Bland and Altman's plot of each label: the difference of volumes against their mean, in ml."""
    charts = []
    for column, summary in enumerate(report.summaries):
        points = [p for case in report.cases if (p := _volume_point(case, case.scores[column])) is not None]
        if len(points) > 1:
            charts.append(_agreement(summary.label, points))
    note = "Prediction minus reference against their mean; dashed: the mean difference and the limits of agreement "
    if not charts:
        return ""
    return f'<p class="soft">{note}(±{AGREEMENT} deviations).</p><div class="charts">{"".join(charts)}</div>'


def expectations(report: Report) -> str:
    """What the model expected of each label in each case, against what was found."""
    sentence = sentence_of(report.expectations)
    if sentence is None:
        return ""
    charts = []
    for column, summary in enumerate(report.summaries):
        points = [
            Point(
                s.expected_dice, s.dice, f"{case.case_id}: expected {s.expected_dice:.3f}, {s.dice:.3f}", _group(case)
            )
            for case, s in ((case, case.scores[column]) for case in report.cases)
            if s.expected_dice is not None and s.dice is not None
        ]
        if points:
            chart = scatter_chart(points, x_label="expected Dice", y_label="Dice", from_zero=False)
            charts.append(f"<figure>{chart}<figcaption>{escape(summary.label)}</figcaption></figure>")
    note = "Expected of each label in each case: 2 Σ p [decided] / (Σ p + decided voxels), from the model's own "
    note += "probabilities p. The sentence is of the mean over a case's labels; the axes begin where the points do."
    return f'<p>{_as_sentence(sentence)}</p><div class="charts">{"".join(charts)}</div><p class="soft">{note}</p>'


def mirroring(report: Report) -> str:
    """What mirrored passes are worth, where that was asked."""
    return "" if report.mirroring is None else f"<p>{_as_sentence(report.mirroring.sentence)}</p>"


def postprocessing(report: Report) -> str:
    """What was tried on finished label maps, what was chosen, and what it does."""
    found = report.postprocessing
    if found is None:
        return ""
    body = "".join(
        f"<h3>{escape(t.title)}</h3>{table(t.rows, text='fold' in t.rows[0])}" for t in postprocessing_tables(found)
    )
    note = honesty(found)
    told = f'<p class="soft">{_as_sentence(note)}</p>' if note else ""
    return f"<p>{_as_sentence(found.note)}</p>{body}{told}"


def curves(run: RunFacts) -> str:
    """Loss and validation Dice of all folds."""
    charts = []
    if run.losses:
        charts.append(line_chart(run.losses, x_label="update", y_label="training loss"))
    if run.dices:
        charts.append(line_chart(run.dices, x_label="update", y_label="validation Dice"))
    if not charts:
        return ""
    key = _key([(line.name, line.group) for line in run.losses])
    note = "Validations before the last take a few cases only; the last, of all held-out cases, stands apart."
    body = "".join(f"<figure>{chart}</figure>" for chart in charts)
    return f'{key}<div class="charts">{body}</div><p class="soft">{note}</p>'


def plan(run: RunFacts) -> str:
    """What was decided, each with its reason."""
    if run.plan is None:
        return ""
    reasons: Mapping[str, str] = run.plan.get("reasons", {})
    unet: Mapping[str, Any] = run.plan.get("unet", {})
    values = {
        "spacing_mm": run.plan.get("spacing_mm"),
        "patch_shape": run.plan.get("patch_shape"),
        "features": unet.get("features"),
        "stages": len(unet.get("features", ())),
        "batch_size": run.plan.get("batch_size"),
        "checkpointing": "on" if unet.get("checkpointing") else "off",
        "mirror_axes": run.plan.get("mirror_axes") or "none",
    }
    rows = [{"what": name, "value": _listed(values.get(name)), "why": why} for name, why in reasons.items()]
    warnings = "".join(f'<p class="warning">{escape(str(text))}</p>' for text in run.plan.get("warnings", ()))
    return warnings + table(rows, text=True)


def data(run: RunFacts, report: Report) -> str:
    """The dataset, how its patients were divided, and what was left out."""
    parts = []
    if run.dataset:
        parts.append(
            f"<p>{escape(str(run.dataset.get('name', '')))}: {run.dataset.get('cases', '?')} cases; "
            f"manifest <code>{escape(str(run.dataset.get('sha256', ''))[:16])}</code></p>"
        )
    if run.certificate:
        parts.append(_certificate(run.certificate))
    aside = [*run.set_aside, *((f.case_id, f.reason) for f in report.failures)]
    if aside:
        parts.append("<h3>Set aside</h3>" + table([{"case": c, "why": why} for c, why in aside], text=True))
    for what, ids in (
        ("References without a prediction", report.missing_predictions),
        ("Predictions without a reference", report.extra_predictions),
    ):
        if ids:
            more = f" and {len(ids) - MOST_NAMES} more" if len(ids) > MOST_NAMES else ""
            parts.append(f'<p class="warning">{what}: {escape(", ".join(ids[:MOST_NAMES]))}{more}</p>')
    return "".join(parts)


def versions(run: RunFacts, report: Report) -> str:
    """What it takes to do it again."""
    rows = [{"what": name, "value": str(value)} for name, value in (run.provenance or {}).items()]
    rows.append(
        {"what": "bootstrap", "value": f"{report.settings.bootstrap_samples} samples, seed {report.settings.seed}"}
    )
    command = f"<p><code>{escape(run.command)}</code></p>" if run.command else ""
    return command + table(rows, text=True)


def table(rows: Sequence[Mapping[str, Any]], *, text: bool = False) -> str:
    """Rows that share their keys; numbers to the right, or `text` to the left."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(c), c) for c in columns) + "</tr>" for row in rows)
    kind = ' class="text"' if text else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any, column: str) -> str:
    kind = ' class="reason"' if column == "why" else ""
    return (
        f"<td{kind}>{escape(_number(value) if isinstance(value, float) else '–' if value is None else str(value))}</td>"
    )


def _strips(report: Report, name: str, label: str, *, low: float | None, high: float | None) -> str:
    strips = [_strip(report, column, summary, name) for column, summary in enumerate(report.summaries)]
    values = [p.x for strip in strips for p in strip.points]
    if not values:
        return ""
    least = min(values) - 0.03 if low is None else low
    most = max(values) * 1.03 + 1e-6 if high is None else high
    return f"<figure>{strip_chart(strips, x_label=label, low=max(0.0, least), high=most)}</figure>"


def _strip(report: Report, column: int, summary: LabelSummary, name: str) -> Strip:
    points = []
    for case in report.cases:
        value = getattr(case.scores[column], name)
        if value is not None:
            points.append(Point(value, 0.0, f"{case.case_id}: {value:.3f}", _group(case)))
    found: LabelSummary | FigureSummary | None = summary if name == "dice" else summary.figure(name)
    if found is None:
        return Strip(summary.label, tuple(points), None, None, None)
    quartiles = (found.first_quartile, found.median, found.third_quartile)
    box = None if None in quartiles else quartiles
    return Strip(summary.label, tuple(points), box, found.mean, found.interval_95)  # type: ignore[arg-type]


def _group(case: CaseScores) -> int:
    return 0 if case.fold is None else case.fold


def _key_of_folds(report: Report) -> str:
    folds = sorted({case.fold for case in report.cases if case.fold is not None})
    return _key([(f"fold {fold}", fold) for fold in folds]) if len(folds) > 1 else ""


def _key(names: Sequence[tuple[str, int]]) -> str:
    if len(names) < 2:
        return ""
    parts = (f'<span class="key"><i class="k{group % COLOURS}"></i>{escape(name)}</span>' for name, group in names)
    return f"<p>{''.join(parts)}</p>"


def _volume_point(case: CaseScores, score: LabelScore) -> Point | None:
    if score.reference_mm3 is None or score.status in ("absent", "unannotated"):
        return None
    predicted, expected = score.prediction_mm3 / 1000, score.reference_mm3 / 1000
    title = f"{case.case_id}: {predicted:.2f} ml, reference {expected:.2f} ml"
    return Point((predicted + expected) / 2, predicted - expected, title, _group(case))


def _agreement(label: str, points: Sequence[Point]) -> str:
    differences = [p.y for p in points]
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    levels = [
        (mean, f"mean {mean:+.2f}"),
        (mean + AGREEMENT * deviation, f"{mean + AGREEMENT * deviation:+.2f}"),
        (mean - AGREEMENT * deviation, f"{mean - AGREEMENT * deviation:+.2f}"),
    ]
    chart = scatter_chart(points, x_label="mean volume (ml)", y_label="difference (ml)", levels=levels)
    return f"<figure>{chart}<figcaption>{escape(label)}</figcaption></figure>"


def _certificate(certificate: Mapping[str, Any]) -> str:
    if certificate.get("sound"):
        verdict = (
            "<p>Sound: every case is held out once, and no patient and no identical volume stands on two sides.</p>"
        )
    else:
        verdict = '<p class="warning">Not sound: a patient or an identical volume stands on two sides of a fold.</p>'
    rows = [
        {"fold": fold.get("fold"), "patients": fold.get("patients"), "cases": fold.get("cases")}
        for fold in certificate.get("folds", ())
    ]
    return f"<h3>Folds</h3>{verdict}{table(rows)}"


def _as_sentence(text: str) -> str:
    return escape(f"{text[0].upper()}{text[1:]}.")


def _listed(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " x ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"95 %: {_number(interval[0])} to {_number(interval[1])}"
