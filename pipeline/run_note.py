"""A run in words, as MLflow shows it on the run's page: figures, data, plan, command, and where to look further."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.plan import Plan
from pipeline.report_values import FigureSummary, Interval, OverallFigure, Report
from pipeline.run_page import PAGE
from pipeline.runs import Run

MOST_LABELS = 20
"""Labels that have a row; a description has no room for more, and the report has them all."""

_FIGURES = {"surface_dice": ("surface Dice", 3), "hausdorff_95_mm": ("HD95 mm", 2)}


def run_note(run: Run, folder: Path, report: Report, pictures: Sequence[str] = ()) -> str:
    """Markdown about the run, or one fold of it, by its `folder`; `pictures` are names of overlays in `overlays/`."""
    parts = [
        _headline(report, is_fold=folder != run.folder),
        "\n".join(_table(report)),
        _data(run),
        _plan(run.plan),
        _command(run, folder),
        _links(pictures, is_fold=folder != run.folder),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(report: Report, *, is_fold: bool) -> str:
    overall = report.overall
    if overall.mean is None:
        return "No case could be scored."
    cases = f"{overall.n_cases} cases of {overall.n_patients} patients"
    where = f"over the {cases} held out" if is_fold else f"out of fold over {cases}, {len(overall.folds)} folds"
    return f"### Dice {overall.mean:.3f}{_told(overall.interval_95)}\n\n{report.headline.capitalize()}, {where}."


def _told(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 % {interval[0]:.3f} to {interval[1]:.3f})"


def _table(report: Report) -> list[str]:
    names = [name for name in _FIGURES if any(figure.name == name for figure in report.overall.figures)]
    heads = ["", "cases", "Dice", "95 %", *(_FIGURES[name][0] for name in names)]
    rows = [_row(heads), _row(["---"] * len(heads))]
    for label in report.summaries[:MOST_LABELS]:
        figures = [_number(label.figure(name), _FIGURES[name][1]) for name in names]
        interval = "" if label.interval_95 is None else f"{label.interval_95[0]:.3f} to {label.interval_95[1]:.3f}"
        mean = "" if label.mean is None else f"{label.mean:.3f}"
        rows.append(_row([_plain(label.label), str(label.n_scored), mean, interval, *figures]))
    left = len(report.summaries) - MOST_LABELS
    return [*rows, _row([f"and {left} more", *[""] * (len(heads) - 1)])] if left > 0 else rows


def _number(figure: FigureSummary | OverallFigure | None, digits: int) -> str:
    return "" if figure is None or figure.mean is None else f"{figure.mean:.{digits}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


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
    if folder == run.folder:
        return "**Again:** `volseg crossval config.yaml`, with [this config](artifact:config.yaml)"
    return f"**Again:** `volseg train config.yaml --fold {folder.name[5:]}`, with the config of the parent run"


def _links(pictures: Sequence[str], *, is_fold: bool) -> str:
    named = {name: name.removeprefix("overlay_").removesuffix(".png") for name in pictures}
    places = {PAGE: "report"} | {f"overlays/{name}": f"{which} case" for name, which in named.items()}
    if not is_fold:
        places |= {"plan.json": "plan", "config.yaml": "config", "folds.json": "folds"}
    return "**Look at:** " + ", ".join(f"[{what}](artifact:{place})" for place, what in places.items())


def _plain(text: str) -> str:
    """Text that is not read as Markdown or HTML."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text
