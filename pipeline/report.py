"""What an evaluation found: its values, as JSON, CSV and table rows, and its pictures.

Pictures are drawn with matplotlib's object interface on Agg: no display, no global state.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import EvaluateConfig
from pipeline.errors import RunError
from pipeline.files import atomic_path
from transforms.labels import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Status = Literal["scored", "absent", "missed", "false", "unannotated"]
Interval = tuple[float, float]
Cell = str | int | float | None

# No NaN: what is not defined is None, null in JSON.
_VALUE = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LabelScore(BaseModel):
    """One label, or one region, in one case.

    `status`: "scored" is on both sides; "missed" in the reference only and "false" in the prediction only,
    both with a Dice of 0; "absent" on neither, with no Dice; "unannotated" where the reference says nothing of it,
    with neither a Dice nor a volume there. Volumes are of the voxels that the reference does not ignore.
    """

    model_config = _VALUE

    label: str
    status: Status
    dice: float | None
    prediction_mm3: float
    reference_mm3: float | None


class CaseScores(BaseModel):
    """One case: a score for every label of the schema, in its order, and for every region."""

    model_config = _VALUE

    case_id: str
    patient_id: str
    fold: int | None = None
    labels: tuple[LabelScore, ...]
    regions: tuple[LabelScore, ...] = ()

    @property
    def scores(self) -> tuple[LabelScore, ...]:
        """Of the labels, then of the regions."""
        return (*self.labels, *self.regions)


class CaseFailure(BaseModel):
    """A case that could not be scored, and why in one line."""

    model_config = _VALUE

    case_id: str
    reason: str


class CaseDice(BaseModel):
    """A case among the worst."""

    model_config = _VALUE

    case_id: str
    dice: float


class FoldMean(BaseModel):
    """A mean within one fold; None when the fold has nothing to score."""

    model_config = _VALUE

    fold: int
    mean: float | None


class LabelSummary(BaseModel):
    """Dice of one label, or one region, over the cases.

    `n_scored` counts the cases with a Dice, with `n_missed` and `n_false` (both 0); `n_absent` and `n_unannotated`
    the others.
    `std` is the sample's (n - 1). Quartiles are interpolated linearly. `interval_95` is that of the mean.
    """

    model_config = _VALUE

    label: str
    n_scored: int
    n_absent: int
    n_missed: int
    n_false: int
    n_unannotated: int = 0
    mean: float | None
    interval_95: Interval | None
    std: float | None
    minimum: float | None
    first_quartile: float | None
    median: float | None
    third_quartile: float | None
    maximum: float | None
    worst: tuple[CaseDice, ...]
    folds: tuple[FoldMean, ...]


class Overall(BaseModel):
    """The mean over labels: the unweighted mean of the means of all labels that any case has scored. Where there are
    regions, which are what a network then learns, all of it is of these in place of the labels.

    A fold's is the same figure from that fold's cases. `worst` ranks cases by the mean Dice of their labels.
    `interval_95` rests on the resamples that hold every one of those labels; None when those are under half.
    """

    model_config = _VALUE

    n_cases: int
    n_patients: int
    mean: float | None
    interval_95: Interval | None
    worst: tuple[CaseDice, ...]
    folds: tuple[FoldMean, ...]


class Report(BaseModel):
    """Everything that an evaluation found.

    `failures` are cases that could not be scored, `missing_predictions` references that had no prediction,
    `extra_predictions` predictions that had no reference; none of them is part of any figure.
    """

    model_config = _VALUE

    format: Literal["volseg-report-1"] = "volseg-report-1"
    settings: EvaluateConfig
    overall: Overall
    labels: tuple[LabelSummary, ...]
    regions: tuple[LabelSummary, ...] = ()
    cases: tuple[CaseScores, ...]
    failures: tuple[CaseFailure, ...] = ()
    missing_predictions: tuple[str, ...] = ()
    extra_predictions: tuple[str, ...] = ()

    @property
    def summaries(self) -> tuple[LabelSummary, ...]:
        """Of the labels, then of the regions."""
        return (*self.labels, *self.regions)

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` restores; null where a figure is not defined, never NaN."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            RunError: the value is not a report.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "content"
            raise RunError(f"not an evaluation report: {key}: {first['msg']}") from error

    def to_csv(self) -> str:
        """One row per case and label, then the case's regions; an empty cell where a value is not defined."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["case_id", "patient_id", "fold", *LabelScore.model_fields])
        for case in self.cases:
            for score in case.scores:
                writer.writerow([case.case_id, case.patient_id, case.fold, *score.model_dump().values()])
        return stream.getvalue()

    @property
    def headline(self) -> str:
        """What the overall figures are."""
        return "mean of regions" if self.regions else "mean of labels"

    def rows_for_table(self) -> list[dict[str, Cell]]:
        """One row a label, one a region, then "mean of labels" (or of regions); keys are column names, values are raw.

        "unannotated" is a column when any label was not annotated somewhere; "fold 0" and so on follow when the cases
        have folds.
        """
        rows = [_table_row(summary) for summary in self.summaries]
        if not any(summary.n_unannotated for summary in self.summaries):
            rows = [{column: cell for column, cell in row.items() if column != "unannotated"} for row in rows]
        low, high = self.overall.interval_95 or (None, None)
        last: dict[str, Cell] = {"label": self.headline, "mean": self.overall.mean}
        last |= {"low_95": low, "high_95": high, **_fold_columns(self.overall.folds)}
        return [*rows, {column: last.get(column) for column in rows[0]}]


def _table_row(summary: LabelSummary) -> dict[str, Cell]:
    low, high = summary.interval_95 or (None, None)
    return {
        "label": summary.label,
        "scored": summary.n_scored,
        "absent": summary.n_absent,
        "missed": summary.n_missed,
        "false": summary.n_false,
        "unannotated": summary.n_unannotated,
        "mean": summary.mean,
        "low_95": low,
        "high_95": high,
        "std": summary.std,
        "median": summary.median,
        "first_quartile": summary.first_quartile,
        "third_quartile": summary.third_quartile,
        "minimum": summary.minimum,
        "worst_case": summary.worst[0].case_id if summary.worst else None,
        **_fold_columns(summary.folds),
    }


def _fold_columns(folds: Sequence[FoldMean]) -> dict[str, Cell]:
    return {f"fold {fold.fold}": fold.mean for fold in folds}


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
