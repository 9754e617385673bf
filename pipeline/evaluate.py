"""Predictions against references: figures per case and label, and what they say together.

Voxels that the reference ignores are not counted at all; nor is a label that was not annotated in the case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.bad_cases import bad_cases, explain_case
from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError, GeometryMismatch, VolsegError, VolumeError
from pipeline.expectation import with_expected
from pipeline.manifest import Dataset
from pipeline.quality import read_quality
from pipeline.references import (
    SCHEMA_FILE,
    Reference,
    dataset_at,
    known_schema,
    match_by_name,
)
from pipeline.report_values import CaseExplanation, CaseFailure, CaseScores, LabelScore, Report
from pipeline.scores import CaseMeasures, label_scores, measure_ids, name_of_id, region_scores
from pipeline.summary import some, summarise
from transforms.labels import LabelSchema, schema_from_names
from transforms.volume import Volume, read_label

Progress = Callable[[int, int], None]
"""Called with the number of cases done and the number of all cases."""

MOST_NAMELESS = 255
"""Labels that a map may hold of which nobody says what they are."""

FEW_VALUES = 32
"""A map with no more values than this is taken for one of labels, however they lie."""

_MOST_THREADS = 4  # each holds a prediction and its reference


def score_case(
    prediction: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    schema: LabelSchema,
    *,
    spacing_mm: Sequence[float],
    settings: EvaluateConfig | None = None,
) -> tuple[LabelScore, ...]:
    """Score two label maps (I, J, K) of label ids, one score for each label of the schema.

    Raises:
        ValueError: the shapes differ, or a value is not in the schema.
    """
    measured = measure_ids(prediction, reference, schema, spacing_mm=spacing_mm, settings=settings or EvaluateConfig())
    return label_scores(measured, schema, annotated=schema.are_annotated(None))


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
    else made from the ids that occur; only then is an image among the label maps refused for what it is. Without a
    manifest each case counts as a patient of its own. One of several cases that cannot be scored is set aside in
    `Report.failures`. A reference without a prediction is refused unless `allow_missing`, because leaving out the
    hardest cases raises the mean. What the model expected is compared with what was found where it lies beside the
    predictions (`quality.read_quality`).

    Raises:
        VolumeError: a path that is not there, names that do not match, or no case that can be scored.
        GeometryMismatch: the only case has its prediction and its reference on different grids.
        ManifestError: the manifest cannot be used.
        RunError: what the model expected is damaged.
        ConfigError: the settings name a label that is none.
    """
    dataset = references if isinstance(references, Dataset) else dataset_at(references)
    found, wanted = match_by_name(predictions, dataset or references)
    schema, settings = schema or known_schema(predictions, dataset), settings or EvaluateConfig()
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    pairs = [(found[name], wanted[name]) for name in sorted(found.keys() & wanted.keys())]
    _check_names(predictions, pairs, missing, extra, allow_missing=allow_missing)
    if schema:
        require_labels(settings, schema)
    expected = read_quality(predictions) if predictions.is_dir() else None
    measured, failures = _measure_all(pairs, schema, settings, progress)
    if schema is None:
        schema = _schema_of_found_ids(measured)
        require_labels(settings, schema)
    report = summarise(
        [_case_scores(case, schema) for case in measured],
        settings=settings,
        failures=failures,
        missing_predictions=missing,
        extra_predictions=extra,
    )
    if expected is not None:
        report = with_expected(report, expected)
    return report.model_copy(update={"explanations": _explanations(report, pairs, schema)})


Pair = tuple[Path, Reference]


def _check_names(
    predictions: Path, pairs: Sequence[Pair], missing: Sequence[str], extra: Sequence[str], *, allow_missing: bool
) -> None:
    if not pairs:
        raise VolumeError(
            f"{predictions}: no prediction has the name of a reference: predictions {some(extra)}; "
            f"references {some(missing)}"
        )
    if missing and not allow_missing:
        others = f"; predictions without a reference: {some(extra)}" if extra else ""
        raise VolumeError(
            f"{predictions}: {len(missing)} of {len(missing) + len(pairs)} references have no prediction: "
            f"{some(missing)}{others}; add the predictions, or score the others alone with --allow-missing"
        )


def require_labels(settings: EvaluateConfig, schema: LabelSchema) -> None:
    """Refuse a tolerance or lesions of a name that fits no label: they would change nothing, silently.

    Raises:
        ConfigError: as said.
    """
    known = [*schema.names, *(region.name for region in schema.regions)]
    for place, names in (
        ("--tolerance / evaluate.tolerances_mm", settings.tolerances_mm or {}),
        ("--lesions / evaluate.lesions", settings.lesions),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"{place}: {some(unknown)} is no label; the labels are {some(known)}")


def require_nameless_labels(label_map: Volume, file: Path, *, advice: str) -> None:
    """Refuse an image where a label map is expected and no schema says which values are labels.

    Labels lie together: most neighbours of a labelled voxel have its value, and few neighbours of an image's voxel do.

    Raises:
        VolumeError: `file` holds more values than can be labels without a name, or they lie as those of an image do;
            `advice` says how to give names.
    """
    voxels = label_map.voxels
    if voxels.max(initial=0) <= FEW_VALUES:
        return
    count = int(np.count_nonzero(np.unique(voxels) > 0))
    if count > MOST_NAMELESS or (count > FEW_VALUES and _share_of_equal_neighbours(voxels) < 0.5):
        raise VolumeError(
            f"{file}: looks like an image: {count} different values above 0, expected a label map; "
            f"if they are labels, {advice}"
        )


def _share_of_equal_neighbours(voxels: npt.NDArray[Any]) -> float:
    """Of all pairs of voxels above 0 along the first axis; 1 where there are none."""
    before, after = voxels[:-1], voxels[1:]
    is_pair = (before > 0) & (after > 0)
    return float(np.mean(before[is_pair] == after[is_pair])) if is_pair.any() else 1.0


@dataclass(frozen=True)
class _MeasuredCase:
    """Figures by label id, perhaps before it is known which labels there are."""

    reference: Reference
    figures: CaseMeasures


def _measure_all(
    pairs: Sequence[Pair], schema: LabelSchema | None, settings: EvaluateConfig, progress: Progress | None
) -> tuple[list[_MeasuredCase], list[CaseFailure]]:
    """Read and measure in threads (decompressing frees the interpreter); the order is that of `pairs`."""
    measured: list[_MeasuredCase] = []
    errors: list[tuple[str, VolsegError]] = []
    measure = partial(_measure_case, schema=schema, settings=settings)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for done, outcome in enumerate(pool.map(measure, pairs), start=1):
            if isinstance(outcome, VolsegError):
                errors.append((pairs[done - 1][1].case_id, outcome))
            else:
                measured.append(outcome)
            if progress:
                progress(done, len(pairs))
    if len(errors) == len(pairs) == 1:
        raise errors[0][1]
    if not measured:
        raise VolumeError(f"none of the {len(pairs)} cases can be scored; the first: {errors[0][1]}")
    return measured, [CaseFailure(case_id=case_id, reason=str(error)) for case_id, error in errors]


def _measure_case(pair: Pair, schema: LabelSchema | None, settings: EvaluateConfig) -> _MeasuredCase | VolsegError:
    path, reference = pair
    try:
        predicted, expected = read_label(path), read_label(reference.path)
        if difference := predicted.geometry.difference(expected.geometry):
            raise GeometryMismatch(
                f"{path} and its reference {reference.path} lie on different grids: {difference}; "
                "bring both onto one grid first"
            )
        if schema is None:
            for label_map, file in ((predicted, path), (expected, reference.path)):
                require_nameless_labels(label_map, file, advice=f"name them in {SCHEMA_FILE} beside the predictions")
        try:
            ids = expected.voxels if reference.annotation is None else reference.annotation.ids(expected.voxels)
            spacing_mm = expected.geometry.spacing_mm
            figures = measure_ids(predicted.voxels, ids, schema, spacing_mm=spacing_mm, settings=settings)
        except ValueError as error:
            raise VolumeError(f"{path} against {reference.path}: {error}") from error
        return _MeasuredCase(reference, figures)
    except VolsegError as error:
        return error


def _explanations(report: Report, pairs: Sequence[Pair], schema: LabelSchema) -> tuple[CaseExplanation, ...]:
    """Bad cases are read once more: they are few."""
    of_case = {reference.case_id: (path, reference) for path, reference in pairs}
    found = ((case_id, _explained(of_case[case_id], schema)) for case_id in bad_cases(report.cases))
    return tuple(CaseExplanation(case_id=i, sentence=sentence) for i, sentence in found if sentence is not None)


def _explained(pair: Pair, schema: LabelSchema) -> str | None:
    path, reference = pair
    predicted, expected = read_label(path), read_label(reference.path)
    ids = expected.voxels if reference.annotation is None else reference.annotation.ids(expected.voxels)
    return explain_case(predicted, replace(expected, voxels=ids), schema)


def _case_scores(case: _MeasuredCase, schema: LabelSchema) -> CaseScores:
    annotation = case.reference.annotation
    annotated = schema.are_annotated(None if annotation is None else annotation.annotated)
    return CaseScores(
        case_id=case.reference.case_id,
        patient_id=case.reference.patient_id,
        fold=case.reference.fold,
        labels=label_scores(case.figures, schema, annotated=annotated),
        regions=region_scores(case.figures, schema, annotated=annotated),
    )


def _schema_of_found_ids(measured: Sequence[_MeasuredCase]) -> LabelSchema:
    ids = {i for case in measured for i in case.figures.labels}
    if not ids:
        raise VolumeError("no label in any prediction or reference: there is nothing to score")
    return schema_from_names({i: name_of_id(i) for i in sorted(ids)})
