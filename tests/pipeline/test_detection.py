"""Lesions matched one to one: by hand, by trying every matching, and as panoptica does."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from pipeline.detection import Detection, components, detect
from tests.pipeline.metric_worlds import LABELS, maps

SHAPE = (20, 6, 6)
PEERS = json.loads(Path(__file__).with_name("peer_figures.json").read_text(encoding="utf-8"))["panoptica"]


def bars(*ranges: tuple[int, int]) -> np.ndarray:
    """Along the first axis, four voxels a layer: from the first number up to, not including, the second."""
    mask = np.zeros(SHAPE, dtype=bool)
    for start, stop in ranges:
        mask[start:stop, 2:4, 2:4] = True
    return mask


def test_found_missed_and_false() -> None:
    found = detect(bars((0, 4), (10, 12)), bars((2, 6), (15, 17)))
    assert found == Detection(prediction_count=2, reference_count=2, matched_count=1, dice_sum=2 * 8 / 32)
    assert (found.sensitivity, found.precision, found.f1) == (0.5, 0.5, 0.5)
    assert found.lesion_dice == pytest.approx(0.5 / 3)


def test_two_that_are_joined_are_one_found_and_one_missed() -> None:
    found = detect(bars((0, 9)), bars((0, 6), (7, 9)))
    assert (found.prediction_count, found.reference_count, found.matched_count) == (1, 2, 1)
    assert found.dice_sum == pytest.approx(2 * 6 / (9 + 6))


def test_the_best_sum_wins_over_the_best_pair() -> None:
    """The middle prediction overlaps both references; taking its better one would leave the other without any."""
    reference = bars((0, 6), (7, 12))
    prediction = bars((3, 9), (10, 11)) & ~bars((6, 7))
    prediction[6, 2, 2] = True
    found = detect(prediction, reference)
    assert (found.prediction_count, found.reference_count, found.matched_count) == (2, 2, 2)


def test_corners_hang_together() -> None:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    numbers, count = components(mask)
    assert count == 2
    assert numbers[0, 0, 0] == numbers[1, 1, 1] != numbers[3, 3, 3]


def test_an_overlap_must_exceed_the_least() -> None:
    """The union is 6 layers, 2 of them shared."""
    masks = bars((0, 4)), bars((2, 6))
    assert detect(*masks, least_iou=0.33).matched_count == 1
    assert detect(*masks, least_iou=1 / 3).matched_count == 0


def test_empty_sides() -> None:
    both = detect(bars(), bars())
    assert all(math.isnan(x) for x in (both.f1, both.lesion_dice, both.sensitivity, both.precision))
    missed, false = detect(bars(), bars((0, 2))), detect(bars((0, 2)), bars())
    assert (missed.f1, missed.lesion_dice, missed.sensitivity) == (0, 0, 0)
    assert math.isnan(missed.precision)
    assert (false.f1, false.lesion_dice, false.precision) == (0, 0, 0)
    assert math.isnan(false.sensitivity)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(20, 6, 6\) against a reference of \(6, 6\)"):
        detect(bars(), bars()[0])


@pytest.mark.parametrize("seed", range(12))
def test_as_every_matching_tried(seed: int) -> None:
    """Worlds of up to seven lesions a side, most of which touch several of the other side."""
    generator = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        mask = np.zeros((24, 3, 3), dtype=bool)
        for start in np.cumsum(generator.integers(2, 6, 6)):
            mask[start : start + generator.integers(1, 4), : generator.integers(1, 4)] = True
        sides.append(mask)
    (left, n), (right, m) = (components(mask) for mask in sides)
    iou = np.zeros((max(n, m), max(n, m)))
    dice = np.zeros_like(iou)
    for a in range(n):
        for b in range(m):
            one, other = left == a + 1, right == b + 1
            iou[a, b] = (one & other).sum() / (one | other).sum()
            dice[a, b] = 2 * (one & other).sum() / (one.sum() + other.sum())
    best = max(permutations(range(len(iou))), key=lambda order: iou[range(len(iou)), list(order)].sum())
    found = detect(*sides)
    pairs = [(a, b) for a, b in enumerate(best) if iou[a, b] > 0]
    assert found.matched_count == len(pairs)
    assert found.dice_sum == pytest.approx(sum(dice[a, b] for a, b in pairs))


@pytest.mark.parametrize("value", LABELS, ids=LABELS.values())
def test_as_panoptica(value: int) -> None:
    """MaxBipartiteMatching on intersections over unions. Its panoptic quality counts what is wrong by half."""
    prediction, reference = maps()
    found, peer = detect(prediction == value, reference == value), PEERS[str(value)]
    assert (found.prediction_count, found.reference_count, found.matched_count) == (
        peer["n_pred_instances"],
        peer["n_ref_instances"],
        peer["tp"],
    )
    assert found.f1 == pytest.approx(peer["rq"])
    assert 2 * found.dice_sum / (found.prediction_count + found.reference_count) == pytest.approx(peer["pq_dsc"])


def test_thousands_of_lesions() -> None:
    """Solved group by group; one table of them all would take gigabytes."""
    dots = np.zeros((60, 60, 60), dtype=bool)
    dots[::2, ::2, ::2] = True
    found = detect(dots, dots)
    assert (found.matched_count, found.f1, found.lesion_dice) == (27000, 1.0, 1.0)
