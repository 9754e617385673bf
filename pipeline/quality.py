"""How good a segmentation probably is, by the model's own probabilities: the Dice that they lead one to expect.

It is of what the network decides on its own grid, before any post-processing. It is right as far as the probabilities
are; how far that is for a model is measured on cases it was not trained on (`pipeline.expectation`).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import RunError
from pipeline.files import explain_os_error, safe_name, write_json, write_text

QUALITY = "quality"
"""Folder of a file for each study, within that of the label maps."""

QUALITY_CSV = "quality.csv"

NOTABLE = 0.1
"""Part of a label's usual volume: if that much was expected and none of it decided, it was not merely absent."""

_SUFFIX = ".quality.json"
_FORMAT = "volseg-quality-1"

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
    """One study. Of a model with regions, `labels` are these: what is learnt. `models` are digests."""

    model_config = _VALUE

    labels: tuple[LabelEstimate, ...]
    models: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """The mean over the labels that were found; None if none was."""
        found = [label.expected_dice for label in self.labels if label.expected_dice is not None]
        return math.fsum(found) / len(found) if found else None

    @property
    def not_found(self) -> tuple[str, ...]:
        """Labels of which there is no voxel."""
        return tuple(label.label for label in self.labels if label.expected_dice is None)


def quality_file(out: Path, name: str) -> Path:
    """Where a study's estimate is."""
    return out / QUALITY / (safe_name(name) + _SUFFIX)


def record_quality(out: Path, name: str, estimate: QualityEstimate) -> None:
    """Note a study's estimate in `out`, in a file of its own.

    Raises:
        RunError: the folder cannot be written.
    """
    value = {"format": _FORMAT, "mean": estimate.mean, **estimate.model_dump(mode="json")}
    write_json(quality_file(out, name), value)


def read_quality(out: Path) -> dict[str, QualityEstimate]:
    """The estimates that lie in `out`, by study; none where there are none.

    Raises:
        RunError: a file is damaged.
    """
    found = ((file, _read(file)) for file in sorted((out / QUALITY).glob(f"[!.]*{_SUFFIX}")))
    return {file.name.removesuffix(_SUFFIX): estimate for file, estimate in found if estimate is not None}


def _read(file: Path) -> QualityEstimate | None:
    """None of a file that says it is something else."""
    try:
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            return None
        return QualityEstimate.model_validate({key: value[key] for key in ("labels", "models")})
    except (OSError, ValueError, LookupError, ValidationError) as error:
        raise RunError(f"{file}: no quality estimate; it is damaged, take it away") from error


def write_quality_table(out: Path, found: Mapping[str, QualityEstimate]) -> None:
    """A table whose first rows are the studies to look at first; of no study, none.

    Raises:
        RunError: the folder cannot be written.
    """
    file = out / QUALITY_CSV
    if found:
        write_text(file, _table(found))
        return
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, file) from error


def look_first(found: Mapping[str, QualityEstimate]) -> list[str]:
    """The studies: those in which nothing was found, those in which a label was not of which a good deal was expected,
    then the others; each by the mean expected Dice."""
    decided: dict[str, list[float]] = {}
    for label in (label for estimate in found.values() for label in estimate.labels if label.decided_mm3):
        decided.setdefault(label.label, []).append(label.decided_mm3)
    least_mm3 = {name: NOTABLE * median(volumes) for name, volumes in decided.items()}

    def place(name: str) -> tuple[int, float, str]:
        mean, labels = found[name].mean, found[name].labels
        if mean is None:
            return 0, 0.0, name
        doubted = any(x.expected_mm3 >= least_mm3.get(x.label, math.inf) for x in labels if x.expected_dice is None)
        return 1 if doubted else 2, mean, name

    return sorted(found, key=place)


def _table(found: Mapping[str, QualityEstimate]) -> str:
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
