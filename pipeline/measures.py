"""All figures of all structures of one case from its two label maps, in one go.

What it costs grows with the boxes that the structures lie in, not with the volume: each is cut out of both maps, and
from then on everything about it is found there. Arrays in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.detection import Detection, detect
from pipeline.label_boxes import Box, boxes_of_values, held_box, joined
from pipeline.surfaces import surface_distances

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Structure:
    """What is measured as one: the voxels of any of these values, and the tolerance of its surface Dice."""

    values: tuple[int, ...]
    tolerance_mm: float


@dataclass(frozen=True)
class Measures:
    """How one structure of a prediction agrees with the reference. NaN: not defined, never "bad".

    | figure | both empty | one empty |
    |---|---|---|
    | dice, surface_dice, lesions.f1, lesions.lesion_dice | NaN | 0 |
    | sensitivity | NaN | 0, NaN where it is the reference that is empty |
    | precision | NaN | 0, NaN where it is the prediction that is empty |
    | hausdorff_mm, hausdorff_95_mm, average_distance_mm | NaN | NaN: there is no surface to be far from |
    | volumes and their difference | 0 | as they are |
    """

    overlap_voxels: int
    prediction_voxels: int
    reference_voxels: int
    voxel_volume_mm3: float
    tolerance_mm: float
    surface_dice: float
    hausdorff_mm: float
    hausdorff_95_mm: float
    average_distance_mm: float
    lesions: Detection

    @property
    def dice(self) -> float:
        """2 |A and B| / (|A| + |B|). Source: Dice, Ecology 26 (1945) 297-302."""
        return _ratio(2 * self.overlap_voxels, self.prediction_voxels + self.reference_voxels)

    @property
    def sensitivity(self) -> float:
        """Part of the reference's voxels that was found, TP / (TP + FN); also called recall."""
        return _ratio(self.overlap_voxels, self.reference_voxels)

    @property
    def precision(self) -> float:
        """Part of the predicted voxels that is right, TP / (TP + FP); also called positive predictive value."""
        return _ratio(self.overlap_voxels, self.prediction_voxels)

    @property
    def prediction_mm3(self) -> float:
        """Volume of the prediction."""
        return self.prediction_voxels * self.voxel_volume_mm3

    @property
    def reference_mm3(self) -> float:
        """Volume of the reference."""
        return self.reference_voxels * self.voxel_volume_mm3

    @property
    def volume_difference_mm3(self) -> float:
        """Predicted volume less that of the reference: positive where too much was found."""
        return (self.prediction_voxels - self.reference_voxels) * self.voxel_volume_mm3


def measure_case(
    prediction: Array,
    reference: Array,
    *,
    spacing_mm: Sequence[float],
    structures: Sequence[Structure],
    ignored: int | None = None,
) -> tuple[Measures, ...]:
    """Measure each structure in two label maps (I, J, K) of values from 0 on one grid.

    Values of no structure are background. Voxels where the reference is `ignored` are background on both sides, so
    that a structure that reaches into them ends there in both maps. A structure that touches the border of the volume
    ends there. The order of the axes in memory changes the time, not the figures.

    Raises:
        ValueError: the shapes differ or are not three axes, a value is no integer from 0, or a spacing not positive.
    """
    _check(prediction, reference, spacing_mm)
    if prediction.flags.f_contiguous and reference.flags.f_contiguous:
        prediction, reference, spacing_mm = prediction.T, reference.T, tuple(spacing_mm)[::-1]
    held = [box for box in (held_box(prediction), held_box(reference)) if box is not None]
    whole = joined(held) if held else (slice(0, 0),) * 3
    maps = [np.ascontiguousarray(label_map[whole]) for label_map in (prediction, reference)]
    if ignored is not None:
        counted = maps[1] != ignored
        maps = [label_map * counted for label_map in maps]
    values = sorted({value for structure in structures for value in structure.values})
    boxes = [boxes_of_values(label_map, values) for label_map in maps]
    return tuple(_measure(maps, boxes, structure, spacing_mm) for structure in structures)


def _measure(
    maps: Sequence[Array], boxes: Sequence[dict[int, Box]], structure: Structure, spacing_mm: Sequence[float]
) -> Measures:
    held = [side[value] for side in boxes for value in structure.values if value in side]
    box = joined(held) if held else (slice(0, 0),) * 3
    found, expected = (_mask(label_map[box], structure.values) for label_map in maps)
    surfaces = surface_distances(found, expected, spacing_mm)
    return Measures(
        overlap_voxels=int(np.count_nonzero(found & expected)),
        prediction_voxels=int(np.count_nonzero(found)),
        reference_voxels=int(np.count_nonzero(expected)),
        voxel_volume_mm3=float(np.prod([float(s) for s in spacing_mm])),
        tolerance_mm=structure.tolerance_mm,
        surface_dice=surfaces.surface_dice(structure.tolerance_mm),
        hausdorff_mm=surfaces.hausdorff_mm(),
        hausdorff_95_mm=surfaces.hausdorff_mm(95),
        average_distance_mm=surfaces.average_mm(),
        lesions=detect(found, expected),
    )


def _mask(label_map: Array, values: Sequence[int]) -> Mask:
    if len(values) == 1:
        return np.asarray(label_map == values[0])
    return np.isin(label_map, values)


def _check(prediction: Array, reference: Array, spacing_mm: Sequence[float]) -> None:
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(f"two label maps (I, J, K) are compared, found {prediction.shape} and {reference.shape}")
    for label_map in (prediction, reference):
        if label_map.dtype.kind not in "biu":
            raise ValueError(f"a label map holds integers, found {label_map.dtype}")
        if label_map.dtype.kind == "i" and label_map.min(initial=0) < 0:
            raise ValueError(f"a label map holds values from 0, found {label_map.min()}")
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"a spacing is three positive numbers, found {tuple(spacing_mm)}")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
