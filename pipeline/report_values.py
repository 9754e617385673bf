"""What an evaluation found, as values: per case and label, per label over the cases, and over all labels.

JSON and CSV are written from here; tables are in `report_tables`, pictures in `report`.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import EvaluateConfig
from pipeline.errors import RunError
from pipeline.postprocessing import Found

REPORT_JSON, REPORT_CSV = "report.json", "report.csv"
"""In the folder of a run, and of each of its folds."""

Status = Literal["scored", "absent", "missed", "false", "unannotated"]
Interval = tuple[float, float]

# No NaN: what is not defined is None, null in JSON.
_VALUE = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LabelScore(BaseModel):
    """One label, or one region, in one case; the figures are those of `measures.Measures`, null where not defined.

    `status`: "scored" is on both sides; "missed" in the reference only and "false" in the prediction only,
    both with a Dice of 0; "absent" on neither, with no Dice; "unannotated" where the reference says nothing of it,
    with neither a Dice nor a volume there. Volumes are of the voxels that the reference does not ignore.
    Distances have no value where a side is empty. Lesions are connected components, matched one to one.
    `expected_dice` is what the model's own probabilities led one to expect, where they were asked (`quality`).
    """

    model_config = _VALUE

    label: str
    status: Status
    dice: float | None
    prediction_mm3: float
    reference_mm3: float | None
    volume_difference_mm3: float | None = None
    sensitivity: float | None = None
    precision: float | None = None
    tolerance_mm: float | None = None
    surface_dice: float | None = None
    hausdorff_95_mm: float | None = None
    hausdorff_mm: float | None = None
    average_distance_mm: float | None = None
    lesions_predicted: int | None = None
    lesions_expected: int | None = None
    lesions_matched: int | None = None
    lesion_f1: float | None = None
    lesion_dice: float | None = None
    expected_dice: float | None = None


@dataclass(frozen=True)
class Figure:
    """A figure beside the Dice that is summed up over cases: its name in `LabelScore`, and which values are worst.

    `is_mean` tells whether its mean over labels says anything.
    """

    name: str
    worst: Literal["lowest", "highest", "farthest from 0"]
    is_mean: bool = True
    is_of_lesions: bool = False


FIGURES = (
    Figure("surface_dice", "lowest"),
    Figure("hausdorff_95_mm", "highest"),
    Figure("hausdorff_mm", "highest"),
    Figure("average_distance_mm", "highest"),
    Figure("volume_difference_mm3", "farthest from 0", is_mean=False),
    Figure("sensitivity", "lowest"),
    Figure("precision", "lowest"),
    Figure("lesion_f1", "lowest", is_of_lesions=True),
    Figure("lesion_dice", "lowest", is_of_lesions=True),
)


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


class CaseExplanation(BaseModel):
    """A bad case, and what of its header or label table would explain it (see `header_faults`)."""

    model_config = _VALUE

    case_id: str
    sentence: str


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


class CaseFigure(BaseModel):
    """A case among the worst of a figure."""

    model_config = _VALUE

    case_id: str
    value: float


class FigureSummary(BaseModel):
    """A figure of one label, or one region, over the `n` cases in which it is defined; otherwise as `LabelSummary`.

    A case that missed the label has no distances: their mean is over the cases where something was found.
    """

    model_config = _VALUE

    name: str
    n: int
    mean: float | None
    interval_95: Interval | None
    std: float | None
    minimum: float | None
    first_quartile: float | None
    median: float | None
    third_quartile: float | None
    maximum: float | None
    worst: tuple[CaseFigure, ...]
    folds: tuple[FoldMean, ...]


class LabelSummary(BaseModel):
    """Dice of one label, or one region, over the cases, and the other figures.

    `n_scored` counts the cases with a Dice, with `n_missed` and `n_false` (both 0); `n_absent` and `n_unannotated`
    the others.
    `std` is the sample's (n - 1). Quartiles are interpolated linearly. `interval_95` is that of the mean.
    `figures` has those of `FIGURES` that any case has; of lesions only where they were asked for, or where the
    reference holds several in at least half of the cases that have the label.
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
    figures: tuple[FigureSummary, ...] = ()

    def figure(self, name: str) -> FigureSummary | None:
        """The figure of that name, None where no case has it."""
        return next((figure for figure in self.figures if figure.name == name), None)


class OverallFigure(BaseModel):
    """The mean over labels of a figure, as `Overall` has that of the Dice."""

    model_config = _VALUE

    name: str
    mean: float | None
    interval_95: Interval | None
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
    figures: tuple[OverallFigure, ...] = ()


class Expectation(BaseModel):
    """How well the expected Dice of a label, or the mean of a case's, tells the true one, over `n` cases with both.

    `spearman` is the correlation of their ranks, `interval_95` its interval from resampled patients, `pearson` that of
    the values; None where either side is the same in all cases. `expected` and `found` are means, those of a case over
    the labels that have both. Besides, in `not_found` cases a label that is there was not found: of it nothing is
    expected, and its Dice of 0 counts in none of these figures.
    """

    model_config = _VALUE

    label: str
    n: int
    expected: float
    found: float
    spearman: float | None
    interval_95: Interval | None
    pearson: float | None
    not_found: int = 0


class Mirroring(BaseModel):
    """What mirrored passes did to held-out cases; `worth_it` where they help beyond doubt, and by enough.

    `dice_nested` is where each fold does what the cases of all others say, so that none had a say in how it is
    predicted; None within one fold.
    """

    model_config = _VALUE

    n_cases: int
    dice_plain: float | None
    dice_mirrored: float | None
    dice_nested: float | None = None
    interval_95: Interval | None
    p_value: float | None
    worth_it: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON value, for the bundle's provenance."""
        return self.model_dump(mode="json")

    @property
    def sentence(self) -> str:
        """What was found, for the one who waits for it."""
        if self.dice_plain is None or self.dice_mirrored is None:
            return "mirrored passes: no case tells what they are worth; they are left out"
        figures = f"Dice {self.dice_plain:.4f} without, {self.dice_mirrored:.4f} with them over {self.n_cases} cases"
        test = "" if self.p_value is None else f", p = {self.p_value:.2g}"
        means = "taken by every prediction of this model" if self.worth_it else "left out, which is quicker"
        nested = "" if self.dice_nested is None else f"; {self.dice_nested:.4f} where each fold heeds only the others"
        return f"mirrored passes: {figures}{test}; {means}{nested}"


class Report(BaseModel):
    """Everything that an evaluation found.

    `failures` are cases that could not be scored, `missing_predictions` references that had no prediction,
    `extra_predictions` predictions that had no reference; none of them is part of any figure. `explanations` are of
    bad cases that a header or a label table may have made so. `expectations` are of labels, then regions, then of the
    mean over these, where a prediction was asked what it expects. `postprocessing` is what was tried of it on the
    cases of a cross-validation; every other figure is without it. `mirroring` is what was found of mirrored passes,
    where the config leaves them to the held-out cases; every other figure is of what was decided.
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
    explanations: tuple[CaseExplanation, ...] = ()
    expectations: tuple[Expectation, ...] = ()
    postprocessing: Found | None = None
    mirroring: Mirroring | None = None

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


def read_report(file: Path) -> Report:
    """The report that a JSON file holds.

    Raises:
        RunError: it cannot be read, or is none.
    """
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read as a report ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise RunError(f"{file}: not an evaluation report")
    try:
        return Report.from_json(value)
    except RunError as error:
        raise RunError(f"{file}: {error}") from error
