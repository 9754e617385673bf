"""What the planner is told of a dataset, against phantoms whose every figure is known."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.checks import check_dataset
from pipeline.errors import PlanError
from pipeline.fingerprint import SAMPLES_PER_CASE, Measuring, measure_case
from pipeline.manifest import Case, Dataset
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, schema_from_names
from transforms.volume import Volume

SCHEMA: LabelSchema = schema_from_names({1: "box", 7: "rod"})
CASE = Case(case_id="phantom", patient_id="p", images={"T1": "a.nii"}, label="b.nii")
RAS = Geometry((20, 24, 12), np.diag([1.0, 2.0, 3.0, 1.0]))


def phantom() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int16]]:
    """A box of 4 x 3 x 2 voxels with intensities 100 to 123, and a rod of 6 voxels along the last axis."""
    image = np.zeros(RAS.shape, np.float32)
    label = np.zeros(RAS.shape, np.int16)
    label[2:6, 5:8, 4:6] = 1
    label[15, 20, 3:9] = 7
    image[label == 1] = np.arange(100, 124)
    image[label == 7] = 50
    image[0, 0, 0] = -10
    return image, label


def measured(image: npt.NDArray[Any], label: npt.NDArray[Any], geometry: Geometry = RAS) -> Any:
    volumes = [Volume(image, geometry, None, 0.0)]
    return measure_case(CASE, volumes, Volume(label, geometry, None, 0.0), schema=SCHEMA)


def test_grid_volumes_and_extents_are_those_of_the_phantom() -> None:
    facts = measured(*phantom()).facts
    assert (facts.shape, facts.spacing_mm) == ((20, 24, 12), (1.0, 2.0, 3.0))
    assert facts.label_volumes_mm3 == {"box": 24 * 6.0, "rod": 6 * 6.0}
    assert facts.label_extents_mm == {"box": (4.0, 6.0, 6.0), "rod": (1.0, 2.0, 18.0)}


def test_intensities_are_of_the_labels() -> None:
    channel = measured(*phantom()).channels[0]
    assert sorted(channel.inside.tolist()) == [50.0] * 6 + [float(n) for n in range(100, 124)]
    assert (channel.lowest, channel.highest) == (-10.0, 123.0)
    assert channel.zero_share == pytest.approx(1 - 31 / (20 * 24 * 12))


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product([False, True], repeat=3)))
def test_the_way_a_file_stores_its_axes_changes_nothing(order: tuple[int, ...], flips: tuple[bool, ...]) -> None:
    image, label = phantom()
    geometry = RAS
    for axis, flip in enumerate(flips):
        if flip:
            image, label, geometry = np.flip(image, axis), np.flip(label, axis), geometry.flipped(axis)
    image, label, geometry = image.transpose(order), label.transpose(order), geometry.permuted(order)
    turned, straight = measured(image, label, geometry), measured(*phantom())
    assert turned.facts == straight.facts
    assert sorted(turned.channels[0].inside) == sorted(straight.channels[0].inside)


def leaning(degrees: float) -> Geometry:
    """The phantom's voxels in slices whose stack (k) leans over j, as in a CT with a tilted gantry."""
    affine = RAS.affine_ras.copy()
    affine[1, 2] = 3.0 * np.tan(np.deg2rad(degrees))
    return Geometry(RAS.shape, affine)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_sheared_grid_is_measured_as_the_orthogonal_one_around_it(order: tuple[int, ...]) -> None:
    """By 30 degrees: a slice lies 1.732 mm farther back than the one before, 3 mm above it."""
    image, label = phantom()
    facts = measured(image.transpose(order), label.transpose(order), leaning(30).permuted(order)).facts
    # Eleven steps of 1.732 mm are 19.05 mm: 10 more rows of 2 mm.
    assert (facts.shape, facts.spacing_mm) == ((20, 34, 12), (1.0, 2.0, 3.0))
    assert facts.label_volumes_mm3 == pytest.approx({"box": 24 * 6.0, "rod": 6 * 6.0})
    assert facts.label_extents_mm["box"] == pytest.approx((4.0, 7.7321, 6.0))
    assert facts.label_extents_mm["rod"] == pytest.approx((1.0, 10.6603, 18.0))


def test_a_large_label_is_thinned_evenly() -> None:
    shape = (60, 60, 60)
    label = np.ones(shape, np.uint8)
    image = np.broadcast_to(np.arange(60, dtype=np.float32)[:, None, None], shape).copy()
    inside = measured(image, label, Geometry(shape, np.eye(4))).channels[0].inside
    assert SAMPLES_PER_CASE <= len(inside) < 2 * SAMPLES_PER_CASE
    assert inside.mean() == pytest.approx(29.5, abs=0.1)


@pytest.fixture(scope="module")
def measuring(small_dataset: Dataset) -> Measuring:
    measuring = Measuring(small_dataset.manifest)
    check_dataset(small_dataset, visit=measuring.visit)
    return measuring


class TestMeasuring:
    def test_the_order_of_reading_changes_nothing(self, measuring: Measuring, small_dataset: Dataset) -> None:
        ids = [case.case_id for case in small_dataset.manifest.cases]
        assert measuring.fingerprint(ids) == measuring.fingerprint(ids[::-1])
        again = Measuring(small_dataset.manifest)
        check_dataset(small_dataset, visit=again.visit, workers=4)
        assert again.fingerprint(ids).model_dump_json() == measuring.fingerprint(ids).model_dump_json()

    def test_pooled_intensities_are_numpys(self, measuring: Measuring, small_dataset: Dataset, data_dir: Any) -> None:
        import nibabel as nib

        ids = [case.case_id for case in small_dataset.manifest.cases]
        pooled = []
        for case_id in ids:
            files = (data_dir / "hippocampus" / kind / f"{case_id}.nii.gz" for kind in ("images", "labels"))
            image, label = (np.asarray(nib.load(file).dataobj) for file in files)  # type: ignore[attr-defined]
            assert np.count_nonzero(label) < SAMPLES_PER_CASE
            pooled.append(image[label > 0].astype(np.float64))
        inside = np.concatenate(pooled)
        channel = measuring.fingerprint(ids).channels[0]
        assert channel.inside_mean == pytest.approx(inside.mean(), rel=1e-6)
        assert channel.inside_deviation == pytest.approx(inside.std(), rel=1e-6)
        assert channel.inside_percentile_00_5 == pytest.approx(np.percentile(inside, 0.5), rel=1e-6)
        assert channel.inside_percentile_99_5 == pytest.approx(np.percentile(inside, 99.5), rel=1e-6)

    def test_only_the_cases_that_are_asked_for_count(self, measuring: Measuring) -> None:
        found = measuring.fingerprint(["hippocampus_015", "hippocampus_001", "nobody"])
        assert [case.case_id for case in found.cases] == ["hippocampus_001", "hippocampus_015"]

    def test_nothing_to_plan_from(self, measuring: Measuring) -> None:
        with pytest.raises(PlanError, match="no annotated case to plan from; run `volseg check`"):
            measuring.fingerprint(["nobody"])

    def test_cases_without_a_label_are_passed_over(self, small_dataset: Dataset) -> None:
        measuring = Measuring(small_dataset.manifest)
        measuring.visit(CASE, [], None)
        with pytest.raises(PlanError):
            measuring.fingerprint([CASE.case_id])
