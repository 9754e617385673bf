"""All figures of a case at once: by hand, and as surface-distance, MONAI and SimpleITK give them."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)

from pipeline.measures import Measures, Structure, measure_case
from pipeline.metrics import dice
from tests.pipeline.metric_worlds import LABELS, SPACING_MM, TOLERANCE_MM, maps

PEERS = json.loads(Path(__file__).with_name("peer_figures.json").read_text(encoding="utf-8"))["surface_distance"]
STRUCTURES = [Structure((value,), TOLERANCE_MM) for value in LABELS]
DIAGONAL_MM = math.hypot(*SPACING_MM)
SHAPE = (12, 10, 8)
OWN_WARNING = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's, of itself
DISTANCES = ("hausdorff_mm", "hausdorff_95_mm", "average_distance_mm")


def box(value: int, start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray:
    label_map = np.zeros(SHAPE, dtype=np.uint8)
    label_map[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = value
    return label_map


def one(prediction: np.ndarray, reference: np.ndarray, tolerance_mm: float = 1.0, **others: int) -> Measures:
    structures = [Structure((1,), tolerance_mm)]
    return measure_case(prediction, reference, spacing_mm=(1.0, 2.0, 4.0), structures=structures, **others)[0]


@pytest.fixture(scope="module")
def measured() -> dict[int, Measures]:
    return dict(zip(LABELS, measure_case(*maps(), spacing_mm=SPACING_MM, structures=STRUCTURES), strict=True))


class TestByHand:
    def test_a_box_and_one_that_is_longer(self) -> None:
        """4 x 4 x 4 voxels of 8 mm3 against 6 x 4 x 4: nothing is wrong but two layers at one end."""
        found = one(box(1, (2, 2, 2), (8, 6, 6)), box(1, (2, 2, 2), (6, 6, 6)), 2.0)
        assert (found.overlap_voxels, found.prediction_voxels, found.reference_voxels) == (64, 96, 64)
        assert found.dice == pytest.approx(2 * 64 / 160)
        assert (found.sensitivity, found.precision) == (1.0, pytest.approx(64 / 96))
        assert (found.prediction_mm3, found.reference_mm3, found.volume_difference_mm3) == (768.0, 512.0, 256.0)
        assert (found.hausdorff_mm, found.surface_dice) == (2.0, 1.0)
        assert (found.lesions.matched_count, found.lesions.f1) == (1, 1.0)
        assert one(box(1, (2, 2, 2), (6, 6, 6)), box(1, (2, 2, 2), (8, 6, 6))).volume_difference_mm3 == -256.0

    def test_equal(self) -> None:
        found = one(box(1, (2, 2, 2), (6, 6, 6)), box(1, (2, 2, 2), (6, 6, 6)), 0.0)
        assert (found.dice, found.surface_dice, found.sensitivity, found.precision) == (1, 1, 1, 1)
        assert [getattr(found, name) for name in DISTANCES] == [0, 0, 0]

    def test_one_voxel_against_its_neighbour(self) -> None:
        """Along each axis the two octahedra are a voxel apart, and share four of their eight elements."""
        for axis, step_mm in enumerate((1.0, 2.0, 4.0)):
            voxel = box(1, (5, 5, 5), (6, 6, 6))
            found = one(np.roll(voxel, 1, axis=axis), voxel, 0.9)
            assert (found.dice, found.lesions.matched_count) == (0.0, 0)
            assert (found.hausdorff_mm, found.hausdorff_95_mm) == (step_mm, step_mm)
            assert found.average_distance_mm == pytest.approx(step_mm / 2)
            assert found.surface_dice == pytest.approx(0.5)

    def test_both_empty(self) -> None:
        nothing = np.zeros(SHAPE, dtype=np.uint8)
        for maps_ in ((nothing, nothing), (box(2, (1, 1, 1), (3, 3, 3)), nothing)):
            found = one(*maps_)
            figures = (found.dice, found.surface_dice, found.sensitivity, found.precision, found.lesions.f1)
            assert all(math.isnan(x) for x in (*figures, *(getattr(found, name) for name in DISTANCES)))
            assert (found.prediction_mm3, found.volume_difference_mm3) == (0, 0)

    def test_one_empty(self) -> None:
        nothing, some = np.zeros(SHAPE, dtype=np.uint8), box(1, (1, 1, 1), (3, 3, 3))
        for found in (one(nothing, some), one(some, nothing)):
            assert (found.dice, found.surface_dice, found.lesions.f1, found.lesions.lesion_dice) == (0, 0, 0, 0)
            assert all(math.isnan(getattr(found, name)) for name in DISTANCES)
            assert abs(found.volume_difference_mm3) == 64
        assert (one(nothing, some).sensitivity, one(some, nothing).precision) == (0, 0)
        assert math.isnan(one(nothing, some).precision)
        assert math.isnan(one(some, nothing).sensitivity)

    def test_touching_the_border_changes_nothing(self) -> None:
        """A structure ends where the volume does, as if there were background beyond."""
        inside = [box(1, (0, 0, 0), (5, 4, 3)), box(1, (0, 0, 0), (4, 5, 3))]
        padded = [np.pad(label_map, 3) for label_map in inside]
        assert one(*inside) == one(*padded)
        whole = np.ones(SHAPE, dtype=np.uint8)
        assert one(whole, whole).surface_dice == 1.0

    def test_a_union_of_values(self) -> None:
        prediction = box(1, (2, 2, 2), (4, 6, 6)) + box(3, (4, 2, 2), (6, 6, 6))
        both = measure_case(
            prediction,
            box(3, (2, 2, 2), (6, 6, 6)),
            spacing_mm=(1, 1, 1),
            structures=[Structure((1, 3), 0.0), Structure((3,), 0.0)],
        )
        assert (both[0].dice, both[0].surface_dice) == (1.0, 1.0)
        assert both[1].dice == pytest.approx(2 * 32 / 96)

    def test_what_the_reference_ignores_is_background_on_both_sides(self) -> None:
        reference = box(1, (2, 2, 2), (6, 6, 6))
        prediction = box(1, (2, 2, 2), (9, 6, 6))
        reference[6:] = 9
        assert one(prediction, reference, 0.0, ignored=9) == one(reference % 9, reference % 9, 0.0)
        assert one(prediction, reference, 0.0).dice < 1
        assert math.isnan(one(prediction, np.full(SHAPE, 9, np.uint8), ignored=9).dice)

    @pytest.mark.parametrize(
        ("label_map", "message"),
        [
            (np.zeros((2, 2), np.uint8), r"\(I, J, K\) are compared"),
            (np.zeros((2, 2, 2)), "holds integers, found float64"),
            (np.full((2, 2, 2), -1), "from 0, found -1"),
        ],
    )
    def test_what_is_no_label_map_is_refused(self, label_map: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            measure_case(label_map, label_map, spacing_mm=(1, 1, 1), structures=[])

    @pytest.mark.parametrize("spacing_mm", [(1, 1), (1, 0, 1)])
    def test_a_spacing_that_is_none(self, spacing_mm: tuple[float, ...]) -> None:
        nothing = np.zeros(SHAPE, dtype=np.uint8)
        with pytest.raises(ValueError, match="three positive numbers"):
            measure_case(nothing, nothing, spacing_mm=spacing_mm, structures=[])


@pytest.mark.parametrize("order", list(product("CF", "CF")))
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64])
def test_types_and_order_in_memory_change_nothing(
    measured: dict[int, Measures], dtype: type[np.generic], order: tuple[str, str]
) -> None:
    pair = [np.asarray(m, dtype=dtype, order=o) for m, o in zip(maps(), order, strict=True)]
    for found, expected in zip(
        measure_case(*pair, spacing_mm=SPACING_MM, structures=STRUCTURES), measured.values(), strict=True
    ):
        assert found.overlap_voxels == expected.overlap_voxels
        assert found.lesions.matched_count == expected.lesions.matched_count
        for name in ("surface_dice", *DISTANCES):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


@pytest.mark.parametrize("value", LABELS, ids=LABELS.values())
class TestAsOthers:
    def test_surface_distance(self, measured: dict[int, Measures], value: int) -> None:
        """The same convention, so the same figures. It gives the average distance of each direction apart."""
        found, peer = measured[value], PEERS[str(value)]
        for name in ("dice", "surface_dice", "hausdorff_mm", "hausdorff_95_mm"):
            assert getattr(found, name) == pytest.approx(peer[name], rel=1e-9), name
        sides = ("reference", "prediction")
        sums = [peer[f"average_from_{side}_mm"] * peer[f"{side}_area_mm2"] for side in sides]
        areas = [peer[f"{side}_area_mm2"] for side in sides]
        assert found.average_distance_mm == pytest.approx(sum(sums) / sum(areas), rel=1e-9)

    @OWN_WARNING
    def test_monai(self, measured: dict[int, Measures], value: int) -> None:
        """Its points are centres of border voxels, each within half a diagonal of a surface element of ours."""
        found = measured[value]
        pair = [torch.from_numpy((m == value)[None, None].astype(np.float32)) for m in maps()]
        options = {"include_background": True, "spacing": SPACING_MM}
        assert found.dice == pytest.approx(float(compute_dice(*pair)), rel=1e-6)
        assert abs(found.hausdorff_mm - float(compute_hausdorff_distance(*pair, **options))) <= DIAGONAL_MM
        assert abs(found.hausdorff_95_mm - float(compute_hausdorff_distance(*pair, percentile=95, **options))) <= (
            DIAGONAL_MM
        )
        average = compute_average_surface_distance(*pair, symmetric=True, **options)
        assert abs(found.average_distance_mm - float(average)) <= DIAGONAL_MM
        near, far = (
            float(compute_surface_dice(*pair, [limit], **options)) for limit in (0.0, TOLERANCE_MM + DIAGONAL_MM)
        )
        assert near - 0.1 <= found.surface_dice <= far + 0.1

    @OWN_WARNING
    def test_monai_with_surface_elements(self, measured: dict[int, Measures], value: int) -> None:
        """Told to use sub-voxels, MONAI's surface Dice follows the convention of ours."""
        pair = [torch.from_numpy((m == value)[None, None].astype(np.float32)) for m in maps()]
        peer = compute_surface_dice(
            *pair, [TOLERANCE_MM], include_background=True, spacing=SPACING_MM, use_subvoxels=True
        )
        assert measured[value].surface_dice == pytest.approx(float(peer), rel=1e-5)

    def test_simpleitk(self, measured: dict[int, Measures], value: int) -> None:
        """Overlap is exact; Hausdorff is between the masks there, whose far points are voxel centres too."""
        found = measured[value]
        images = [sitk.GetImageFromArray((m == value).astype(np.uint8).T) for m in maps()]
        for image in images:
            image.SetSpacing(SPACING_MM)
        overlap = sitk.LabelOverlapMeasuresImageFilter()
        overlap.Execute(*images)
        assert found.dice == pytest.approx(overlap.GetDiceCoefficient())
        assert found.sensitivity == pytest.approx(1 - overlap.GetFalseNegativeError(1))
        # Its false positives are a part of all voxels outside; seen from the other side they are false negatives.
        overlap.Execute(*images[::-1])
        assert found.precision == pytest.approx(1 - overlap.GetFalseNegativeError(1))
        volumes = []
        for image in images:
            shape = sitk.LabelShapeStatisticsImageFilter()
            shape.Execute(image)
            volumes.append(shape.GetPhysicalSize(1))
        assert (found.prediction_mm3, found.reference_mm3) == pytest.approx(tuple(volumes))
        hausdorff = sitk.HausdorffDistanceImageFilter()
        hausdorff.Execute(*images)
        assert hausdorff.GetHausdorffDistance() <= found.hausdorff_mm + DIAGONAL_MM

    def test_dice_of_masks(self, measured: dict[int, Measures], value: int) -> None:
        prediction, reference = maps()
        assert measured[value].dice == dice(prediction == value, reference == value)
