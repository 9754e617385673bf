"""Calibration worked out by hand, and of worlds that are calibrated by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.calibration import reliability


def of_confidences(confidences: list[float], right: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Two classes; class 1 is the likely one everywhere."""
    likely = np.array(confidences).reshape(-1, 1, 1)
    return np.stack([1 - likely, likely]), np.array(right, dtype=int).reshape(-1, 1, 1)


def test_by_hand() -> None:
    """Two bins hold something: 0.55 and 0.58 with one right of two, 0.95 three times with all right."""
    probabilities, classes = of_confidences([0.55, 0.58, 0.95, 0.95, 0.95], [True, False, True, True, True])
    found = reliability(probabilities, classes, bin_count=10)
    assert found.voxels.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert found.confidence[[5, 9]] == pytest.approx([0.565, 0.95])
    assert found.accuracy[[5, 9]].tolist() == [0.5, 1.0]
    assert np.isnan(found.confidence[0])
    assert found.expected_error == pytest.approx((2 * 0.065 + 3 * 0.05) / 5)


def test_ends_of_bins_belong_to_the_lower_one() -> None:
    probabilities, classes = of_confidences([0.5, 0.75, 1.0], [True] * 3)
    assert reliability(probabilities, classes, bin_count=4).voxels.tolist() == [0, 1, 1, 1]


def test_only_what_is_counted() -> None:
    probabilities, classes = of_confidences([0.9, 0.9, 0.6], [True, True, False])
    counted = np.array([True, True, False]).reshape(3, 1, 1)
    assert reliability(probabilities, classes, counted=counted).expected_error == pytest.approx(0.1)
    nothing = reliability(probabilities, classes, counted=np.zeros((3, 1, 1), bool))
    assert nothing.voxels.sum() == 0
    assert math.isnan(nothing.expected_error)


@pytest.mark.parametrize("sharpening", [1.0, 3.0])
def test_classes_drawn_from_the_probabilities_are_calibrated(sharpening: float) -> None:
    """More voxels than a block. Probabilities made sharper than the truth are overconfident."""
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([1.0, 1.0, 1.0], size=1_200_000).T
    drawn = (generator.random(1_200_000) > np.cumsum(probabilities, axis=0)).sum(axis=0)
    told = probabilities**sharpening / (probabilities**sharpening).sum(axis=0)
    error = reliability(told.reshape(3, 1200, 1000, 1), drawn.reshape(1200, 1000, 1)).expected_error
    assert error < 0.003 if sharpening == 1 else error > 0.1


def test_grids_must_agree() -> None:
    with pytest.raises(ValueError, match=r"found \(2, 3, 1, 1\) and \(2, 1, 1\)"):
        reliability(np.zeros((2, 3, 1, 1)), np.zeros((2, 1, 1), int))
    with pytest.raises(ValueError, match=r"counted \(1, 1, 1\)"):
        reliability(np.zeros((2, 3, 1, 1)), np.zeros((3, 1, 1), int), counted=np.zeros((1, 1, 1)))
