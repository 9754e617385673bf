"""A good segmentation, spoilt as headers and label tables spoil them: each fault is found and told; bad models are not
excused."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.evaluate import evaluate_files
from pipeline.header_faults import Explanation, explain
from pipeline.report_values import Report
from transforms.labels import schema_from_names

from .test_evaluate import write_label

Array = npt.NDArray[Any]
NAMES = {1: "kidney right", 2: "kidney left", 3: "liver"}


def patient(shape: tuple[int, int, int] = (20, 24, 28)) -> Array:
    """Three organs of different sizes at places that no turning brings upon each other."""
    labels = np.zeros(shape, np.uint8)
    labels[2:6, 3:9, 4:12] = 1
    labels[14:18, 3:9, 5:13] = 2
    labels[3:12, 12:21, 15:22] = 3
    return labels


def found(prediction: Array, **how: Any) -> Explanation:
    explanation = explain(prediction, patient(prediction.shape), names=NAMES, **how)
    assert explanation is not None
    return explanation


@pytest.mark.parametrize(
    ("axis", "way"), [(0, "left to right"), (1, "front to back"), (2, "head to foot")], ids=["I", "J", "K"]
)
def test_a_mirrored_prediction_is_told_with_the_direction(axis: int, way: str) -> None:
    explanation = found(np.flip(patient(), axis))
    assert explanation.explained_dice == 1.0
    assert explanation.sentence.startswith(f"Dice is 1.00 instead of {explanation.dice:.2f} if it is mirrored {way}")
    assert explanation.change.flipped == (axis,)


def test_directions_are_those_of_the_axes() -> None:
    assert found(np.flip(patient(), 0), axis_codes="PSR").sentence.endswith("mirrored front to back")


def test_exchanged_labels_are_named() -> None:
    exchanged = np.array([0, 2, 1, 3], np.uint8)[patient()]
    explanation = found(exchanged)
    assert explanation.sentence == (
        f"Dice is 1.00 instead of {1 / 3:.2f} if kidney right and kidney left are exchanged"
    )


def test_labels_numbered_in_another_order_are_named() -> None:
    turned = np.array([0, 2, 3, 1], np.uint8)[patient()]
    assert found(turned).sentence.endswith(
        "if kidney right is called liver and kidney left is called kidney right and liver is called kidney left"
    )


def test_a_shift_is_told_in_voxels() -> None:
    explanation = found(np.roll(patient(), (-2, 3, 4), (0, 1, 2)))
    assert explanation.change.shift_ijk == (2, -3, -4)
    assert explanation.sentence.endswith("if it is moved by 2, -3, -4 voxels")


def test_every_way_to_lie_on_the_axes_of_a_cube_is_found() -> None:
    truth = patient((28, 28, 28))
    for axes, way in product(permutations(range(3)), product((False, True), repeat=3)):
        if axes == (0, 1, 2) and not any(way):
            continue
        flips = tuple(a for a in range(3) if way[a])
        prediction = np.flip(truth, flips).transpose(axes)
        explanation = explain(prediction, truth, names=NAMES)
        assert explanation is not None
        assert explanation.explained_dice == 1.0


def test_exchanged_axes_of_unequal_sides_are_laid_middle_upon_middle() -> None:
    truth = np.zeros((20, 20, 30), np.uint8)
    truth[2:5, 8:16, 17:22] = 1
    truth[14:17, 5:9, 7:13] = 2
    exchanged = np.zeros_like(truth)
    exchanged[:, :, 5:25] = truth[:, :, 5:25].transpose(2, 1, 0)
    explanation = explain(exchanged, truth, names=NAMES)
    assert explanation is not None
    assert explanation.change.axes == (2, 1, 0)
    assert explanation.explained_dice == 1.0


def test_a_good_prediction_needs_no_explanation() -> None:
    prediction = patient()
    prediction[2] = 0
    assert explain(prediction, patient(), names=NAMES) is None


def test_a_bad_model_is_not_excused() -> None:
    noise = np.random.default_rng(0).integers(0, 4, patient().shape).astype(np.uint8)
    assert explain(noise, patient(), names=NAMES) is None
    assert explain(np.zeros_like(patient()), patient(), names=NAMES) is None


def test_a_reference_without_labels_explains_nothing() -> None:
    assert explain(patient(), np.zeros_like(patient()), names=NAMES) is None


def test_large_volumes_are_thinned_in_the_search_and_scored_in_full() -> None:
    truth = patient().repeat(5, 0).repeat(5, 1).repeat(5, 2)
    explanation = explain(np.flip(truth, 2), truth, names=NAMES)
    assert explanation is not None
    assert explanation.explained_dice == 1.0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a prediction of \(2, 2, 2\) against a reference of \(2, 2, 3\)"):
        explain(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), names=NAMES)


def test_a_mirrored_case_among_good_ones_is_explained_in_the_report(tmp_path: Path) -> None:
    schema = schema_from_names(NAMES)
    for name in ("a", "b", "c"):
        write_label(tmp_path / "found" / f"{name}.nii.gz", np.flip(patient(), 0) if name == "b" else patient())
        write_label(tmp_path / "wanted" / f"{name}.nii.gz", patient())
    report = evaluate_files(tmp_path / "found", tmp_path / "wanted", schema)
    assert [e.case_id for e in report.explanations] == ["b"]
    assert report.explanations[0].sentence.endswith("if it is mirrored left to right")
    assert Report.from_json(report.to_json()) == report
