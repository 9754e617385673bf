"""One prediction against one reference: what is counted, voxel by voxel, and what is not.

Neither a voxel that the reference ignores nor a label that was not annotated in the case says anything of a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.metrics import ConfusionCounts, confusion_counts, dice_from_counts, volume_mm3
from pipeline.report import LabelScore, Status
from transforms.labels import MAX_LABEL_ID, LabelSchema

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class CaseCounts:
    """Voxels of each value of two label maps, and of each region: (2,) each, outside and inside."""

    values: ConfusionCounts
    regions: tuple[ConfusionCounts, ...] = ()


def count_voxels(
    prediction: Array, reference: Array, *, value_count: int, regions: Sequence[Sequence[int]], ignored: int | None
) -> CaseCounts:
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
    return CaseCounts(values, tuple(confusion_counts(table[prediction], table[reference], 2) for table in inside))


def count_ids(prediction: Array, reference: Array, schema: LabelSchema | None) -> CaseCounts:
    """Count two label maps of label ids; None: whatever they are.

    Raises:
        ValueError: the shapes differ, or a value is no label id, or none of the schema's.
    """
    ignored = None if schema is None else schema.ignore
    highest = max(int(prediction.max(initial=0)), int(reference.max(initial=0)), *(schema.ids if schema else ()))
    if highest > MAX_LABEL_ID:
        raise ValueError(f"a label value of {highest} is no label id; these go up to {MAX_LABEL_ID}")
    regions = [] if schema is None else [[schema.labels[c - 1].id for c in union] for union in schema.region_classes]
    counts = count_voxels(prediction, reference, value_count=highest + 1, regions=regions, ignored=ignored)
    if schema is not None:
        _check_ids(counts.values, schema)
    return counts


def label_scores(
    counts: CaseCounts, schema: LabelSchema, voxel_volume_mm3: float, *, annotated: Sequence[bool]
) -> tuple[LabelScore, ...]:
    """A score for each label of the schema from counts by id; `annotated` is per class."""
    return tuple(
        _score(label.name, counts.values, label.id, voxel_volume_mm3, annotated=annotated[c])
        for c, label in enumerate(schema.labels, start=1)
    )


def region_scores(
    counts: CaseCounts, schema: LabelSchema, voxel_volume_mm3: float, *, annotated: Sequence[bool]
) -> tuple[LabelScore, ...]:
    """A score for each region of the schema; one is annotated where all of its labels are."""
    return tuple(
        _score(region.name, counted, 1, voxel_volume_mm3, annotated=all(annotated[c] for c in union))
        for region, union, counted in zip(schema.regions, schema.region_classes, counts.regions, strict=True)
    )


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
    labels = dice_from_counts(counts.values)[1 : schema.class_count]
    known = [*annotated[1:], *(all(annotated[c] for c in union) for union in schema.region_classes)]
    values = [*labels, *(dice_from_counts(region)[1] for region in counts.regions)]
    names = [*schema.names, *(region.name for region in schema.regions)]
    return {n: float(v) if is_known else float("nan") for n, v, is_known in zip(names, values, known, strict=True)}


def _membership(values: Sequence[int], value_count: int) -> npt.NDArray[np.uint8]:
    table = np.zeros(value_count, dtype=np.uint8)
    table[list(values)] = 1
    return table


def _check_ids(counts: ConfusionCounts, schema: LabelSchema) -> None:
    for side, sizes in (("prediction", counts.prediction), ("reference", counts.reference)):
        if unknown := schema.unknown_ids(np.flatnonzero(sizes)):
            raise ValueError(f"the {side} holds label values {unknown}, the schema knows {list(schema.ids)}")


def _score(name: str, counts: ConfusionCounts, value: int, voxel_volume_mm3: float, *, annotated: bool) -> LabelScore:
    # A label beyond the highest value that occurs is on neither side.
    overlap, predicted, expected = (
        int(x[value]) if value < x.size else 0 for x in (counts.overlap, counts.prediction, counts.reference)
    )
    status = _status(predicted, expected) if annotated else "unannotated"
    return LabelScore(
        label=name,
        status=status,
        dice=None if status in ("absent", "unannotated") else 2.0 * overlap / (predicted + expected),
        prediction_mm3=volume_mm3(predicted, voxel_volume_mm3),
        reference_mm3=volume_mm3(expected, voxel_volume_mm3) if annotated else None,
    )


def _status(predicted: int, expected: int) -> Status:
    if predicted and expected:
        return "scored"
    if expected:
        return "missed"
    return "false" if predicted else "absent"
