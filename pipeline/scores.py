"""One prediction against one reference: what is counted, voxel by voxel, and what is not.

Neither a voxel that the reference ignores nor a label that was not annotated in the case says anything of a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import EvaluateConfig
from pipeline.measures import Measures, Structure, measure_case
from pipeline.metrics import ConfusionCounts, confusion_counts, dice_from_counts
from pipeline.report_values import LabelScore, Status
from transforms.labels import MAX_LABEL_ID, LabelSchema

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class CaseMeasures:
    """Of each label id that was looked for, and of each region."""

    labels: Mapping[int, Measures] = field(default_factory=dict)
    regions: tuple[Measures, ...] = ()


def measure_ids(
    prediction: Array,
    reference: Array,
    schema: LabelSchema | None,
    *,
    spacing_mm: Sequence[float],
    settings: EvaluateConfig,
) -> CaseMeasures:
    """Measure two label maps (I, J, K) of label ids; without a schema those ids that occur, as `name_of_id` calls them.

    Raises:
        ValueError: the shapes differ, or a value is no label id, or none of the schema's.
    """
    _check_ids(prediction, reference, schema)
    names = {label.id: label.name for label in schema.labels} if schema else None
    if names is None:
        names = {i: name_of_id(i) for i in _ids_in(prediction) | _ids_in(reference)}
    labels = [Structure((i,), _tolerance_mm(name, settings)) for i, name in names.items()]
    regions = _regions(schema, settings) if schema else []
    ignored = None if schema is None else schema.ignore
    measured = measure_case(
        prediction, reference, spacing_mm=spacing_mm, structures=[*labels, *regions], ignored=ignored
    )
    return CaseMeasures(dict(zip(names, measured, strict=False)), measured[len(labels) :])


def name_of_id(label_id: int) -> str:
    """What a label is called of which only the id is known."""
    return f"label {label_id}"


def label_scores(measured: CaseMeasures, schema: LabelSchema, *, annotated: Sequence[bool]) -> tuple[LabelScore, ...]:
    """A score for each label of the schema; `annotated` is per class."""
    return tuple(
        _score(label.name, measured.labels.get(label.id), is_annotated=annotated[c])
        for c, label in enumerate(schema.labels, start=1)
    )


def region_scores(measured: CaseMeasures, schema: LabelSchema, *, annotated: Sequence[bool]) -> tuple[LabelScore, ...]:
    """A score for each region of the schema; one is annotated where all of its labels are."""
    return tuple(
        _score(region.name, found, is_annotated=all(annotated[c] for c in union))
        for region, union, found in zip(schema.regions, schema.region_classes, measured.regions, strict=True)
    )


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Voxels of each class of two class maps, and of each region: (2,) each, outside and inside."""

    classes: ConfusionCounts
    regions: tuple[ConfusionCounts, ...] = ()


def count_voxels(
    prediction: Array, reference: Array, *, value_count: int, regions: Sequence[Sequence[int]], ignored: int | None
) -> ClassCounts:
    """Count two maps of values below `value_count`; `regions` are sets of values.

    Voxels where the reference is `ignored` are left out, on both sides.

    Raises:
        ValueError: the shapes differ, or a value is not in range.
    """
    if ignored is not None and prediction.shape == reference.shape:
        counted = reference != ignored
        prediction, reference = prediction[counted], reference[counted]
    values = confusion_counts(prediction, reference, value_count)
    inside = [_membership(region, value_count) for region in regions]
    return ClassCounts(values, tuple(confusion_counts(table[prediction], table[reference], 2) for table in inside))


def dice_of_classes(
    prediction: Array, reference: Array, schema: LabelSchema, *, annotated: Sequence[bool]
) -> dict[str, float]:
    """Dice of each label, then of each region, of two class maps; NaN where absent on both sides or not annotated."""
    counts = count_voxels(
        prediction,
        reference,
        value_count=schema.class_count + (schema.ignored_class is not None),
        regions=schema.region_classes,
        ignored=schema.ignored_class,
    )
    labels = dice_from_counts(counts.classes)[1 : schema.class_count]
    known = [*annotated[1:], *(all(annotated[c] for c in union) for union in schema.region_classes)]
    values = [*labels, *(dice_from_counts(region)[1] for region in counts.regions)]
    names = [*schema.names, *(region.name for region in schema.regions)]
    return {n: float(v) if is_known else float("nan") for n, v, is_known in zip(names, values, known, strict=True)}


def _membership(values: Sequence[int], value_count: int) -> npt.NDArray[np.uint8]:
    table = np.zeros(value_count, dtype=np.uint8)
    table[list(values)] = 1
    return table


def _tolerance_mm(name: str, settings: EvaluateConfig) -> float:
    return (settings.tolerances_mm or {}).get(name, settings.tolerance_mm)


def _regions(schema: LabelSchema, settings: EvaluateConfig) -> list[Structure]:
    return [
        Structure(tuple(schema.labels[c - 1].id for c in union), _tolerance_mm(region.name, settings))
        for region, union in zip(schema.regions, schema.region_classes, strict=True)
    ]


def _check_ids(prediction: Array, reference: Array, schema: LabelSchema | None) -> None:
    for side, label_map in (("prediction", prediction), ("reference", reference)):
        highest, lowest = int(label_map.max(initial=0)), int(label_map.min(initial=0))
        if not 0 <= lowest <= highest <= MAX_LABEL_ID:
            wrong = highest if highest > MAX_LABEL_ID else lowest
            raise ValueError(f"a label value of {wrong} is no label id; these go up to {MAX_LABEL_ID}")
        if schema is None:
            continue
        known = [*schema.ids, *([schema.ignore] if schema.ignore and side == "reference" else [])]
        is_known = _membership([0, *(i for i in known if i <= highest)], highest + 1).astype(np.bool_)
        if not (known_voxels := np.take(is_known, label_map)).all():
            unknown = np.unique(label_map[~known_voxels]).tolist()
            raise ValueError(f"the {side} holds label values {unknown}, the schema knows {list(schema.ids)}")


def _ids_in(label_map: Array) -> set[int]:
    occurs = np.zeros(int(label_map.max(initial=0)) + 1, dtype=np.bool_)
    occurs[label_map.reshape(-1)] = True
    return set(np.flatnonzero(occurs).tolist()) - {0}


def _score(name: str, found: Measures | None, *, is_annotated: bool) -> LabelScore:
    """`found` is None where neither side holds the label."""
    predicted = found.prediction_mm3 if found else 0.0
    if not is_annotated:
        return LabelScore(label=name, status="unannotated", dice=None, prediction_mm3=predicted, reference_mm3=None)
    if found is None or not (found.prediction_voxels or found.reference_voxels):
        return LabelScore(label=name, status="absent", dice=None, prediction_mm3=0.0, reference_mm3=0.0)
    lesions = found.lesions
    return LabelScore(
        label=name,
        status=_status(found),
        dice=_defined(found.dice),
        prediction_mm3=predicted,
        reference_mm3=found.reference_mm3,
        volume_difference_mm3=found.volume_difference_mm3,
        sensitivity=_defined(found.sensitivity),
        precision=_defined(found.precision),
        tolerance_mm=found.tolerance_mm,
        surface_dice=_defined(found.surface_dice),
        hausdorff_95_mm=_defined(found.hausdorff_95_mm),
        hausdorff_mm=_defined(found.hausdorff_mm),
        average_distance_mm=_defined(found.average_distance_mm),
        lesions_predicted=lesions.prediction_count,
        lesions_expected=lesions.reference_count,
        lesions_matched=lesions.matched_count,
        lesion_f1=_defined(lesions.f1),
        lesion_dice=_defined(lesions.lesion_dice),
    )


def _status(found: Measures) -> Status:
    if found.prediction_voxels and found.reference_voxels:
        return "scored"
    return "missed" if found.reference_voxels else "false"


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value
