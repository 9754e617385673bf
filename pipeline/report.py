"""What an evaluation found, in pictures; its values are those of `report_values`.

Pictures are drawn with matplotlib's object interface on Agg: no display, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import RunError
from pipeline.files import atomic_path
from pipeline.report_values import Interval, LabelSummary, Report
from transforms.labels import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_COLOURS = tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (PALETTE[i] for i in (4, 5, 2, 6, 0, 1, 7)))
"""Of the palette, those that a thin line on white shows; the order keeps neighbours apart in lightness."""

_MARKERS = "os^Dvph"
_LINE_STYLES = ("-", "--", ":", "-.")
_MAIN_KEYS = ("loss", "dice/mean", "learning_rate")
_INK, _FAINT = "#222222", "#9a9a9a"
_GOLDEN = 0.6180339887
_DOTS_PER_INCH = 150


def learning_curves(history: Sequence[Mapping[str, float | None]], target: Path) -> None:
    """Draw losses, Dice and learning rate over the steps of a training, as far as `history` has them.

    A row has "step" and any of "loss", "loss/<term>", "dice/<label>", "dice/mean" and "learning_rate". The
    suffix of `target` chooses the format (.png, .svg, .pdf).

    Raises:
        RunError: nothing to draw, or the file cannot be written.
    """
    panels = [(title, _series(history, keys)) for title, keys in _panel_keys(history)]
    panels = [(title, series) for title, series in panels if series]
    if not panels:
        raise RunError(f"cannot draw {target}: the history holds no loss, Dice or learning rate yet")
    heights = [max(2.3, 0.19 * len(series)) for _, series in panels]
    figure = _new_figure(8.0, 0.6 + sum(heights))
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, series) in zip(column, panels, strict=True):
        _draw_series(axes, title, series)
    column[-1].set_xlabel("step")
    _save(figure, target)


def dice_distribution(report: Report, target: Path) -> None:
    """Draw each label's Dice: every case, its quartiles, and the mean with its 95 % interval.

    Folds differ in colour and shape. The suffix of `target` chooses the format (.png, .svg, .pdf).

    Raises:
        RunError: the file cannot be written.
    """
    rows = len(report.summaries) + 1
    figure = _new_figure(8.5, 1.5 + 0.62 * rows)
    axes = figure.subplots()
    for row, summary in enumerate(report.summaries):
        _draw_cases(axes, report, row)
        _draw_box(axes, summary, row)
        note = f"  n = {summary.n_scored}" if summary.n_scored else ""
        _draw_mean(axes, row - 0.24, summary.mean, summary.interval_95, note=note)
    _draw_mean(axes, rows - 1, report.overall.mean, report.overall.interval_95)
    axes.axhline(rows - 1.5, color=_FAINT, linewidth=0.8)
    names = [_plain(summary.label) for summary in report.summaries]
    axes.set_yticks(range(rows), labels=[*names, report.headline])
    axes.set_ylim(rows - 0.5, -0.6)
    axes.set_xlim(_lower_limit([summary.minimum for summary in report.summaries]), 1.005)
    axes.set_xlabel("Dice; box: quartiles and median; diamond: mean and its 95 % interval")
    _draw_title_and_folds(figure, axes, report)
    _tidy(axes, grid_axis="x")
    _save(figure, target)


def _new_figure(width_inches: float, height_inches: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    return Figure(figsize=(width_inches, height_inches), layout=layout, facecolor="white")


def _save(figure: Figure, target: Path) -> None:
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=_DOTS_PER_INCH)


def _tidy(axes: Axes, *, grid_axis: Literal["x", "y"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid_axis, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)


def _plain(name: str) -> str:
    """A name that is drawn letter by letter: matplotlib takes what stands between two $ for a formula."""
    return name.replace("$", r"\$")


Series = dict[str, tuple[list[float], list[float]]]


def _panel_keys(history: Sequence[Mapping[str, float | None]]) -> list[tuple[str, list[str]]]:
    keys = list(dict.fromkeys(key for row in history for key in row))
    losses = [key for key in keys if key == "loss" or key.startswith("loss/")]
    labels = [key for key in keys if key.startswith("dice/")]
    return [
        ("Training loss", sorted(losses, key=lambda key: key != "loss")),
        ("Validation Dice", sorted(labels, key=lambda key: key != "dice/mean")),
        ("Learning rate", ["learning_rate"]),
    ]


def _series(history: Sequence[Mapping[str, float | None]], keys: Sequence[str]) -> Series:
    """Steps and values of each key that has any."""
    series: Series = {}
    for key in keys:
        for row in history:
            step, value = row.get("step"), row.get(key)
            if step is not None and value is not None:
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return series


def _draw_series(axes: Axes, title: str, series: Series) -> None:
    lines: dict[str, Line2D] = {}
    others = [key for key in series if key not in _MAIN_KEYS]
    for key, (steps, values) in series.items():
        style = _line_style(others.index(key) if key in others else None)
        if key.startswith("loss"):
            axes.plot(steps, values, **style | {"linewidth": 0.6, "alpha": 0.3})
            values = _running_mean(values)
        marker = "o" if key.startswith("dice/") else ""
        name = _plain({"loss": "total"}.get(key, key.partition("/")[2]))
        (lines[name],) = axes.plot(steps, values, marker=marker, markersize=3, **style)
    if len(lines) > 1:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
        axes.legend(list(lines.values()), list(lines), frameon=False, fontsize=8, **place)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    _tidy(axes, grid_axis="y")


def _line_style(index: int | None) -> dict[str, Any]:
    """Of the line of that number; None for the one that sums up the others."""
    if index is None:
        return {"color": _INK, "linewidth": 1.8}
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _LINE_STYLES[index // len(_COLOURS) % len(_LINE_STYLES)],
        "linewidth": 1.2,
    }


def _running_mean(values: Sequence[float]) -> list[float]:
    """Over a window of 2 % of the values, centred, shorter at the ends."""
    reach = len(values) // 100
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _draw_cases(axes: Axes, report: Report, row: int) -> None:
    dice_of_folds: dict[int, list[float]] = {}
    for case in report.cases:
        dice = case.scores[row].dice
        if dice is not None:
            dice_of_folds.setdefault(-1 if case.fold is None else case.fold, []).append(dice)
    order = [fold.fold for fold in report.overall.folds]
    # Multiples of the golden ratio spread evenly whatever their number, and are the same in every run.
    heights = (row + 0.14 + 0.3 * ((i * _GOLDEN) % 1.0 - 0.5) for i in count())
    for fold, values in dice_of_folds.items():
        style = _fold_style(order.index(fold) if fold in order else 0)
        spread = list(islice(heights, len(values)))
        axes.plot(values, spread, linestyle="", markersize=3.6, alpha=0.7, markeredgewidth=0, **style)


def _fold_style(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _draw_box(axes: Axes, summary: LabelSummary, row: int) -> None:
    if summary.first_quartile is None or summary.third_quartile is None or summary.median is None:
        return
    from matplotlib.patches import Rectangle

    low, high = summary.first_quartile, summary.third_quartile
    axes.add_patch(Rectangle((low, row - 0.06), high - low, 0.4, fill=False, edgecolor=_INK, linewidth=0.9))
    axes.plot([summary.median] * 2, [row - 0.06, row + 0.34], color=_INK, linewidth=1.6)


def _draw_mean(axes: Axes, height: float, mean: float | None, interval: Interval | None, *, note: str = "") -> None:
    """The mean with its interval at that height, and both in words at the right."""
    text = "no case has it"
    if mean is not None:
        axes.plot([mean], [height], marker="D", markersize=4.5, color=_INK)
        text = f"{mean:.3f}"
    if interval is not None:
        axes.plot(interval, [height] * 2, color=_INK, linewidth=1.8, marker="|", markersize=11)
        text += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    place = axes.get_yaxis_transform()
    axes.text(1.02, round(height), text + note, transform=place, va="center", fontsize=8.5, color=_INK)


def _draw_title_and_folds(figure: Figure, axes: Axes, report: Report) -> None:
    from matplotlib.lines import Line2D

    overall = report.overall
    title = f"Dice of {overall.n_cases} cases ({overall.n_patients} patients)"
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    if overall.folds:
        marks = [Line2D([], [], linestyle="", markersize=5, **_fold_style(i)) for i in range(len(overall.folds))]
        names = [f"fold {fold.fold}" for fold in overall.folds]
        figure.legend(marks, names, loc="outside upper right", ncols=8, frameon=False, fontsize=8)


def _lower_limit(minima: Sequence[float | None]) -> float:
    """A round number below every value, so that good results are not squeezed against the right edge."""
    lowest = min((m for m in minima if m is not None), default=0.0)
    return max(-0.005, int(lowest * 10 - 0.2) / 10)
