"""Lesions found and missed: the connected components of two masks, matched one to one.

A component is what hangs together over faces, edges or corners of voxels (26 neighbours). Arrays in, numbers out.
NaN stands for "not defined", never for "bad".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import label
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NEIGHBOURS = np.ones((3, 3, 3), dtype=np.bool_)


@dataclass(frozen=True)
class Detection:
    """Lesions of both sides, how many pairs match, and the sum of the Dice of these pairs."""

    prediction_count: int
    reference_count: int
    matched_count: int
    dice_sum: float

    @property
    def sensitivity(self) -> float:
        """Part of the reference's lesions that has a match; NaN when it has no lesion."""
        return _ratio(self.matched_count, self.reference_count)

    @property
    def precision(self) -> float:
        """Part of the predicted lesions that has a match; NaN when none is predicted."""
        return _ratio(self.matched_count, self.prediction_count)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN) over lesions; 0 when one side has none, NaN when neither has.

        Source: Maier-Hein et al., Metrics reloaded, Nature Methods 21 (2024) 195-212.
        """
        return _ratio(2 * self.matched_count, self.prediction_count + self.reference_count)

    @property
    def lesion_dice(self) -> float:
        """Lesion-wise Dice: the sum of the Dice of matched lesions / (TP + FP + FN); 0 and NaN as for `f1`.

        Source: the lesion-wise Dice of BraTS 2023 (arXiv:2305.17033), without the dilation that merges near lesions
        there. Panoptic quality (Kirillov et al., CVPR 2019) has FP / 2 and FN / 2, so it is higher.
        """
        return _ratio(self.dice_sum, self.prediction_count + self.reference_count - self.matched_count)


def detect(prediction: Array, reference: Array, *, least_iou: float = 0.0) -> Detection:
    """Match the components of two masks (I, J, K) of the same shape; what is not 0 belongs to them.

    Of all ways to pair components one to one, the one of the largest sum of intersections over unions. Pairs that
    do not exceed `least_iou` cannot match: 0 asks for one voxel in common. Two lesions that a prediction joins are
    one found and one missed; one that it splits is found, with a false part.
    Source: as MaxBipartiteMatching of the package panoptica; the algorithm: Crouse, IEEE TAES 52 (2016) 1679-1696.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"a prediction of {prediction.shape} against a reference of {reference.shape}")
    found, found_count = components(prediction)
    expected, expected_count = components(reference)
    both = (found > 0) & (expected > 0)
    left, right = found[both].astype(np.int64) - 1, expected[both].astype(np.int64) - 1
    pairs, overlaps = np.unique(left * expected_count + right, return_counts=True)
    if not pairs.size:
        return Detection(found_count, expected_count, 0, 0.0)
    rows, columns = np.divmod(pairs, expected_count)
    sizes = np.bincount(found.reshape(-1))[1:][rows] + np.bincount(expected.reshape(-1))[1:][columns]
    iou = overlaps / (sizes - overlaps)
    possible = iou > least_iou
    chosen = np.flatnonzero(possible)[_best_pairs(rows[possible], columns[possible], iou[possible])]
    return Detection(found_count, expected_count, chosen.size, float((2.0 * overlaps / sizes)[chosen].sum()))


def components(mask: Array) -> tuple[npt.NDArray[np.int32], int]:
    """The number of each voxel's component, 0 outside, and how many there are."""
    numbers, count = label(mask, _NEIGHBOURS)
    return numbers, int(count)


def _best_pairs(rows: Counts, columns: Counts, gains: Floats) -> npt.NDArray[np.intp]:
    """Which of the pairs to take, so that no row or column stands twice and the gains (all positive) are greatest.

    Solved apart for each group of rows and columns that hang together: thousands of lesions are as many small tasks.
    """
    if rows.size < 2:
        return np.arange(rows.size)
    nodes = int(rows.max()) + 1 + int(columns.max()) + 1
    graph = coo_array((np.ones(rows.size), (rows, columns + int(rows.max()) + 1)), shape=(nodes, nodes))
    _, groups = connected_components(graph, directed=False)
    order = np.argsort(groups[rows], kind="stable")
    starts = np.flatnonzero(np.diff(groups[rows][order])) + 1
    return np.sort(np.concatenate([_best_of_group(part, rows, columns, gains) for part in np.split(order, starts)]))


def _best_of_group(pairs: npt.NDArray[np.intp], rows: Counts, columns: Counts, gains: Floats) -> npt.NDArray[np.intp]:
    if pairs.size == 1:
        return pairs
    some_rows, row = np.unique(rows[pairs], return_inverse=True)
    some_columns, column = np.unique(columns[pairs], return_inverse=True)
    table, number = np.zeros((some_rows.size, some_columns.size)), np.full((some_rows.size, some_columns.size), -1)
    table[row, column], number[row, column] = gains[pairs], pairs
    taken = number[linear_sum_assignment(table, maximize=True)]
    return np.asarray(taken[taken >= 0], dtype=np.intp)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
