"""How good a segmentation probably is, by the model's own probabilities: the Dice that they lead one to expect.

It is of what the network decides on its own grid, before any post-processing. It is right as far as the probabilities
are; how far that is for a model is measured on cases it was not trained on (`pipeline.expectation`).
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import RunError
from pipeline.files import write_json, write_text

QUALITY_JSON, QUALITY_CSV = "quality.json", "quality.csv"

_VALUE = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LabelEstimate(BaseModel):
    """One label, or one region. `expected_dice` is 2 sum(p [decided]) / (sum(p) + count of decided), None where nothing
    was decided; `decided_mm3` is what was, and `expected_mm3` the sum of the probabilities."""

    model_config = _VALUE

    label: str
    expected_dice: float | None
    decided_mm3: float
    expected_mm3: float


class QualityEstimate(BaseModel):
    """One study. Of a model with regions, `labels` are these: what is learnt."""

    model_config = _VALUE

    labels: tuple[LabelEstimate, ...]

    @property
    def mean(self) -> float | None:
        """The mean over the labels that were found; None if none was."""
        found = [label.expected_dice for label in self.labels if label.expected_dice is not None]
        return math.fsum(found) / len(found) if found else None

    @property
    def not_found(self) -> tuple[str, ...]:
        """Labels of which there is no voxel."""
        return tuple(label.label for label in self.labels if label.expected_dice is None)


def record_quality(out: Path, name: str, estimate: QualityEstimate) -> None:
    """Note a study's estimate in `out`: as JSON, and in a table whose first rows are the studies to look at first.

    Raises:
        RunError: the folder cannot be written, or the estimates that are there cannot be read.
    """
    found = read_quality(out) | {name: estimate}
    studies = {study: {"mean": e.mean, **e.model_dump(mode="json")} for study, e in sorted(found.items())}
    write_json(out / QUALITY_JSON, {"format": "volseg-quality-1", "studies": studies})
    write_text(out / QUALITY_CSV, _table(found))


def read_quality(out: Path) -> dict[str, QualityEstimate]:
    """The estimates by study; none where there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    file = out / QUALITY_JSON
    if not file.is_file():
        return {}
    try:
        studies = json.loads(file.read_bytes())["studies"]
        return {name: QualityEstimate.model_validate({"labels": value["labels"]}) for name, value in studies.items()}
    except (ValueError, LookupError, TypeError, AttributeError, ValidationError) as error:
        raise RunError(f"{file}: no quality estimates; it is damaged, take it away") from error


def look_first(found: dict[str, QualityEstimate]) -> list[str]:
    """The studies, those in which nothing was found first, then by the mean expected Dice."""
    return sorted(found, key=lambda name: (-1.0 if (mean := found[name].mean) is None else mean, name))


def _table(found: dict[str, QualityEstimate]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    labels = list(dict.fromkeys(label.label for estimate in found.values() for label in estimate.labels))
    writer.writerow(["study", "mean_expected_dice", "not_found", *(f"expected_dice {label}" for label in labels)])
    for name in look_first(found):
        estimate = found[name]
        values = {label.label: label.expected_dice for label in estimate.labels}
        figures = [_figure(values.get(label)) for label in labels]
        writer.writerow([name, _figure(estimate.mean), " ".join(estimate.not_found), *figures])
    return stream.getvalue()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
