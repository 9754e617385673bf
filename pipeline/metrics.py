"""Agreement of two label maps as numbers, and how far a mean of such numbers can be trusted.

Arrays in, numbers out: no files, no label names, no torch. A label map holds class numbers or label ids of
any integer type, 0 is background. NaN stands for "not defined", never for "bad".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_BLOCK_VOXELS = 1 << 20
"""bincount works on 8 bytes a voxel, so it is given a block at a time."""

_LEAST_DEFINED = 0.5
"""Part of the resamples in which a figure must be defined for its interval to mean something."""


@dataclass(frozen=True, eq=False)
class ConfusionCounts:
    """Voxels of each class, each (class_count,): in both maps at once, the prediction, the reference."""

    overlap: Counts
    prediction: Counts
    reference: Counts


def dice(prediction: Array, reference: Array) -> float:
    """Dice coefficient 2 |A and B| / (|A| + |B|) of two masks of the same shape; what is not 0 belongs to it.

    0 when one of the two is empty. NaN when both are: the structure is absent, and there is nothing to score.
    Source: Dice, Ecology 26 (1945) 297-302.

    Raises:
        ValueError: the shapes differ.
    """
    inside, expected = np.asarray(prediction) != 0, np.asarray(reference) != 0
    _check_shapes(inside, expected)
    voxels = np.count_nonzero(inside) + np.count_nonzero(expected)
    return 2.0 * np.count_nonzero(inside & expected) / voxels if voxels else float("nan")


def confusion_counts(prediction: Array, reference: Array, class_count: int) -> ConfusionCounts:
    """What all overlap metrics of all classes need, from one pass over two label maps of the same shape.

    Raises:
        ValueError: the shapes differ, or a value is not an integer from 0 to class_count - 1.
    """
    _check_shapes(prediction, reference)
    if prediction.flags.f_contiguous and reference.flags.f_contiguous:
        prediction, reference = prediction.T, reference.T
    flat, flat_reference = _class_values(prediction, class_count), _class_values(reference, class_count)
    counts = np.zeros((3, class_count), dtype=np.int64)
    for start in range(0, flat.size, _BLOCK_VOXELS):
        block = slice(start, start + _BLOCK_VOXELS)
        counts += _block_counts(flat[block], flat_reference[block], class_count)
    return ConfusionCounts(overlap=counts[0], prediction=counts[1], reference=counts[2])


def dice_from_counts(counts: ConfusionCounts) -> Floats:
    """(class_count,) Dice coefficients, each as `dice` gives it for the class's masks; NaN where absent."""
    overlap = counts.overlap.astype(np.float64)
    return _ratio(2.0 * overlap, (counts.prediction + counts.reference).astype(np.float64))


def resampled_means(
    values: Floats, patients: npt.NDArray[np.int64], *, samples: int, generator: np.random.Generator
) -> Floats:
    """Bootstrap over patients of column means: (samples, L) from `values` (N, L), a row a case, NaN apart.

    `patients` (N,) numbers each case's patient, 0 to P - 1. A resample draws P patients with replacement,
    each with all of its cases, so that cases of one patient, which are alike, do not count as independent.
    All columns share the draws. NaN where a resample holds no value of a column.
    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8 (clusters).
    """
    patient_count = int(patients.max()) + 1
    sums, counts = (np.zeros((patient_count, values.shape[1])) for _ in range(2))
    np.add.at(sums, patients, np.nan_to_num(values, nan=0.0))
    np.add.at(counts, patients, ~np.isnan(values))
    draws = generator.multinomial(patient_count, np.full(patient_count, 1 / patient_count), size=samples)
    weights = draws.astype(np.float64)
    return _ratio(weights @ sums, weights @ counts)


def percentile_interval(resampled: Floats) -> tuple[float, float] | None:
    """95 % interval of a figure from its (samples,) resampled values, by the percentile method.

    Its ends are the 2.5th and 97.5th percentiles, interpolated linearly. Resamples in which the figure is not
    defined (NaN) are left out; None when they are more than half, as the rest is no picture of the whole.
    Too narrow for a handful of patients: a bootstrap cannot see more spread than the sample has.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    defined = resampled[~np.isnan(resampled)]
    if not defined.size or defined.size < _LEAST_DEFINED * resampled.size:
        return None
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def _ratio(part: Floats, whole: Floats) -> Floats:
    """NaN where the whole is 0."""
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


def _block_counts(prediction: Array, reference: Array, class_count: int) -> Counts:
    """(3, class_count): overlap, prediction, reference. Most voxels, background on both sides, go first."""
    kept = (prediction != 0) | (reference != 0)
    left, right = prediction[kept].astype(np.intp), reference[kept].astype(np.intp)
    parts = (left[left == right], left, right)
    counts = np.stack([np.bincount(part, minlength=class_count) for part in parts])
    counts[:, 0] += kept.size - left.size
    return counts


def _class_values(label_map: Array, class_count: int) -> Array:
    if not (np.issubdtype(label_map.dtype, np.integer) or label_map.dtype == np.bool_):
        raise ValueError(f"a label map holds integers, found {label_map.dtype}")
    if label_map.size and not 0 <= int(label_map.min()) <= int(label_map.max()) < class_count:
        raise ValueError(
            f"a label map of {class_count} classes holds 0 to {class_count - 1}, "
            f"found {label_map.min()} to {label_map.max()}"
        )
    return label_map.reshape(-1)


def _check_shapes(prediction: Array, reference: Array) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"a prediction of {prediction.shape} against a reference of {reference.shape}")
