"""Prediction: on the source's own grid however that lies, and only for what the model was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.bundle import ModelBundle, load_bundle
from pipeline.errors import BundleError, GeometryMismatch, VolumeError
from pipeline.plan import Plan
from pipeline.predict import Model, PredictSettings, check_input, predict
from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry
from transforms.labels import schema_from_names
from transforms.volume import Volume, read_volume

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ORIENTATIONS = [
    "".join(codes)
    for order in permutations(range(3))
    for codes in product(*(("RL", "AP", "SI")[axis] for axis in order))
]


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> ModelBundle:
    return load_bundle(small_bundle)


@pytest.fixture(scope="module")
def source(data_dir: Path) -> Any:
    """One bundled case as nibabel has it."""
    return nib.load(data_dir / "hippocampus" / "images" / "hippocampus_015.nii.gz")  # type: ignore[attr-defined]


def volume_of(image: Any) -> Volume:
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    return Volume(voxels, Geometry(voxels.shape, image.affine), None, 0.0)


def labels_of(model: Model, image: Any, *, mirror: bool = False) -> npt.NDArray[Any]:
    return predict(model, [volume_of(image)], settings=PredictSettings(mirror), device=CPU).label_map


def reoriented(image: Any, codes: str) -> Any:
    """By nibabel, which knows nothing of `Geometry`."""
    start = nib.orientations.io_orientation(image.affine)
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    return image.as_reoriented(turn)


def on_axes_of(label_map: npt.NDArray[Any], turned: Any, codes: str) -> npt.NDArray[Any]:
    return np.asarray(reoriented(nib.Nifti1Image(label_map, turned.affine), codes).dataobj)  # type: ignore[attr-defined]


def tilted(image: Any) -> Any:
    """The same voxels in a patient who was rolled and nodding."""
    a, b = np.deg2rad(14), np.deg2rad(-9)
    roll = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    nod = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    turn = np.eye(4)
    turn[:3, :3] = roll @ nod
    return nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)  # type: ignore[attr-defined]


class TestSourceGrid:
    def test_all_48_orientations_give_the_same_voxels(self, bundle: ModelBundle, source: Any) -> None:
        model = Model((bundle,))
        straight = reoriented(source.slicer[4:28, 6:42, 5:33], "RAS")
        expected = labels_of(model, straight, mirror=True)
        # A pattern that says nothing about left, front or up would prove nothing.
        assert {0, 1, 2} == set(np.unique(expected))
        assert len(ORIENTATIONS) == 48
        for codes in ORIENTATIONS:
            turned = reoriented(straight, codes)
            found = labels_of(model, turned, mirror=True)
            assert found.shape == turned.shape
            assert np.array_equal(on_axes_of(found, turned, "RAS"), expected), codes

    @pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
    def test_oblique_volumes_too(self, bundle: ModelBundle, source: Any, codes: str) -> None:
        model = Model((bundle,))
        expected = labels_of(model, reoriented(source, "RAS"))
        turned = tilted(reoriented(source, codes))
        found = labels_of(model, turned)
        assert np.array_equal(on_axes_of(found, reoriented(source, codes), "RAS"), expected)

    @pytest.mark.parametrize("codes", ["RAS", "LPI", "ASR"])
    def test_another_spacing_comes_back_to_its_own(self, bundle: ModelBundle, source: Any, codes: str) -> None:
        model = Model((bundle,))
        straight = reoriented(source, "RAS")
        coarse = nib.Nifti1Image(  # type: ignore[attr-defined]
            np.asarray(straight.dataobj)[::2, :, ::3], straight.affine @ np.diag([2.0, 1.0, 3.0, 1.0])
        )
        expected = labels_of(model, coarse)
        assert expected.shape == coarse.shape
        turned = reoriented(coarse, codes)
        found = on_axes_of(labels_of(model, turned), turned, "RAS")
        # Interpolation weights of a flipped axis differ in the last bit, which decides a tie now and then.
        assert np.mean(found != expected) < 1e-3

    def test_the_result_says_whose_grid_and_labels_it_has(self, bundle: ModelBundle, source: Any) -> None:
        volume = volume_of(source)
        found = predict(Model((bundle,)), [volume], settings=PredictSettings(False), device=CPU)
        assert isinstance(found, Segmentation)
        assert found.geometry is volume.geometry
        assert found.schema == bundle.schema
        assert found.algorithm.name == "volseg small"

    def test_label_numbers_are_those_of_the_schema(self, bundle: ModelBundle, source: Any) -> None:
        schema = schema_from_names({5: "Anterior", 900: "Posterior"})
        found = labels_of(Model((replace(bundle, schema=schema),)), source)
        assert set(np.unique(found)) == {0, 5, 900}
        by_class = labels_of(Model((bundle,)), source)
        assert np.array_equal(found == 900, by_class == 2)

    def test_it_is_what_the_network_says(self, bundle: ModelBundle, source: Any) -> None:
        """Worked out again by hand: RAS axes, z-score, padding to a whole tile, argmax."""
        straight = np.asarray(reoriented(source, "RAS").slicer[2:25, 3:38, :27].dataobj, dtype=np.float64)
        image = torch.from_numpy((straight - straight.mean()) / straight.std()).float()
        missing = [-n % 2 for n in image.shape]
        padding = [x for m in reversed(missing) for x in (m // 2, m - m // 2)]
        padded = torch.nn.functional.pad(image, padding, value=float(image.min()))
        with torch.inference_mode():
            classes = bundle.network(padded[None, None])[0].argmax(dim=0)
        inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape, strict=True))
        found = labels_of(Model((bundle,)), reoriented(source, "RAS").slicer[2:25, 3:38, :27])
        assert np.mean(found != classes[inside].numpy()) < 1e-4


class Constant(torch.nn.Module):
    """The same logits (1, classes, 1, 1, 1) at every voxel."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(1, 3, *image.shape[2:])


class Brighter(torch.nn.Module):
    """Class 1 where the image is brighter than its mean, class 2 nowhere."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(image), image, torch.full_like(image, -9.0)], dim=1)


def with_weight(network: torch.nn.Module) -> torch.nn.Module:
    """A network says by its weights which device it is on."""
    network.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    return network


class TestTiltedScan:
    """A bright ball in the patient, seen in slices that lean by 20 degrees: the result lies on those slices."""

    @staticmethod
    def scan(codes: str) -> Volume:
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        affine[1, 2] = 2 * np.tan(np.deg2rad(20))
        grid = Geometry((36, 40, 14), affine).oriented(codes)
        points = grid.ras_from_ijk(np.indices(grid.shape).reshape(3, -1).T)
        centre = grid.ras_from_ijk([(np.asarray(grid.shape) - 1) / 2])[0] + (2, -3, 1)
        distances = np.linalg.norm(points - centre, axis=1).reshape(grid.shape)
        return Volume((100 / (1 + np.exp(distances - 8))).astype(np.float32), grid, None, 0.0)

    @pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA", "ARS"])
    @pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 2.0), (1.3, 1.2, 1.1)])
    def test_the_ball_is_found_where_it_is(
        self, bundle: ModelBundle, codes: str, spacing_mm: tuple[float, float, float]
    ) -> None:
        plan = bundle.plan.model_copy(update={"spacing_mm": spacing_mm})
        model = Model((replace(bundle, network=with_weight(Brighter()), plan=plan),))
        scan = self.scan(codes)
        found = predict(model, [scan], settings=PredictSettings(True), device=CPU)
        assert found.geometry is scan.geometry
        expected = scan.voxels > scan.voxels.mean()
        both = np.count_nonzero(expected & (found.label_map == 1))
        dice = 2 * both / (np.count_nonzero(expected) + np.count_nonzero(found.label_map))
        # On the planes of the slices only shifts within them interpolate; else neighbours two mm apart do.
        assert dice > (0.98 if spacing_mm[2] == 2.0 else 0.96)
        ijk = [np.argwhere(mask).mean(axis=0) for mask in (expected, found.label_map == 1)]
        gap_mm = np.diff(scan.geometry.ras_from_ijk(ijk), axis=0)[0]
        np.testing.assert_allclose(gap_mm, 0, atol=0.12)


class TestEnsemble:
    def test_one_model_twice_is_that_model(self, bundle: ModelBundle, source: Any) -> None:
        assert np.array_equal(labels_of(Model((bundle, bundle)), source), labels_of(Model((bundle,)), source))

    def test_probabilities_are_averaged(self, bundle: ModelBundle, source: Any) -> None:
        """Networks that are the same at every voxel say who wins: 0.6 and 0.1 beat 0.1 and 0.55 on the mean."""

        def constant(*probabilities: float) -> ModelBundle:
            logits = torch.tensor(probabilities).log().reshape(1, 3, 1, 1, 1)
            return replace(bundle, network=Constant(logits))

        sure, doubtful = constant(0.3, 0.6, 0.1), constant(0.35, 0.1, 0.55)
        answers = [labels_of(Model(models), source) for models in ((sure,), (doubtful,), (sure, doubtful))]
        assert [np.unique(answer).tolist() for answer in answers] == [[1], [2], [1]]

    def test_models_of_other_labels_or_preprocessing_are_refused(self, bundle: ModelBundle) -> None:
        schema = schema_from_names({1: "Anterior", 2: "Tail"})
        with pytest.raises(BundleError, match="different labels"):
            Model((bundle, replace(bundle, schema=schema)))
        coarse = bundle.plan.model_copy(update={"spacing_mm": (2.0, 2.0, 2.0)})
        with pytest.raises(BundleError, match="preprocess differently"):
            Model((bundle, replace(bundle, plan=coarse)))
        with pytest.raises(BundleError, match="at least one bundle"):
            Model(())


def study(*ranges: tuple[float, float], modality: str | None = None) -> list[Volume]:
    geometry = Geometry((4, 4, 4), np.eye(4))
    return [
        Volume(np.linspace(low, high, 64, dtype=np.float32).reshape(4, 4, 4), geometry, modality, low)
        for low, high in ranges
    ]


def with_channel(plan: Plan, modality: str | None, lowest: float | None, highest: float | None) -> Plan:
    values = {"modality": modality, "lowest": lowest, "highest": highest}
    return plan.model_copy(update={"channels": tuple(c.model_copy(update=values) for c in plan.channels)})


def refusal(plan: Plan, channels: Sequence[Volume]) -> str:
    with pytest.raises(VolumeError) as caught:
        check_input(plan, channels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRefusals:
    def test_another_number_of_channels(self, small_plan: Plan) -> None:
        assert refusal(small_plan, study((0, 9), (0, 9))) == "2 channel(s) given, the model wants 1: T1 (MR)"

    def test_another_modality_by_the_header(self, small_plan: Plan) -> None:
        message = refusal(small_plan, study((0, 900), modality="CT"))
        assert message.startswith(
            "the input is CT, the model's channel T1 is MR; choose a model that was trained on CT"
        )

    def test_hu_for_an_mr_model(self, small_plan: Plan) -> None:
        message = refusal(small_plan, study((-1024, 2000)))
        assert "intensities from -1024 to 2000 look like a CT in HU" in message

    def test_no_air_for_a_ct_model(self, small_plan: Plan) -> None:
        ct = with_channel(small_plan, "CT", -1024, 3000)
        assert "intensities from 0 to 900 are not a CT in HU" in refusal(ct, study((0, 900)))
        check_input(ct, study((-1000, 900)))
        check_input(ct, study((-1000, 900), modality="CT"))

    def test_what_fits_passes(self, small_plan: Plan) -> None:
        check_input(small_plan, study((0, 900)))
        check_input(small_plan, study((0, 900), modality="MR"))
        check_input(with_channel(small_plan, "MR", -2000, 2000), study((-1500, 900)))
        # A CT that was cropped inside the body in training may come without air as well.
        check_input(with_channel(small_plan, "CT", -200, 900), study((-150, 900)))

    @pytest.mark.parametrize("modality", ["CT", "MR", "PT", None])
    def test_where_the_maker_tells_no_modality_any_passes(self, small_plan: Plan, modality: str | None) -> None:
        for lowest in (None, 0.0, -1024.0):
            unknown = with_channel(small_plan, None, lowest, 3000)
            check_input(unknown, study((-1024, 2000), modality=modality))
            check_input(unknown, study((0, 900), modality=modality))
        assert "the model wants 1: T1 (modality unknown)" in refusal(unknown, study((0, 9), (0, 9)))

    def test_where_the_maker_tells_no_range_the_modality_alone_counts(self, small_plan: Plan) -> None:
        for modality in ("CT", "MR"):
            unknown = with_channel(small_plan, modality, None, None)
            check_input(unknown, study((-1024, 2000)))
            check_input(unknown, study((0, 900), modality=modality))
        assert "the input is CT, the model's channel T1 is MR" in refusal(unknown, study((0, 900), modality="CT"))

    def test_channels_on_two_grids(self, small_plan: Plan) -> None:
        two = small_plan.model_copy(update={"channels": small_plan.channels * 2})
        first, second = study((0, 9), (0, 9))
        moved = replace(second, geometry=Geometry((4, 4, 4), np.diag([1.0, 1.0, 1.5, 1.0])))
        check_input(two, [first, second])
        with pytest.raises(GeometryMismatch, match="channel T1 lies on another grid than the first"):
            check_input(two, [first, moved])

    def test_a_flat_volume_has_nothing_to_see(self, bundle: ModelBundle) -> None:
        flat = study((5, 5))
        with pytest.raises(VolumeError, match="one value everywhere"):
            predict(Model((bundle,)), flat, settings=PredictSettings(False), device=CPU)


def test_the_reader_and_nibabel_agree_on_the_source(source: Any, data_dir: Path) -> None:
    ours = read_volume(data_dir / "hippocampus" / "images" / "hippocampus_015.nii.gz")
    assert ours.geometry.difference(volume_of(source).geometry) is None
    assert np.array_equal(ours.voxels, volume_of(source).voxels)
