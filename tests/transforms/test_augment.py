"""Patches drawn, then cut: against SciPy, SimpleITK and MONAI, and phantoms in millimetres."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Affine
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation
from torch import Tensor

from transforms.augment import PatchDraw, RandPatchd, SpatialSettings, cut_patch, draw_patch, exchange_twins

Triple = tuple[int, int, int]
Array = npt.NDArray[np.float64]

EVERYTHING = SpatialSettings(
    rotation_probability=1.0,
    rotation_degrees=30.0,
    scaling_probability=1.0,
    scaling_range=(0.8, 1.25),
    elastic_probability=1.0,
    elastic_mm=1.5,
    mirror_axes=(0, 1, 2),
)


def noise(shape: Triple, *, channels: int = 1, seed: int = 0, sigma: float = 0.0) -> Tensor:
    """Random voxels of deviation 1, blurred first."""
    values = np.random.default_rng(seed).normal(size=(channels, *shape))
    smooth = gaussian_filter(values, (0, sigma, sigma, sigma))
    return torch.from_numpy((smooth / smooth.std()).astype(np.float32))


def indices(shape: Triple) -> Tensor:
    """Three channels that hold i, j and k: what is cut out of them tells where it came from."""
    return torch.from_numpy(np.indices(shape).astype(np.float32))


def no_label(image: Tensor) -> Tensor:
    return torch.zeros((1, *image.shape[1:]), dtype=torch.uint8)


def the_draw(
    centre_ijk: tuple[float, float, float],
    matrix: npt.ArrayLike = ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    elastic: Array | None = None,
    mirrored: tuple[int, ...] = (),
) -> PatchDraw:
    return PatchDraw(np.asarray(centre_ijk, dtype=np.float64), np.asarray(matrix, dtype=np.float64), elastic, mirrored)


def cut_image(image: Tensor, draw: PatchDraw, patch_shape: Triple, fill: float = 0.0) -> npt.NDArray[np.float32]:
    patch, _ = cut_patch(image, no_label(image), draw, patch_shape, fill=fill)
    assert patch.dtype == torch.float32
    return patch.numpy()


def drawn(
    seed: int,
    patch_shape: Triple,
    change: SpatialSettings,
    spacing_mm: tuple[float, float, float] = (1, 1, 1),
    centre_ijk: tuple[float, float, float] = (20, 20, 20),
) -> PatchDraw:
    random = np.random.RandomState(seed)
    return draw_patch(random, np.asarray(centre_ijk, float), patch_shape, spacing_mm=spacing_mm, settings=change)


def source_places(draw: PatchDraw, patch_shape: Triple) -> Array:
    """(3, I, J, K) worked out in float64 from the meaning of a draw, mirroring included."""
    offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in patch_shape], indexing="ij"))
    places = draw.centre_ijk[:, None, None, None] + np.einsum("ab,bijk->aijk", draw.matrix, offsets)
    if draw.elastic is not None:
        ends = [np.linspace(0, c - 1, n) for c, n in zip(draw.elastic.shape[1:], patch_shape, strict=True)]
        at = np.stack(np.meshgrid(*ends, indexing="ij"))
        places = places + np.stack([map_coordinates(axis, at, order=1) for axis in draw.elastic])
    return np.flip(places, [a + 1 for a in draw.mirrored]) if draw.mirrored else places


shapes = st.tuples(*[st.integers(1, 9)] * 3)
centres = st.tuples(*[st.floats(-12, 24)] * 3)
numbers = st.floats(-2, 2).map(lambda x: round(x, 3))


@given(shapes, shapes, centres, st.lists(numbers, min_size=9, max_size=9), st.booleans(), st.integers(0, 99))
@settings(max_examples=150)
def test_scipy_agrees_wherever_the_patch_lies(
    volume: Triple, patch: Triple, centre: tuple[float, float, float], matrix: list[float], bend: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    elastic = random.normal(size=(3, 2, 3, 2)) if bend else None
    mirrored = tuple(np.flatnonzero(random.random(3) < 0.5).tolist())
    draw = the_draw(centre, np.reshape(matrix, (3, 3)), elastic, mirrored)
    image = noise(volume, channels=2, seed=seed)
    label = torch.from_numpy(random.integers(1, 250, (1, *volume)).astype(np.uint8))
    found_image, found_label = cut_patch(image, label, draw, patch, fill=-3.0)
    places = source_places(draw, patch)
    for channel, found in zip(image, found_image, strict=True):
        expected = map_coordinates(channel.double().numpy(), places, order=1, mode="grid-constant", cval=-3.0)
        np.testing.assert_allclose(found.numpy(), expected, atol=3e-4)
    expected = map_coordinates(label[0].numpy(), places, order=0, mode="grid-constant")
    # Half-way between two voxels either may be taken.
    clear = (np.abs(places - np.floor(places) - 0.5) > 1e-4).all(axis=0)
    assert found_label.dtype == torch.uint8
    assert np.array_equal(found_label[0].numpy()[clear], expected[clear])


@given(st.tuples(*[st.integers(-9, 14)] * 3), shapes, st.sampled_from([(), (0,), (1, 2), (0, 1, 2)]))
def test_a_warp_that_changes_nothing_equals_the_plain_cut(start: Triple, patch: Triple, mirrored: Triple) -> None:
    """Also across the border and beside the volume."""
    image, label = noise((9, 7, 8), channels=2), torch.arange(504, dtype=torch.int16).reshape(1, 9, 7, 8) + 1
    centre = tuple(a + (n - 1) / 2 for a, n in zip(start, patch, strict=True))
    plain = the_draw(centre, mirrored=mirrored)
    warp = the_draw(centre, elastic=np.zeros((3, 2, 2, 2)), mirrored=mirrored)
    assert plain.is_plain
    assert not warp.is_plain
    plain_image, plain_label = cut_patch(image, label, plain, patch, fill=-2.0)
    warped_image, warped_label = cut_patch(image, label, warp, patch, fill=-2.0)
    np.testing.assert_allclose(warped_image.numpy(), plain_image.numpy(), atol=2e-5)
    assert torch.equal(warped_label, plain_label)
    expected = np.full((2, *patch), -2.0, np.float32)
    for ijk in np.ndindex(patch):
        there = tuple(int(a) + s for a, s in zip(ijk, start, strict=True))
        if all(0 <= x < n for x, n in zip(there, (9, 7, 8), strict=True)):
            expected[(slice(None), *ijk)] = image[(slice(None), *there)]
    assert np.array_equal(plain_image.numpy(), np.flip(expected, [a + 1 for a in mirrored]))


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (0, 2)])
def test_a_quarter_turn_is_rot90_of_the_neighbourhood(first: int, second: int) -> None:
    matrix = np.eye(3)
    matrix[[first, second]] = 0
    matrix[first, second], matrix[second, first] = 1, -1  # rot90: out[a, b] = in[b, -a]
    image = noise((15, 16, 17))
    found = cut_image(image, the_draw((7, 8, 9), matrix), (7, 7, 7))
    neighbourhood = image[:, 4:11, 5:12, 6:13].numpy()
    np.testing.assert_allclose(found, np.rot90(neighbourhood, axes=(first + 1, second + 1)), atol=2e-5)


def test_monai_affine_agrees() -> None:
    """MONAI turns a whole volume about its centre, in voxels, by the same kind of matrix."""
    matrix = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() @ np.diag([0.9, 1.2, 1.1])
    affine = np.eye(4)
    affine[:3, :3] = matrix
    image = noise((14, 17, 12), sigma=1)
    theirs, _ = Affine(affine=affine, padding_mode="zeros", mode="bilinear")(image)
    found = cut_image(image, the_draw((6.5, 8, 5.5), matrix), (14, 17, 12))
    np.testing.assert_allclose(found, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_simpleitk_turns_the_same_way_in_millimetres(seed: int) -> None:
    spacing_mm, patch = (0.8, 1.1, 3.0), (16, 14, 6)
    image = noise((60, 50, 30), sigma=1, seed=seed)
    change = SpatialSettings(1.0, 40.0, 1.0, (0.7, 1.4))
    draw = drawn(seed, patch, change, spacing_mm, (29.5, 24.5, 14.5))
    step = np.asarray(spacing_mm)
    volume = sitk.GetImageFromArray(image[0].numpy().transpose(2, 1, 0))
    volume.SetSpacing(spacing_mm)
    grid = sitk.Image(patch, sitk.sitkFloat32)
    grid.SetSpacing(spacing_mm)
    grid.SetOrigin((step * (draw.centre_ijk - (np.asarray(patch) - 1) / 2)).tolist())
    turn = sitk.AffineTransform(3)
    turn.SetMatrix((draw.matrix * step[:, None] / step[None, :]).ravel().tolist())
    turn.SetCenter((step * draw.centre_ijk).tolist())
    theirs = sitk.GetArrayFromImage(sitk.Resample(volume, grid, turn, sitk.sitkLinear)).transpose(2, 1, 0)
    np.testing.assert_allclose(cut_image(image, draw, patch)[0], theirs, atol=2e-4)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.6, 1.0, 2.5)])
def test_rotations_are_rotations_in_millimetres(spacing_mm: tuple[float, float, float]) -> None:
    step = np.asarray(spacing_mm)
    for seed in range(50):
        matrix = drawn(seed, (9, 9, 9), SpatialSettings(1.0, 25.0), spacing_mm).matrix
        in_mm = matrix * step[:, None] / step[None, :]
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(in_mm) == pytest.approx(1.0)
        angles = np.abs(Rotation.from_matrix(in_mm).as_euler("XYZ", degrees=True))
        assert angles.max() <= 25.0 + 1e-9


def sphere(shape: Triple, spacing_mm: tuple[float, float, float], radius_mm: float) -> tuple[Tensor, Tensor]:
    """A ball about the middle of a grid: its edge blurred over about 4 mm, and its mask."""
    middle = (np.asarray(shape) - 1) / 2
    offsets = np.moveaxis(np.indices(shape), 0, -1) - middle
    distance = np.linalg.norm(offsets * spacing_mm, axis=-1)[None]
    soft = 1 / (1 + np.exp(distance - radius_mm))
    return torch.from_numpy(soft.astype(np.float32)), torch.from_numpy((distance < radius_mm).astype(np.uint8))


@pytest.mark.parametrize("seed", range(5))
def test_a_sphere_stays_a_sphere_in_millimetres(seed: int) -> None:
    spacing_mm, shape = (0.8, 0.8, 2.0), (45, 45, 19)
    image, label = sphere(shape, spacing_mm, 11.0)
    draw = drawn(seed, shape, SpatialSettings(1.0, 90.0), spacing_mm, (22, 22, 9))
    turned, turned_label = cut_patch(image, label, draw, shape)
    np.testing.assert_allclose(turned.numpy(), image.numpy(), atol=0.1)
    overlap = 2 * int((turned_label & label).sum()) / int(turned_label.sum() + label.sum())
    assert overlap > 0.94  # voxels of 0.8 x 0.8 x 2 mm on a ball of 11 mm


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_volume_in_millimetres_grows_by_the_cube_of_the_factor(factor: float) -> None:
    spacing_mm, shape = (0.8, 0.8, 2.0), (45, 45, 19)
    image, label = sphere(shape, spacing_mm, 9.0)
    change = SpatialSettings(1.0, 45.0, 1.0, (factor, factor))
    larger, larger_label = cut_patch(image, label, drawn(0, shape, change, spacing_mm, (22, 22, 9)), shape)
    assert float(larger_label.sum() / label.sum()) == pytest.approx(factor**3, rel=0.03)
    assert float((larger > 0.5).sum() / (image > 0.5).sum()) == pytest.approx(factor**3, rel=0.03)


def test_factors_are_drawn_evenly_in_size() -> None:
    """As often half as large as twice as large."""
    factors = np.asarray(
        [1 / drawn(s, (9, 9, 9), SpatialSettings(0, 0, 1, (0.5, 2.0))).matrix[0, 0] for s in range(900)]
    )
    assert factors.min() >= 0.5
    assert factors.max() <= 2.0
    assert float(np.mean(factors < 1)) == pytest.approx(0.5, abs=0.06)
    assert float(np.log(factors).std()) == pytest.approx(np.log(4) / np.sqrt(12), rel=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_image_and_label_move_together(seed: int) -> None:
    image = noise((48, 48, 48), sigma=8, seed=seed)
    label = (image > 0).to(torch.uint8)
    draw = drawn(seed, (32, 32, 32), EVERYTHING, centre_ijk=(24, 23, 24))
    patch, classes = cut_patch(image, label, draw, (32, 32, 32))
    expected = patch > 0
    overlap = 2 * int((classes.bool() & expected).sum()) / int(classes.sum() + expected.sum())
    assert 0.1 < float(expected.float().mean()) < 0.9
    assert overlap > 0.97


def test_no_corner_is_empty_where_the_volume_goes_on() -> None:
    image, label = torch.ones((1, 60, 60, 60)), torch.ones((1, 60, 60, 60), dtype=torch.uint8)
    for seed in range(10):
        draw = drawn(seed, (24, 24, 24), EVERYTHING, centre_ijk=(30, 30, 30))
        patch, classes = cut_patch(image, label, draw, (24, 24, 24), fill=-9.0)
        np.testing.assert_allclose(patch.numpy(), 1.0, atol=1e-5)
        assert bool((classes == 1).all())


def test_elastic_control_points_by_hand() -> None:
    """Two points an axis stand on the patch's corners; between them displacements are mixed evenly."""
    elastic = np.zeros((3, 2, 1, 1))
    elastic[1, 0] = 4.0
    found = cut_image(indices((20, 20, 20)), the_draw((10, 10, 10), elastic=elastic), (5, 1, 1))
    np.testing.assert_allclose(found[0].ravel(), [8, 9, 10, 11, 12], atol=1e-5)
    np.testing.assert_allclose(found[1].ravel(), [14, 13, 12, 11, 10], atol=1e-5)
    np.testing.assert_allclose(found[2].ravel(), 10.0, atol=1e-5)


def test_elastic_displacements_have_their_deviation_in_millimetres() -> None:
    spacing_mm, change = (0.5, 1.0, 4.0), SpatialSettings(elastic_probability=1.0, elastic_mm=3.0)
    draws = [drawn(seed, (13, 25, 12), change, spacing_mm) for seed in range(300)]
    fields = np.stack([d.elastic for d in draws if d.elastic is not None])
    assert fields.shape == (300, 3, 2, 3, 2)  # a control point at least every 12 voxels or so
    for axis, step in enumerate(spacing_mm):
        assert float(fields[:, axis].std()) * step == pytest.approx(3.0, rel=0.05)
        assert abs(float(fields[:, axis].mean())) * step < 0.2


def test_a_slice_stays_in_its_plane() -> None:
    """2D patches turn and bend in their plane only, so that volumes of one slice are not left."""
    for seed in range(10):
        draw = drawn(seed, (16, 14, 1), EVERYTHING, (1.0, 1.0, 1.0), (15, 15, 0))
        np.testing.assert_allclose(source_places(draw, (16, 14, 1))[2], 0.0, atol=1e-12)
        patch = cut_image(torch.ones((1, 40, 40, 1)), draw, (16, 14, 1), fill=-5.0)
        np.testing.assert_allclose(patch, 1.0, atol=1e-5)


def test_probabilities_are_kept() -> None:
    change = SpatialSettings(0.3, 20, 0.6, (0.8, 1.25), 0.2, 2.0, (0, 2))
    draws = [drawn(seed, (12, 12, 12), change) for seed in range(1500)]
    lengths = np.asarray([np.linalg.norm(d.matrix[:, 0]) for d in draws])
    turned = np.asarray([abs(d.matrix[0, 1]) + abs(d.matrix[0, 2]) > 0 for d in draws])
    assert float(turned.mean()) == pytest.approx(0.3, abs=0.04)
    assert float((np.abs(lengths - 1) > 1e-12).mean()) == pytest.approx(0.6, abs=0.04)
    assert float(np.mean([d.elastic is not None for d in draws])) == pytest.approx(0.2, abs=0.04)
    for axis, share in ((0, 0.5), (1, 0.0), (2, 0.5)):
        assert float(np.mean([axis in d.mirrored for d in draws])) == pytest.approx(share, abs=0.04)


def patches(change: SpatialSettings = EVERYTHING, twins: tuple[int, ...] = (0, 1)) -> RandPatchd:
    return RandPatchd((10, 12, 8), (1.0, 1.0, 2.0), settings=change, twin_classes=twins, foreground_share=0.5)


def case(dtype: torch.dtype = torch.uint8) -> dict[str, object]:
    image = noise((20, 18, 16), channels=2, sigma=1)
    positions = np.asarray([[1, 3, 4, 5], [1, 9, 9, 9]], np.int32)
    return {"image": image, "label": (image[:1] > 0).to(dtype), "positions": positions, "fill": -4.0, "case": "a"}


def test_a_seed_gives_the_same_patches_again() -> None:
    def three(seed: int) -> list[dict[str, Tensor]]:
        cut = patches().set_random_state(seed=seed)
        return [cut(case()) for _ in range(3)]

    first, again, other = three(5), three(5), three(6)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
        assert not torch.equal(a["image"], c["image"])
    assert not torch.equal(first[0]["image"], first[1]["image"])


def test_a_draw_can_be_replayed() -> None:
    data = case()
    draw = patches().set_random_state(seed=3).draw((20, 18, 16), data["positions"])
    image, label = cut_patch(data["image"], data["label"], draw, (10, 12, 8), fill=-4.0)
    patch = patches().set_random_state(seed=3)(data)
    assert torch.equal(patch["image"], image)
    assert torch.equal(patch["label"], label)
    assert set(patch) == {"image", "label", "case"}


def test_with_all_off_voxels_are_copied() -> None:
    data = case()
    whole = RandPatchd((20, 18, 16), (1, 1, 1), settings=SpatialSettings(), twin_classes=(0, 1), foreground_share=0.5)
    patch = whole(data)
    assert torch.equal(patch["image"], data["image"])
    assert torch.equal(patch["label"], data["label"])
    patch["image"].zero_()
    assert bool(data["image"].any())


@pytest.mark.parametrize("change", [SpatialSettings(), SpatialSettings(mirror_axes=(0, 1, 2)), EVERYTHING])
def test_memory_mapped_volumes_are_never_written(tmp_path: Path, change: SpatialSettings) -> None:
    """A copy-on-write page that is written would silently change every later patch of the case."""
    data = case()
    stored = {"image": data["image"].numpy(), "label": data["label"].numpy()}
    for key, values in stored.items():
        np.save(tmp_path / f"{key}.npy", values)
        data[key] = torch.from_numpy(np.load(tmp_path / f"{key}.npy", mmap_mode="c"))
    cut = patches(change, (0, 2, 1)).set_random_state(seed=0)
    for _ in range(8):
        patch = cut(data)
        patch["image"].fill_(99.0)
        patch["label"].fill_(9)
    assert all(np.array_equal(data[key].numpy(), values) for key, values in stored.items())


@pytest.mark.parametrize("change", [SpatialSettings(mirror_axes=(0, 1, 2)), EVERYTHING])
def test_more_than_255_classes(change: SpatialSettings) -> None:
    twins = (0, 2, 1, *range(3, 40_001))
    small, large = case(torch.int32), case(torch.uint16)
    large["label"] = (large["label"].int() * 40_000).to(torch.uint16)
    for seed in range(6):
        expected = patches(change, (0, 1)).set_random_state(seed=seed)(small)["label"] * 40_000
        found = patches(change, twins).set_random_state(seed=seed)(large)["label"]
        assert found.dtype == torch.uint16
        assert torch.equal(found.int(), expected)


def twins_phantom() -> tuple[Tensor, Tensor]:
    """RAS, so low i is left: a large bright left structure (1), a small darker right one (2) and one between (3)."""
    image, label = torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 8, dtype=torch.uint8)
    for box, value, structure in (
        ((slice(1, 6), slice(1, 6), slice(1, 6)), 10.0, 1),
        ((slice(11, 13), slice(2, 4), slice(2, 4)), 5.0, 2),
        ((slice(7, 9), slice(4, 7), slice(4, 7)), 1.0, 3),
    ):
        image[(0, *box)], label[(0, *box)] = value, structure
    return image, label


def mirrored_patches(axis: int, twins: tuple[int, ...]) -> list[tuple[Tensor, Tensor, bool]]:
    """Whole-volume patches with, for each, whether it was mirrored (told by the image)."""
    image, label = twins_phantom()
    cut = RandPatchd(
        (16, 8, 8), (1, 1, 1), settings=SpatialSettings(mirror_axes=(axis,)), twin_classes=twins, foreground_share=0
    ).set_random_state(seed=1)
    found = [cut({"image": image, "label": label}) for _ in range(12)]
    flags = [torch.equal(p["image"], image.flip(axis + 1)) for p in found]
    assert {True, False} == set(flags)
    assert all(torch.equal(p["image"], image) for p, flag in zip(found, flags, strict=True) if not flag)
    return [(p["image"], p["label"], flag) for p, flag in zip(found, flags, strict=True)]


def test_left_stays_on_the_left_of_a_mirrored_patient() -> None:
    _, label = twins_phantom()
    for image, classes, mirrored in mirrored_patches(0, (0, 2, 1, 3)):
        # Whatever is seen on the side of low i is the left structure, large and bright or not.
        assert set(classes[0, :7].unique().tolist()) == {0, 1}
        assert set(classes[0, 9:].unique().tolist()) == {0, 2}
        assert torch.equal(classes == 3, image == 1.0)
        assert torch.equal(classes == 1, image == (5.0 if mirrored else 10.0))
        assert mirrored or torch.equal(classes, label)


@pytest.mark.parametrize(("axis", "twins"), [(1, (0, 2, 1, 3)), (2, (0, 2, 1, 3)), (0, (0, 1, 2, 3))])
def test_other_axes_and_labels_without_twins_are_only_mirrored(axis: int, twins: tuple[int, ...]) -> None:
    _, label = twins_phantom()
    for _, classes, mirrored in mirrored_patches(axis, twins):
        assert torch.equal(classes, label.flip(axis + 1) if mirrored else label)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_twins_are_exchanged_by_hand(dtype: torch.dtype) -> None:
    classes = torch.tensor([0, 1, 2, 3, 4, 1]).to(dtype).reshape(1, 2, 3, 1)
    exchanged = exchange_twins(classes, (0, 3, 2, 1, 4))
    assert exchanged.dtype == dtype
    assert exchanged.flatten().tolist() == [0, 3, 2, 1, 4, 3]
    assert torch.equal(exchange_twins(exchanged, (0, 3, 2, 1, 4)), classes)


def test_a_patch_carries_no_affine_of_its_volume() -> None:
    data = case()
    data["image"] = MetaTensor(data["image"], affine=torch.diag(torch.tensor([1.0, 1.0, 2.0, 1.0])))
    patch = patches().set_random_state(seed=0)(data)
    assert type(patch["image"]) is Tensor


def test_image_and_label_must_share_their_grid() -> None:
    with pytest.raises(ValueError, match=r"\(20, 18, 16\) voxels and a label of \(20, 18, 15\)"):
        patches()({**case(), "label": torch.zeros(1, 20, 18, 15)})


def test_what_was_annotated_is_exchanged_with_the_twins() -> None:
    """Of left (1) and right (2) only the right was annotated; mirrored, that is the left. Class 4 is ignored."""
    change = SpatialSettings(mirror_axes=(0,))
    cut = RandPatchd((10, 12, 8), (1, 1, 1), settings=change, twin_classes=(0, 2, 1, 3, 4), foreground_share=0.0)
    data = {**case(), "label": torch.full((1, 20, 18, 16), 2, dtype=torch.uint8)}
    data["label"][:, :, :, ::2] = 4
    data["annotated"] = torch.tensor([True, False, True, False])
    seen = set()
    for seed in range(12):
        patch = cut.set_random_state(seed=seed)(data)
        mirrored = bool((patch["label"] == 1).any())
        seen.add(mirrored)
        assert torch.unique(patch["label"]).tolist() == ([1, 4] if mirrored else [2, 4])
        assert patch["annotated"].tolist() == [True, mirrored, not mirrored, False]
    assert seen == {True, False}
