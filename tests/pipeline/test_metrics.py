"""Metrics against hand-worked worlds, MONAI, scikit-learn and brute force; intervals against known coverage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_dice
from sklearn.metrics import confusion_matrix

from pipeline.metrics import (
    confusion_counts,
    dice,
    dice_from_counts,
    percentile_interval,
    resampled_means,
)

CLASS_COUNT = 4


def label_maps() -> st.SearchStrategy[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    shapes = hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)
    return shapes.flatmap(
        lambda shape: st.tuples(
            *[hnp.arrays(np.uint8, shape, elements=st.integers(0, CLASS_COUNT - 1)) for _ in range(2)]
        )
    )


def box(start: int, stop: int) -> np.ndarray[Any, Any]:
    """A 10x4x4 world with layers start to stop of the first axis set: 16 voxels a layer."""
    mask = np.zeros((10, 4, 4), dtype=bool)
    mask[start:stop] = True
    return mask


class TestDice:
    @pytest.mark.parametrize(
        ("prediction", "reference", "expected"),
        [
            (box(0, 4), box(0, 4), 1.0),
            (box(0, 4), box(2, 6), 2 * 32 / (64 + 64)),
            (box(0, 1), box(0, 3), 2 * 16 / (16 + 48)),
            (box(0, 4), box(4, 8), 0.0),
            (box(0, 0), box(0, 4), 0.0),
            (box(0, 4), box(0, 0), 0.0),
        ],
    )
    def test_boxes(self, prediction: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], expected: float) -> None:
        assert dice(prediction, reference) == pytest.approx(expected, abs=1e-15)

    def test_both_empty_is_not_defined(self) -> None:
        assert math.isnan(dice(box(0, 0), box(0, 0)))

    def test_anything_but_zero_belongs_to_a_mask(self) -> None:
        assert dice(box(0, 4).astype(np.int16) * 7, box(0, 4).astype(np.float32)) == 1.0

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match=r"\(10, 4, 4\) against a reference of \(4, 4\)"):
            dice(box(0, 4), box(0, 4)[0])


class TestConfusionCounts:
    @given(label_maps())
    def test_is_scikit_learns_confusion_matrix(self, maps: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> None:
        prediction, reference = maps
        matrix = confusion_matrix(reference.ravel(), prediction.ravel(), labels=range(CLASS_COUNT))
        counts = confusion_counts(prediction, reference, CLASS_COUNT)
        np.testing.assert_array_equal(counts.overlap, matrix.diagonal())
        np.testing.assert_array_equal(counts.prediction, matrix.sum(axis=0))
        np.testing.assert_array_equal(counts.reference, matrix.sum(axis=1))

    @given(label_maps())
    def test_dice_of_all_classes_is_monais_and_that_of_each_mask(
        self, maps: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    ) -> None:
        prediction, reference = maps
        found = dice_from_counts(confusion_counts(prediction, reference, CLASS_COUNT))
        masks = [dice(prediction == c, reference == c) for c in range(CLASS_COUNT)]
        np.testing.assert_allclose(found, masks, rtol=1e-15)
        one_hot = [torch.stack([torch.from_numpy(m == c) for c in range(CLASS_COUNT)])[None].float() for m in maps]
        oracle = compute_dice(*one_hot, ignore_empty=False)[0].numpy()
        # MONAI calls an absent class perfect when told not to ignore it; here it is not defined.
        absent = [not (prediction == c).any() and not (reference == c).any() for c in range(CLASS_COUNT)]
        np.testing.assert_array_equal(np.isnan(found), absent)
        np.testing.assert_allclose(found[~np.isnan(found)], oracle[~np.isnan(found)], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.int64, np.uint64])
    def test_every_integer_type(self, dtype: type) -> None:
        counts = confusion_counts(box(0, 4).astype(dtype), box(2, 6).astype(dtype), 2)
        assert (counts.overlap.tolist(), counts.prediction.tolist(), counts.reference.tolist()) == (
            [160 - 96, 32],
            [96, 64],
            [96, 64],
        )

    def test_more_voxels_than_a_block_in_any_memory_order(self) -> None:
        generator = np.random.default_rng(0)
        prediction = generator.integers(0, CLASS_COUNT, (130, 110, 90), dtype=np.uint8)
        reference = generator.integers(0, CLASS_COUNT, (130, 110, 90), dtype=np.uint8)
        expected = [((prediction == c) & (reference == c)).sum() for c in range(CLASS_COUNT)]
        fortran = np.asfortranarray(prediction), np.asfortranarray(reference)
        for maps in ((prediction, reference), fortran, (prediction, fortran[1])):
            assert confusion_counts(*maps, CLASS_COUNT).overlap.tolist() == expected

    @pytest.mark.parametrize("value", [-1, CLASS_COUNT])
    def test_a_value_that_is_no_class_is_refused(self, value: int) -> None:
        label_map = np.zeros((2, 2, 2), dtype=np.int16)
        label_map[0, 0, 0] = value
        for maps in ((label_map, label_map * 0), (label_map * 0, label_map)):
            with pytest.raises(ValueError, match=f"holds 0 to 3, found .*{value}"):
                confusion_counts(*maps, CLASS_COUNT)

    def test_fractions_are_refused(self) -> None:
        with pytest.raises(ValueError, match="holds integers, found float64"):
            confusion_counts(np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), 2)

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match="against a reference"):
            confusion_counts(np.zeros((2, 3, 4), np.uint8), np.zeros((4, 3, 2), np.uint8), 2)


class TestResampledMeans:
    def test_is_the_loop_that_it_stands_for(self) -> None:
        generator = np.random.default_rng(3)
        patients = np.array([0, 0, 1, 2, 2, 2, 3])
        values = generator.random((7, 2))
        values[[1, 5], 1] = np.nan
        found = resampled_means(values, patients, samples=50, generator=np.random.default_rng(1))
        draws = np.random.default_rng(1).multinomial(4, [0.25] * 4, size=50)
        for row, times in zip(found, draws, strict=True):
            cases = [
                i for patient in range(4) for _ in range(times[patient]) for i in np.flatnonzero(patients == patient)
            ]
            for column in range(2):
                drawn = [values[i, column] for i in cases if not np.isnan(values[i, column])]
                assert row[column] == pytest.approx(sum(drawn) / len(drawn), rel=1e-12)

    def test_a_column_that_a_resample_lacks_is_not_defined(self) -> None:
        values = np.array([[0.5, 0.25], [0.5, np.nan]])
        found = resampled_means(values, np.array([0, 1]), samples=200, generator=np.random.default_rng(0))
        missing = np.isnan(found[:, 1])
        # Both draws are patient 1 with probability 1/4.
        assert 0.15 < missing.mean() < 0.35
        np.testing.assert_array_equal(found[~missing, 1], 0.25)
        np.testing.assert_array_equal(found[:, 0], 0.5)

    def test_spread_is_that_of_the_mean_of_patients(self) -> None:
        """With one case a patient, the variance of the bootstrap mean is the population variance over n."""
        values = np.random.default_rng(0).normal(size=(40, 1))
        found = resampled_means(values, np.arange(40), samples=40_000, generator=np.random.default_rng(5))
        assert found.std() == pytest.approx(values.std() / math.sqrt(40), rel=0.02)
        assert found.mean() == pytest.approx(values.mean(), abs=0.004)

    def test_copies_of_a_case_add_no_evidence(self) -> None:
        """Ten cases of a patient that are all alike: resampling cases would give a third of the width."""
        values = np.random.default_rng(0).normal(size=20)
        once, tenfold = (
            resampled_means(
                np.repeat(values, times)[:, None],
                np.repeat(np.arange(20), times),
                samples=4000,
                generator=np.random.default_rng(2),
            )
            for times in (1, 10)
        )
        np.testing.assert_allclose(once, tenfold, rtol=1e-9, atol=1e-12)


class TestPercentileInterval:
    def test_of_the_whole_numbers(self) -> None:
        assert percentile_interval(np.arange(1001.0)[::-1]) == (25.0, 975.0)

    def test_resamples_without_the_figure_are_left_out(self) -> None:
        resampled = np.r_[np.arange(1001.0), np.full(1001, np.nan)]
        assert percentile_interval(resampled) == (25.0, 975.0)

    def test_none_when_most_resamples_lack_it(self) -> None:
        assert percentile_interval(np.r_[np.arange(1001.0), np.full(1002, np.nan)]) is None
        assert percentile_interval(np.array([])) is None

    @pytest.mark.parametrize("cases_of_a_patient", [1, 4])
    def test_covers_the_truth_about_95_times_in_100(self, cases_of_a_patient: int) -> None:
        """Patients of mean 0 with a spread of 1, their cases close to each other; 40 patients, 600 studies."""
        generator = np.random.default_rng(11)
        patients = np.repeat(np.arange(40), cases_of_a_patient)
        covered = 0
        for _ in range(600):
            values = generator.normal(size=40)[patients] + 0.2 * generator.normal(size=patients.size)
            means = resampled_means(values[:, None], patients, samples=400, generator=generator)
            low, high = percentile_interval(means[:, 0]) or (1.0, -1.0)
            covered += low <= 0.0 <= high
        # Expected a little below 0.95 (n - 1 against n); three standard errors of 600 studies are 0.03.
        assert 0.90 <= covered / 600 <= 0.97
