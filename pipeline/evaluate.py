"""Predictions against references: a Dice per case and label, and what they say together.

A label that neither side holds is counted as absent: no success and no failure, part of no mean. Nor is one that was
not annotated in the case; voxels that the reference ignores are not counted at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipeline.config import EvaluateConfig
from pipeline.errors import GeometryMismatch, VolsegError, VolumeError
from pipeline.files import safe_name
from pipeline.manifest import Dataset, load_dataset
from pipeline.manifest_formats import VOLUME_SUFFIXES, volume_stem
from pipeline.metrics import percentile_interval, resampled_means
from pipeline.report import (
    CaseDice,
    CaseFailure,
    CaseScores,
    FoldMean,
    Interval,
    LabelScore,
    LabelSummary,
    Overall,
    Report,
)
from pipeline.scores import CaseCounts, count_ids, label_scores, region_scores
from transforms.annotation import Annotation
from transforms.labels import LabelSchema, schema_from_names
from transforms.volume import read_label

SCHEMA_FILE = "labels.json"
"""The label schema that prediction writes beside its results."""

WORST_CASES = 5

Progress = Callable[[int, int], None]
"""Called with the number of cases done and the number of all cases."""

_MOST_NAMES = 10  # in a message
_MOST_THREADS = 4  # each holds a prediction and its reference


@dataclass(frozen=True)
class Reference:
    """An annotated case: where its label map is, whose it is, and how it is read if not as it is."""

    case_id: str
    path: Path
    patient_id: str
    fold: int | None = None
    annotation: Annotation | None = None


def score_case(
    prediction: npt.NDArray[Any], reference: npt.NDArray[Any], schema: LabelSchema, *, voxel_volume_mm3: float
) -> tuple[LabelScore, ...]:
    """Score two label maps (I, J, K) of label ids, one score for each label of the schema.

    Raises:
        ValueError: the shapes differ, or a value is not in the schema.
    """
    counts = count_ids(prediction, reference, schema)
    return label_scores(counts, schema, voxel_volume_mm3, annotated=schema.are_annotated(None))


def summarise(
    cases: Sequence[CaseScores],
    *,
    settings: EvaluateConfig,
    failures: Sequence[CaseFailure] = (),
    missing_predictions: Sequence[str] = (),
    extra_predictions: Sequence[str] = (),
) -> Report:
    """Sum up cases that were scored with one schema. Their order changes nothing.

    Means are over cases; the overall one is over regions where there are any, for these are what is learnt. Intervals
    come from resampling patients, all labels together (see `resampled_means`); a figure that rests on one patient has
    none, as that says nothing about the next.

    Raises:
        ValueError: no cases, a case that stands twice, or cases with different labels.
    """
    table = _table(cases)
    generator = np.random.default_rng(settings.seed)
    resampled = resampled_means(table.values, table.patients, samples=settings.bootstrap_samples, generator=generator)
    rows = [_label_summary(table, column, resampled[:, column]) for column in range(table.values.shape[1])]
    return Report(
        settings=settings,
        overall=_overall(table, resampled),
        labels=tuple(rows[: table.label_count]),
        regions=tuple(rows[table.label_count :]),
        cases=table.cases,
        failures=tuple(failures),
        missing_predictions=tuple(missing_predictions),
        extra_predictions=tuple(extra_predictions),
    )


def evaluate_files(
    predictions: Path,
    references: Path | Dataset,
    schema: LabelSchema | None = None,
    *,
    settings: EvaluateConfig | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Score label maps on disk: a file against a file, or a folder against a folder, manifest or `Dataset`.

    Files of two folders belong together when their names without the suffix are the same; those of a manifest
    by case id. The schema is the given one, else the dataset's, else `labels.json` beside the predictions,
    else made from the ids that occur. Without a manifest each case counts as a patient of its own. One of
    several cases that cannot be scored is set aside in `Report.failures`. A reference without a prediction is
    refused unless `allow_missing`, because leaving out the hardest cases raises the mean.

    Raises:
        VolumeError: a path that is not there, names that do not match, or no case that can be scored.
        GeometryMismatch: the only case has its prediction and its reference on different grids.
        ManifestError: the manifest cannot be used.
    """
    dataset = references if isinstance(references, Dataset) else _dataset_at(references)
    found, wanted = _match(predictions, dataset or references)
    schema = schema or _known_schema(predictions, dataset)
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    pairs = [(found[name], wanted[name]) for name in sorted(found.keys() & wanted.keys())]
    if not pairs:
        raise VolumeError(
            f"{predictions}: no prediction has the name of a reference: predictions {_some(extra)}; "
            f"references {_some(missing)}"
        )
    if missing and not allow_missing:
        others = f"; predictions without a reference: {_some(extra)}" if extra else ""
        raise VolumeError(
            f"{predictions}: {len(missing)} of {len(wanted)} references have no prediction: {_some(missing)}"
            f"{others}; add the predictions, or score the others alone with --allow-missing"
        )
    counted, failures = _count_all(pairs, schema, progress)
    return summarise(
        _score_all(counted, schema or _schema_of_found_ids(counted)),
        settings=settings or EvaluateConfig(),
        failures=failures,
        missing_predictions=missing,
        extra_predictions=extra,
    )


def references_of_dataset(dataset: Dataset) -> tuple[Reference, ...]:
    """The annotated cases of a dataset, with their patients and folds."""
    labelled = [(case, dataset.label_path(case)) for case in dataset.manifest.cases]
    return tuple(
        Reference(c.case_id, path, c.patient_id, c.fold, dataset.annotation(c))
        for c, path in labelled
        if path is not None
    )


@dataclass(frozen=True)
class _CountedCase:
    """Voxel counts by label id, perhaps before it is known which labels there are."""

    reference: Reference
    counts: CaseCounts
    voxel_volume_mm3: float


Pair = tuple[Path, Reference]


def _count_all(
    pairs: Sequence[Pair], schema: LabelSchema | None, progress: Progress | None
) -> tuple[list[_CountedCase], list[CaseFailure]]:
    """Read and count in threads (decompressing frees the interpreter); the order is that of `pairs`."""
    counted: list[_CountedCase] = []
    errors: list[tuple[str, VolsegError]] = []
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for done, outcome in enumerate(pool.map(partial(_count_case, schema=schema), pairs), start=1):
            if isinstance(outcome, VolsegError):
                errors.append((pairs[done - 1][1].case_id, outcome))
            else:
                counted.append(outcome)
            if progress:
                progress(done, len(pairs))
    if len(errors) == len(pairs) == 1:
        raise errors[0][1]
    if not counted:
        raise VolumeError(f"none of the {len(pairs)} cases can be scored; the first: {errors[0][1]}")
    return counted, [CaseFailure(case_id=case_id, reason=str(error)) for case_id, error in errors]


def _count_case(pair: Pair, schema: LabelSchema | None) -> _CountedCase | VolsegError:
    path, reference = pair
    try:
        predicted, expected = read_label(path), read_label(reference.path)
        if difference := predicted.geometry.difference(expected.geometry):
            raise GeometryMismatch(
                f"{path} and its reference {reference.path} lie on different grids: {difference}; "
                "bring both onto one grid first"
            )
        try:
            ids = expected.voxels if reference.annotation is None else reference.annotation.ids(expected.voxels)
            counts = count_ids(predicted.voxels, ids, schema)
        except ValueError as error:
            raise VolumeError(f"{path} against {reference.path}: {error}") from error
        return _CountedCase(reference, counts, expected.geometry.voxel_volume_mm3)
    except VolsegError as error:
        return error


def _score_all(counted: Sequence[_CountedCase], schema: LabelSchema) -> list[CaseScores]:
    return [_case_scores(case, schema) for case in counted]


def _case_scores(case: _CountedCase, schema: LabelSchema) -> CaseScores:
    annotation = case.reference.annotation
    annotated = schema.are_annotated(None if annotation is None else annotation.annotated)
    return CaseScores(
        case_id=case.reference.case_id,
        patient_id=case.reference.patient_id,
        fold=case.reference.fold,
        labels=label_scores(case.counts, schema, case.voxel_volume_mm3, annotated=annotated),
        regions=region_scores(case.counts, schema, case.voxel_volume_mm3, annotated=annotated),
    )


def _dataset_at(references: Path) -> Dataset | None:
    """The dataset when the path is a manifest, or a folder with nnU-Net's or MSD's dataset.json."""
    is_folder = (references / "dataset.json").is_file() and not _volumes_by_name(references)
    return load_dataset(references) if is_folder or references.suffix.lower() == ".json" else None


def _match(predictions: Path, references: Path | Dataset) -> tuple[dict[str, Path], dict[str, Reference]]:
    """Predictions and references by case id. One prediction file asks for its own reference alone."""
    found = _some_volumes(predictions)
    if isinstance(references, Dataset):
        wanted = {reference.case_id: reference for reference in references_of_dataset(references)}
    else:
        wanted = {name: Reference(name, path, name) for name, path in _some_volumes(references).items()}
        if predictions.is_file() and references.is_file():
            return dict.fromkeys(wanted, predictions), wanted
    if predictions.is_file():
        wanted = {name: reference for name, reference in wanted.items() if name in found} or wanted
    return found, wanted


def _some_volumes(path: Path) -> dict[str, Path]:
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    if volumes := _volumes_by_name(path):
        return volumes
    raise VolumeError(f"{path}: no label map here; one is a file that ends in {' or '.join(VOLUME_SUFFIXES)}")


def _volumes_by_name(path: Path) -> dict[str, Path]:
    """The volume files of a folder, or the one file, by name: without the suffix, as prediction names its results."""
    if path.is_file():
        return {safe_name(volume_stem(path)): path}
    try:
        files = sorted(file for file in path.iterdir() if file.name.lower().endswith(VOLUME_SUFFIXES))
    except OSError as error:
        raise VolumeError(f"{path}: this folder cannot be read ({error.strerror})") from error
    named: dict[str, Path] = {}
    for file in files:
        if file.name.startswith(".") or not file.is_file():
            continue
        name = safe_name(volume_stem(file))
        if name in named:
            raise VolumeError(f"{path}: both {named[name].name} and {file.name} are case '{name}'; keep one of them")
        named[name] = file
    return named


def _known_schema(predictions: Path, dataset: Dataset | None) -> LabelSchema | None:
    """The dataset's schema, or the one beside the predictions; the two may not contradict each other."""
    file = (predictions if predictions.is_dir() else predictions.parent) / SCHEMA_FILE
    beside = _read_schema(file) if file.is_file() else None
    if dataset is None:
        return beside
    labels = dataset.manifest.labels
    if beside and not beside.matches(labels):
        raise VolumeError(
            f"{file}: the predictions' labels are {_listed(beside)}, those of the manifest "
            f"'{dataset.manifest.name}' are {_listed(labels)}"
        )
    return labels


def _read_schema(file: Path) -> LabelSchema:
    try:
        return LabelSchema.model_validate_json(file.read_bytes())
    except OSError as error:
        raise VolumeError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        raise VolumeError(f"{file}: not a label schema: {key}: {first['msg']}") from error


def _listed(schema: LabelSchema) -> str:
    return ", ".join(f"{label.id} {label.name}" for label in schema.labels)


def _schema_of_found_ids(counted: Sequence[_CountedCase]) -> LabelSchema:
    values = [case.counts.values for case in counted]
    ids = {int(i) for counts in values for i in np.flatnonzero(counts.prediction + counts.reference) if i}
    if not ids:
        raise VolumeError("no label in any prediction or reference: there is nothing to score")
    return schema_from_names({i: f"label {i}" for i in ids})


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(names[:_MOST_NAMES]) or "none") + more


@dataclass(frozen=True)
class _Table:
    """Dice of all cases (N, L), NaN where there is none, and the number of each case's patient (N,).

    Columns are the labels, then the regions.
    """

    cases: tuple[CaseScores, ...]
    values: npt.NDArray[np.float64]
    patients: npt.NDArray[np.int64]

    @property
    def label_count(self) -> int:
        """Columns before the regions."""
        return len(self.cases[0].labels)

    @property
    def headline(self) -> slice:
        """The columns that the overall figures are of."""
        return slice(self.label_count if self.cases[0].regions else 0, None)


def _table(cases: Sequence[CaseScores]) -> _Table:
    ordered = tuple(sorted(cases, key=lambda case: case.case_id))
    ids = [case.case_id for case in ordered]
    if not ordered:
        raise ValueError("there is no case to sum up")
    if repeated := sorted({a for a, b in pairwise(ids) if a == b}):
        raise ValueError(f"cases that stand twice: {_some(repeated)}")
    if len({tuple(score.label for score in case.scores) for case in ordered}) > 1:
        raise ValueError("the cases were not scored with the same labels")
    values = [[np.nan if score.dice is None else score.dice for score in case.scores] for case in ordered]
    _, patients = np.unique([case.patient_id for case in ordered], return_inverse=True)
    return _Table(ordered, np.array(values, dtype=np.float64), patients.astype(np.int64))


def _label_summary(table: _Table, column: int, resampled: npt.NDArray[np.float64]) -> LabelSummary:
    values = table.values[:, column]
    scored = ~np.isnan(values)
    statuses = [case.scores[column].status for case in table.cases]
    return LabelSummary(
        label=table.cases[0].scores[column].label,
        n_scored=int(scored.sum()),
        n_absent=statuses.count("absent"),
        n_missed=statuses.count("missed"),
        n_false=statuses.count("false"),
        n_unannotated=statuses.count("unannotated"),
        interval_95=_interval(resampled, table.patients[scored]),
        worst=_worst(table.cases, values),
        folds=_fold_means(table, values[:, None]),
        **_spread(values[scored]),
    )


def _spread(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    names = ("minimum", "first_quartile", "median", "third_quartile", "maximum")
    if not values.size:
        return dict.fromkeys(("mean", "std", *names))
    quantiles = np.percentile(values, (0, 25, 50, 75, 100))
    std = float(values.std(ddof=1)) if values.size > 1 else None
    return {"mean": float(values.mean()), "std": std} | dict(zip(names, quantiles.tolist(), strict=True))


def _overall(table: _Table, resampled: npt.NDArray[np.float64]) -> Overall:
    values, resampled = table.values[:, table.headline], resampled[:, table.headline]
    scored = ~np.isnan(values)
    # NaN where a resample lacks a label: without that label it would be another figure.
    means = resampled[:, scored.any(axis=0)].mean(axis=1) if scored.any() else resampled[:, 0]
    return Overall(
        n_cases=len(table.cases),
        n_patients=int(table.patients.max()) + 1,
        mean=_mean_of_means(values),
        interval_95=_interval(means, table.patients[scored.any(axis=1)]),
        worst=_worst(table.cases, np.array([_mean(row) for row in values])),
        folds=_fold_means(table, values),
    )


def _mean(values: npt.NDArray[np.float64]) -> float:
    """NaN left out; NaN when there is nothing else."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _mean_of_means(values: npt.NDArray[np.float64]) -> float | None:
    mean = _mean(np.array([_mean(column) for column in values.T]))
    return None if np.isnan(mean) else mean


def _interval(resampled: npt.NDArray[np.float64], patients: npt.NDArray[np.int64]) -> Interval | None:
    return percentile_interval(resampled) if np.unique(patients).size > 1 else None


def _worst(cases: Sequence[CaseScores], values: npt.NDArray[np.float64]) -> tuple[CaseDice, ...]:
    """Lowest first; cases with the same value in the order of their ids."""
    order = [i for i in np.argsort(values, kind="stable") if not np.isnan(values[i])]
    return tuple(CaseDice(case_id=cases[i].case_id, dice=float(values[i])) for i in order[:WORST_CASES])


def _fold_means(table: _Table, values: npt.NDArray[np.float64]) -> tuple[FoldMean, ...]:
    folds = np.array([-1 if case.fold is None else case.fold for case in table.cases])
    return tuple(
        FoldMean(fold=int(fold), mean=_mean_of_means(values[folds == fold])) for fold in np.unique(folds) if fold >= 0
    )
