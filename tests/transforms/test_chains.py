"""Whole chains on a bundled case: against nibabel and SciPy by hand, and mixed with MONAI's own transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, RandGaussianNoised, ScaleIntensityd
from scipy.ndimage import map_coordinates
from torch import Tensor

from transforms.annotation import Annotation
from transforms.augment import IntensitySettings, RandIntensityd, RandPatchd, SpatialSettings
from transforms.chains import placing_steps, plain, preprocess_chain, training_chain
from transforms.geometry import Geometry
from transforms.intensity_spec import Normalisation
from transforms.labels import LabelSchema, schema_from_names
from transforms.load import LoadVolumed, as_metatensor, geometry_of
from transforms.patches import class_positions
from transforms.steps import EncodeLabelsd, OrientAndRespaced

SCHEMA = schema_from_names({1: "Anterior", 2: "Posterior"})
WHOLE = Annotation(SCHEMA)
ZSCORE = Normalisation(kind="zscore")
SPACING_MM = (0.8, 1.1, 1.3)
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def paths(data_dir: Path) -> dict[str, Any]:
    """A case of 1 mm voxels, about 35 x 50 x 35 of them."""
    folder = data_dir / "hippocampus"
    name = "hippocampus_015.nii.gz"
    return {"image": [folder / "images" / name], "label": folder / "labels" / name}


@pytest.fixture(scope="module", params=["RAS", "LPS", "PIR", "SAL"])
def turned_paths(
    request: pytest.FixtureRequest, paths: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The same patient, stored in another order of axes and with other spacings."""
    folder = tmp_path_factory.mktemp(request.param)
    stored: dict[str, Any] = {}
    for key, path in (("image", paths["image"][0]), ("label", paths["label"])):
        file = nib.load(path)
        codes = nib.orientations.axcodes2ornt(request.param)
        turned = file.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(file.affine), codes))
        affine = np.diag([1.5, 0.9, 1.2, 1.0]) @ turned.affine
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), affine), folder / f"{key}.nii.gz")
        stored[key] = folder / f"{key}.nii.gz"
    return {"image": [stored["image"]], "label": stored["label"]}


def chain(
    annotation: Annotation | None = WHOLE,
    how: Normalisation = ZSCORE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
) -> Compose:
    return preprocess_chain(axis_codes="RAS", spacing_mm=spacing_mm, normalisations=[how], annotation=annotation)


def canonical(path: Path) -> tuple[Array, Array]:
    """Voxels and affine with axes as near RAS as they come."""
    file = nib.as_closest_canonical(nib.load(path))
    return np.asarray(file.dataobj), file.affine


def places(shape: tuple[int, ...], affine: Array) -> tuple[Array, tuple[int, ...]]:
    """(3, I, J, K) where voxels of SPACING_MM lie in a canonical grid: the same middle, a whole number of voxels."""
    sides_mm = np.linalg.norm(affine[:3, :3], axis=0)
    counts = tuple(round(n * s / t) for n, s, t in zip(shape, sides_mm, SPACING_MM, strict=True))
    along = [
        (n - 1) / 2 + (np.arange(m) - (m - 1) / 2) * t / s
        for n, m, s, t in zip(shape, counts, sides_mm, SPACING_MM, strict=True)
    ]
    inside = [np.clip(x, 0, n - 1) for x, n in zip(along, shape, strict=True)]
    return np.stack(np.meshgrid(*inside, indexing="ij")), counts


def test_preprocessing_equals_nibabel_and_scipy(turned_paths: dict[str, Any]) -> None:
    data = chain()(turned_paths)
    voxels, affine = canonical(turned_paths["image"][0])
    at, counts = places(voxels.shape, affine)
    normalised = (voxels - voxels.mean(dtype=np.float64)) / voxels.std(dtype=np.float64)
    expected = map_coordinates(normalised, at, order=3, mode="mirror")
    assert data["image"].shape == (1, *counts)
    assert data["image"].dtype == torch.float32
    np.testing.assert_allclose(data["image"][0].numpy(), expected, atol=5e-5)

    label, _ = canonical(turned_paths["label"])
    shares = np.stack([map_coordinates((label == c).astype(np.float64), at, order=1) for c in range(3)])
    first, second = np.sort(shares, axis=0)[[-1, -2]]
    clear = first - second > 1e-5
    assert clear.mean() > 0.99
    assert data["label"].dtype == torch.uint8
    assert np.array_equal(data["label"][0].numpy()[clear], shares.argmax(axis=0)[clear])


def test_image_and_label_share_the_grid_that_was_asked_for(turned_paths: dict[str, Any]) -> None:
    data = chain()(turned_paths)
    image, label = geometry_of(data["image"]), geometry_of(data["label"])
    assert image.shape == label.shape
    assert np.array_equal(image.affine_ras, label.affine_ras)
    assert image.axis_codes == "RAS"
    assert image.spacing_mm == pytest.approx(SPACING_MM)
    file = nib.load(turned_paths["image"][0])
    middle = nib.affines.apply_affine(file.affine, (np.asarray(file.shape) - 1) / 2)
    np.testing.assert_allclose(image.ras_from_ijk([(np.asarray(image.shape) - 1) / 2])[0], middle, atol=1e-4)


def test_on_its_own_grid_nothing_is_interpolated(paths: dict[str, Any]) -> None:
    data = chain(spacing_mm=(1, 1, 1))(paths)
    voxels, affine = canonical(paths["image"][0])
    exact = voxels.astype(np.float64)
    np.testing.assert_allclose(data["image"][0].numpy(), (exact - exact.mean()) / exact.std(), atol=1e-5)
    assert np.array_equal(data["label"][0].numpy(), canonical(paths["label"])[0])
    np.testing.assert_allclose(geometry_of(data["image"]).affine_ras, affine, atol=1e-6)


def test_prediction_prepares_an_image_as_training_does(turned_paths: dict[str, Any]) -> None:
    with_label = chain()(turned_paths)["image"]
    alone = chain(annotation=None)({"image": turned_paths["image"]})
    assert set(alone) == {"image"}
    assert torch.equal(alone["image"].as_tensor(), with_label.as_tensor())
    loaded = LoadVolumed("image")({"image": turned_paths["image"]})
    placed = Compose(placing_steps(["image"], [], "RAS", SPACING_MM, [ZSCORE]))(loaded)
    assert torch.equal(placed["image"].as_tensor(), with_label.as_tensor())


def test_a_masked_background_stays_out_of_the_statistics_when_respaced(tmp_path: Path) -> None:
    """A spline rings far into the zeros around a brain: they have to be told apart before."""
    shape = (40, 40, 40)
    inside = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - 19.5, axis=-1) < 14
    values = np.where(inside, np.random.default_rng(0).normal(100, 10, shape), 0).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "image.nii.gz")
    how = Normalisation(kind="zscore", nonzero=True)
    image = chain(None, how, (0.9, 0.9, 0.9))({"image": [tmp_path / "image.nii.gz"]})["image"][0].numpy()
    brain = values[inside].astype(np.float64)
    lowest = (brain.min() - brain.mean()) / brain.std()
    assert image[:2].mean() == pytest.approx(lowest, abs=1e-3)
    middle = image[17:27, 17:27, 17:27]
    assert abs(float(middle.mean())) < 0.15
    assert float(middle.std()) == pytest.approx(1.0, abs=0.25)


def remapped(paths: dict[str, Any], ids: dict[int, int], path: Path) -> dict[str, Any]:
    """The case with other voxel values in its label map."""
    file = nib.load(paths["label"])
    before = np.asarray(file.dataobj).astype(int)
    after = np.zeros(before.shape, np.int16)
    for old, new in ids.items():
        after[before == old] = new
    nib.save(nib.Nifti1Image(after, file.affine), path)
    return {"image": paths["image"], "label": path}


def test_ids_become_classes_in_the_order_of_the_schema(paths: dict[str, Any], tmp_path: Path) -> None:
    posterior_first = LabelSchema.model_validate(
        {
            "labels": [
                {"id": 200, "name": "Posterior", "colour": (1, 2, 3)},
                {"id": 3, "name": "Anterior", "colour": (4, 5, 6)},
            ]
        }
    )
    case = remapped(paths, {1: 3, 2: 200}, tmp_path / "label.nii.gz")
    found = chain(Annotation(posterior_first))(case)["label"]
    expected = chain()(paths)["label"]
    assert found.dtype == torch.uint8
    assert torch.equal(found.as_tensor() == 1, expected.as_tensor() == 2)
    assert torch.equal(found.as_tensor() == 2, expected.as_tensor() == 1)


def test_an_empty_label_map_stays_empty(paths: dict[str, Any], tmp_path: Path) -> None:
    assert not bool(chain()(remapped(paths, {}, tmp_path / "label.nii.gz"))["label"].any())


def test_unknown_ids_are_refused_by_value(paths: dict[str, Any], tmp_path: Path) -> None:
    case = remapped(paths, {1: 7, 2: 2}, tmp_path / "label.nii.gz")
    with pytest.raises(RuntimeError) as wrapped:  # MONAI's Compose wraps what a step raises
        chain()(case)
    assert isinstance(wrapped.value.__cause__, ValueError)
    assert str(wrapped.value.__cause__) == "label values [7] are not in the schema, which knows [1, 2]"


@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.uint8, 3), (torch.int16, 3), (torch.int64, 300), (torch.int32, 300)]
)
def test_labels_are_encoded_on_their_grid(dtype: torch.dtype, count: int) -> None:
    schema = schema_from_names({10 * c: f"structure {c}" for c in range(1, count)})
    geometry = Geometry((2, 3, 4), np.diag([1.0, 2.0, 3.0, 1.0]))
    highest = 10 * (count - 1)
    ids = torch.zeros((1, 2, 3, 4), dtype=dtype)
    ids[0, 1, 2, 3], ids[0, 0, 0, 1] = highest, 10
    found = EncodeLabelsd("label", Annotation(schema))({"label": as_metatensor(ids, geometry)})["label"]
    assert found.dtype == (torch.uint8 if count <= 256 else torch.uint16)
    assert int(found[0, 1, 2, 3]) == count - 1
    assert int(found[0, 0, 0, 1]) == 1
    assert int((found.as_tensor() != 0).sum()) == 2
    assert geometry_of(found).difference(geometry) is None
    assert int(ids.max()) == highest


def test_more_than_255_classes_are_placed() -> None:
    geometry = Geometry((4, 4, 4), np.eye(4))
    classes = torch.zeros((1, 4, 4, 4), dtype=torch.int32)
    classes[0, :2], classes[0, 3] = 300, 7
    place = OrientAndRespaced("label", class_keys=["label"], axis_codes="LPS", spacing_mm=(0.5, 1, 1))
    found = place({"label": as_metatensor(classes.to(torch.uint16), geometry)})["label"]
    assert found.dtype == torch.uint16
    # Axis i turned round and halved: 7 twice, 0 twice, then 300; no number in between is made up.
    assert [int(c) for c in found[0, :, 0, 0]] == [7, 7, 0, 0, 300, 300, 300, 300]


def test_the_steps_work_among_monais_own(turned_paths: dict[str, Any]) -> None:
    """One Compose: our reader and labels, MONAI's orientation and scaling, our patch and intensities, MONAI's noise."""
    spatial = SpatialSettings(rotation_probability=1.0, rotation_degrees=20.0, mirror_axes=(0,))
    steps = [
        LoadVolumed(["image", "label"], label_keys=["label"]),
        EncodeLabelsd("label", WHOLE),
        Orientationd(["image", "label"], axcodes="RAS", labels=None),
        OrientAndRespaced(["image", "label"], class_keys=["label"], axis_codes="RAS", spacing_mm=SPACING_MM),
        ScaleIntensityd("image"),
        RandPatchd((16, 24, 16), SPACING_MM, settings=spatial, twin_classes=(0, 1, 2), foreground_share=1.0),
        RandIntensityd(IntensitySettings(noise_probability=1.0, noise_deviation=0.1)),
        RandGaussianNoised("image", prob=1.0),
    ]
    placed = Compose(steps[:4])(turned_paths)
    directly = Compose([*steps[:2], steps[3]])(turned_paths)
    for key in ("image", "label"):
        np.testing.assert_allclose(placed[key].numpy(), directly[key].numpy(), atol=2e-3)
        assert geometry_of(placed[key]).difference(geometry_of(directly[key])) is None
    patch = Compose(steps).set_random_state(seed=0)(turned_paths)
    assert patch["image"].shape == patch["label"].shape == (1, 16, 24, 16)
    assert bool(torch.isfinite(patch["image"]).all())


def training_data(paths: dict[str, Any]) -> dict[str, Any]:
    data = chain()(paths)
    image, label = plain(data["image"]), plain(data["label"])
    return {"image": image, "label": label, "positions": class_positions(label[0].numpy(), class_count=3), "fill": -2.0}


def augmenting(patch_shape: tuple[int, int, int] = (16, 24, 16)) -> Compose:
    return training_chain(
        patch_shape,
        SPACING_MM,
        spatial=SpatialSettings(0.8, 15.0, 0.8, (0.85, 1.15), 0.5, 2.0, (0,)),
        intensity=IntensitySettings(
            noise_probability=0.5, noise_deviation=0.2, gamma_probability=0.5, gamma_range=(0.7, 1.5)
        ),
        twin_classes=(0, 1, 2),
        foreground_share=1.0,
    )


def test_a_seed_gives_the_same_training_patches(paths: dict[str, Any]) -> None:
    data = training_data(paths)

    def two(seed: int) -> list[dict[str, Tensor]]:
        make = augmenting()
        make.set_random_state(seed=seed)
        return [make(data) for _ in range(2)]

    first, again, other = two(1), two(1), two(2)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
        assert not torch.equal(a["image"], c["image"])
    assert not torch.equal(first[0]["image"], first[1]["image"])


@pytest.mark.parametrize("patch_shape", [(16, 24, 16), (64, 48, 40), (24, 24, 1)])
def test_training_patches_show_what_is_labelled(paths: dict[str, Any], patch_shape: tuple[int, int, int]) -> None:
    """Also where the patch is larger than the volume, and as a slice."""
    data = training_data(paths)
    kept = {key: data[key].clone() for key in ("image", "label")}
    make = augmenting(patch_shape)
    for seed in range(5):
        make.set_random_state(seed=seed)
        patch = make(data)
        assert set(patch) == {"image", "label"}
        assert patch["image"].shape == patch["label"].shape == (1, *patch_shape)
        assert patch["image"].dtype == torch.float32
        assert patch["label"].dtype == torch.uint8
        assert bool(torch.isfinite(patch["image"]).all())
        assert set(patch["label"].unique().tolist()) <= {0, 1, 2}
        assert bool(patch["label"].any())
    assert all(torch.equal(data[key], value) for key, value in kept.items())


def test_the_training_chain_cuts_then_changes_intensities(paths: dict[str, Any]) -> None:
    data = training_data(paths)
    shape = tuple(data["image"].shape[1:])
    brighter = IntensitySettings(brightness_probability=1.0, brightness_range=(2.0, 2.0))
    make = training_chain(
        shape, SPACING_MM, spatial=SpatialSettings(), intensity=brighter, twin_classes=(0, 1, 2), foreground_share=0.5
    )
    make.set_random_state(seed=0)
    patch = make(data)
    assert torch.equal(patch["image"], data["image"] * 2)
    assert torch.equal(patch["label"], data["label"])


def test_plain_takes_the_metadata_off() -> None:
    tensor = torch.rand(1, 2, 2, 2)
    assert plain(tensor) is tensor
    found = plain(MetaTensor(tensor))
    assert type(found) is Tensor
    assert torch.equal(found, tensor)


def test_what_is_ignored_stays_so_between_voxels(tmp_path: Path) -> None:
    """A label beside ignored voxels beside background, on another grid: nothing comes between but these three, in
    their order, and no label where mostly the ignored lies."""
    sparse = Annotation(LabelSchema(labels=schema_from_names({1: "a", 2: "b", 3: "c"}).labels, ignore=255))
    ids = np.zeros((12, 6, 6), np.uint8)
    ids[:4], ids[4:8] = 1, 255
    nib.save(nib.Nifti1Image(ids, np.diag([1.0, 1, 1, 1])), tmp_path / "label.nii.gz")
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=ids.shape), np.eye(4)), tmp_path / "image.nii.gz")
    found = chain(sparse, spacing_mm=(0.7, 1, 1))(
        {"image": [tmp_path / "image.nii.gz"], "label": tmp_path / "label.nii.gz"}
    )
    row = found["label"][0, :, 3, 3].numpy()
    geometry = geometry_of(found["label"])
    places = np.asarray([geometry.affine_ras[0, 3] + geometry.affine_ras[0, 0] * i for i in range(len(row))])
    expected = np.select([places < 3.5, places < 7.5], [1, 4], 0)
    assert row.tolist() == expected.tolist()
