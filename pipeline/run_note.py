"""A run in words, as MLflow shows it on the run's page: figures, data, plan, command, and where to look further."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.plan import Plan
from pipeline.report_values import Interval, LabelSummary, Report
from pipeline.run_page import PAGE, again
from pipeline.runs import Run
from pipeline.tracking import discreet_text

MOST_LABELS = 20
"""Labels that have a row; a description has no room for more, and the report has them all."""

_FIGURES = {"surface_dice": ("surface Dice", "", 3), "hausdorff_95_mm": ("HD95", " mm", 2)}


def run_note(run: Run, folder: Path, report: Report, pictures: Sequence[str] = ()) -> str:
    """Markdown about the run, or one fold of it, by its `folder`; `pictures` are names of overlays in `overlays/`.

    MLflow shows the first lines until it is asked for more, so they hold what most come for.
    """
    is_fold = folder != run.folder
    parts = [
        f"### {_dice(report)}",
        f"{_scope(report, is_fold=is_fold)}. Look at {_links(pictures, is_fold=is_fold)}.",
        "\n".join(_labels(report)),
        _data(run),
        _plan(run.plan),
        _command(run, folder),
    ]
    return "\n\n".join(part for part in parts if part)


def headline(report: Report, *, is_fold: bool) -> str:
    """The result in a sentence."""
    if report.overall.mean is None:
        return _dice(report)
    scope = _scope(report, is_fold=is_fold)
    return f"{_dice(report)}: {scope[0].lower()}{scope[1:]}"


def _dice(report: Report) -> str:
    mean = report.overall.mean
    return "No case could be scored" if mean is None else f"Dice {mean:.3f}{_told(report.overall.interval_95)}"


def _scope(report: Report, *, is_fold: bool) -> str:
    overall = report.overall
    cases = f"{_count(overall.n_cases, 'case')} of {_count(overall.n_patients, 'patient')}"
    where = (
        f"over the {cases} held out" if is_fold else f"out of fold over {cases}, {_count(len(overall.folds), 'fold')}"
    )
    return f"{report.headline.capitalize()}, {where}"


def _told(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 % {interval[0]:.3f} to {interval[1]:.3f})"


def _labels(report: Report) -> list[str]:
    """A line a label; a list and no table, which MLflow's page sets without space between its columns."""
    rows = [_label(summary) for summary in report.summaries[:MOST_LABELS]]
    left = len(report.summaries) - MOST_LABELS
    return [*rows, f"- and {left} more in the report"] if left > 0 else rows


def _label(summary: LabelSummary) -> str:
    told = [] if summary.mean is None else [f"Dice {summary.mean:.3f}{_told(summary.interval_95)}"]
    for name, (what, unit, digits) in _FIGURES.items():
        figure = summary.figure(name)
        if figure is not None and figure.mean is not None:
            told.append(f"{what} {figure.mean:.{digits}f}{unit}")
    cases = _count(summary.n_scored, "case")
    return f"- **{_plain(summary.label)}**: {', '.join([*told, cases])}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _data(run: Run) -> str:
    manifest = run.dataset.manifest
    channels = ", ".join(channel.described for channel in run.plan.channels)
    origin = f"; {_plain(manifest.source)}" if manifest.source else ""
    return f"**Data:** {_plain(manifest.name)}, {len(manifest.cases)} cases, {_plain(channels)}{origin}"


def _plan(plan: Plan) -> str:
    unet = plan.unet
    network = f"{plan.network}, {unet.stages} resolutions, {unet.features[0]} to {unet.features[-1]} features"
    patch = " × ".join(str(size) for size in plan.patch_shape)
    spacing = " × ".join(f"{step:g}" for step in plan.spacing_mm)
    head = f"**Plan:** {network}; patches of {patch} voxels of {spacing} mm, {plan.batch_size} a batch"
    reasons = [f"- {key.replace('_', ' ')}: {_plain(reason)}" for key, reason in plan.reasons.items()]
    warnings = [f"- ⚠ {_plain(warning)}" for warning in plan.warnings]
    return "\n".join([head, "", *warnings, *reasons])


def _command(run: Run, folder: Path) -> str:
    config = "[this config](artifact:config.yaml)" if folder == run.folder else "the config of the parent run"
    return f"**Again:** `{again(run, folder)}`, with {config}"


def _links(pictures: Sequence[str], *, is_fold: bool) -> str:
    named = {name: name.removeprefix("overlay_").removesuffix(".png") for name in pictures}
    places = {PAGE: "report"} | {f"overlays/{name}": f"{which} case" for name, which in named.items()}
    if not is_fold:
        places |= {"plan.json": "plan", "config.yaml": "config", "folds.json": "folds"}
    return "the " + ", ".join(f"[{what}](artifact:{place})" for place, what in places.items())


def _plain(text: str) -> str:
    """Text that is not read as Markdown or HTML, and names no home folder."""
    text = discreet_text(text)
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text
