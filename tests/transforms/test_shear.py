"""Sheared grids (a CT with a tilted gantry): the orthogonal grid around one, and the way there and back."""

from __future__ import annotations

from collections.abc import Generator
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from transforms.geometry import Geometry
from transforms.load import as_metatensor, geometry_of
from transforms.resample import Order, move, move_argmax, move_classes
from transforms.steps import OrientAndRespaced

ALL_CODES = ["".join(codes) for axes in permutations(("RL", "AP", "SI")) for codes in product(*axes)]
SOME_CODES = ("LPS", "RAS", "SLA", "ASR", "PIL", "LIA")
TILT_DEG = 18.5
BALL_MM = 10.0


def tilted(
    shape: tuple[int, int, int] = (40, 36, 12),
    *,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 4.0),
    tilt_deg: float = TILT_DEG,
    codes: str = "LPS",
) -> Geometry:
    """A CT whose table moves along the body (k) while its slices lean: worked out as the scanner does, in LPS."""
    lean = np.deg2rad(tilt_deg)
    affine_lps = np.eye(4)
    affine_lps[:3, 0] = (spacing_mm[0], 0, 0)
    affine_lps[:3, 1] = spacing_mm[1] * np.array([0, np.cos(lean), -np.sin(lean)])
    affine_lps[:3, 2] = (0, 0, spacing_mm[2])
    affine_lps[:3, 3] = (-20.0, -18.0, -22.0)
    return Geometry.from_lps(shape, affine_lps).oriented(codes)


@st.composite
def sheared(draw: st.DrawFn) -> Geometry:
    """A stack that leans by up to 40 degrees in any direction, turned in any way, any axis order and handedness."""
    lean, around = draw(st.floats(1.0, 40.0)), draw(st.floats(0.0, 360.0))
    sideways = np.tan(np.deg2rad(lean)) * np.array([np.cos(np.deg2rad(around)), np.sin(np.deg2rad(around))])
    matrix = np.column_stack([(1, 0, 0), (0, 1, 0), (*sideways, 1)])
    matrix = matrix * [draw(st.floats(0.4, 1.5)), draw(st.floats(0.4, 1.5)), draw(st.floats(2.0, 6.0))]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec([draw(st.floats(-3.0, 3.0)) for _ in range(3)]).as_matrix() @ matrix
    affine[:3, 3] = [draw(st.floats(-300.0, 300.0)) for _ in range(3)]
    geometry = Geometry(tuple(draw(st.integers(2, 7)) for _ in range(3)), affine)
    geometry = geometry.permuted(draw(st.permutations(range(3))))
    return geometry.flipped(draw(st.integers(0, 2))) if draw(st.booleans()) else geometry


def centres_ras(geometry: Geometry) -> np.ndarray:
    return geometry.ras_from_ijk(np.stack(np.indices(geometry.shape), axis=-1).reshape(-1, 3))


def cosines(geometry: Geometry) -> np.ndarray:
    return np.abs(geometry.direction_ras.T @ geometry.direction_ras - np.eye(3))


def ball(geometry: Geometry, centre_ras_mm: np.ndarray | None = None) -> torch.Tensor:
    """1 inside, 0 outside, over a border of a few mm: the same ball in the patient whatever the grid."""
    middle = middle_ras(geometry) if centre_ras_mm is None else centre_ras_mm
    distances = np.linalg.norm(centres_ras(geometry) - middle, axis=1)
    values = 1.0 / (1.0 + np.exp((distances - BALL_MM) / 1.2))
    return torch.from_numpy(values.reshape(1, *geometry.shape).astype(np.float32))


def middle_ras(geometry: Geometry) -> np.ndarray:
    return geometry.ras_from_ijk([(np.asarray(geometry.shape) - 1) / 2])[0]


def mass_and_centre(values: torch.Tensor, geometry: Geometry) -> tuple[float, np.ndarray]:
    weights = values[0].numpy().astype(np.float64).ravel()
    return weights.sum() * geometry.voxel_volume_mm3, weights @ centres_ras(geometry) / weights.sum()


def noise(geometry: Geometry) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).normal(size=(1, *geometry.shape)).astype(np.float32))


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """For tiny volumes, where two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestGrid:
    def test_by_hand(self) -> None:
        """18.5 degrees: 12 slices lean by 11 x 4 mm x sin = 13.96 mm, 14 more rows; 4 mm x cos = 3.793 mm apart."""
        source = tilted()
        assert source.is_sheared
        assert source.stack_axis == 2
        assert source.shear_degrees == pytest.approx(TILT_DEG)
        assert "LPS oblique by 18.5 degrees sheared by 18.5 degrees, first" in source.describe()
        straight = source.orthogonal()
        assert straight.shape == (40, 36 + 14, 12)
        assert straight.spacing_mm == pytest.approx((1.0, 1.0, 4 * np.cos(np.deg2rad(TILT_DEG))))
        np.testing.assert_allclose(straight.direction_ras[:, :2], source.direction_ras[:, :2])
        np.testing.assert_allclose(middle_ras(straight), middle_ras(source))
        assert not straight.is_sheared
        assert "sheared" not in straight.describe()

    @given(sheared())
    def test_the_orthogonal_grid_holds_every_voxel_and_no_more_than_needed(self, source: Geometry) -> None:
        straight = source.orthogonal()
        assert cosines(straight).max() < 1e-9
        assert straight.orthogonal() is straight
        assert straight.voxel_volume_mm3 == pytest.approx(source.voxel_volume_mm3)
        inside = straight.ijk_from_ras(centres_ras(source))
        assert (inside >= -1e-3).all()
        assert (inside <= np.asarray(straight.shape) - 1 + 1e-3).all()
        # Every slice keeps its plane, and no side has a whole voxel to spare.
        stack = source.stack_axis
        assert stack is not None
        np.testing.assert_allclose(inside[:, stack], np.rint(inside[:, stack]), atol=1e-6)
        assert (np.asarray(straight.shape) - 1 - np.ptp(inside, axis=0) < 1 + 1e-3).all()

    @given(sheared(), st.sampled_from(ALL_CODES))
    def test_turned_grids_have_the_same_orthogonal_grid(self, source: Geometry, codes: str) -> None:
        straight = source.orthogonal()
        turned = source.oriented(codes).orthogonal()
        assert straight.axis_map(turned).is_exact
        assert sorted(turned.shape) == sorted(straight.shape)

    @pytest.mark.parametrize("codes", ALL_CODES)
    def test_the_stack_is_found_in_any_axis_order(self, codes: str) -> None:
        """A tilt about the rows leaves both other axes at right angles to them; slices have square pixels."""
        stack = tilted(codes=codes).stack_axis
        assert stack is not None
        assert codes[stack] in "SI"

    def test_equal_sides_leave_the_body_axis(self) -> None:
        for codes in ALL_CODES:
            stack = tilted(spacing_mm=(1.0, 1.0, 1.0), codes=codes).stack_axis
            assert stack is not None
            assert codes[stack] in "SI"

    @given(sheared(), st.booleans())
    def test_axis_maps_say_where_each_voxel_lies(self, leaning: Geometry, there: bool) -> None:
        straight = leaning.orthogonal().oriented("RAS").respaced((1.1, 1.3, 2.9))
        source, target = (leaning, straight) if there else (straight, leaning)
        axes = source.axis_map(target)
        assert not axes.is_exact
        assert axes.stack_axis is not None
        ijk = np.stack(np.indices(target.shape), axis=-1).reshape(-1, 3)
        expected = np.empty(ijk.shape)
        for t, axis in enumerate(axes.source_axes):
            expected[:, axis] = axes.scales[t] * ijk[:, t] + axes.shears[t] * ijk[:, axes.stack_axis] + axes.offsets[t]
        np.testing.assert_allclose(source.ijk_from_ras(target.ras_from_ijk(ijk)), expected, atol=1e-6)

    def test_right_angles_within_the_tolerance_are_left_alone(self) -> None:
        nearly = tilted(tilt_deg=0.05)
        assert not nearly.is_sheared
        assert nearly.shear_degrees == 0
        assert nearly.orthogonal() is nearly
        assert tilted(tilt_deg=0.06).is_sheared

    def test_grids_without_a_right_angle(self) -> None:
        affine = np.eye(4)
        affine[0, 1], affine[0, 2], affine[1, 2] = 0.3, 0.2, 0.25
        crooked = Geometry((5, 6, 7), affine)
        assert crooked.is_sheared
        assert crooked.stack_axis is None
        with pytest.raises(ValueError, match=r"no two axes are at right angles: 5x6x7 .* sheared by"):
            crooked.orthogonal()
        assert crooked.axis_map(crooked.oriented("LPS").respaced((2, 2, 2))).stack_axis is None

    @pytest.mark.parametrize(
        ("spacing_mm", "tilt_deg", "message"),
        [
            ((1, 1, 4), 46, r"slices lean by more than 45 degrees: 40x36x12 .* sheared by 46\.0 degrees"),
            ((1e-5, 1e-5, 4), 30, r"slices lean by 2\.2e\+06 voxels"),
        ],
    )
    def test_what_leans_so_far_that_it_would_be_mostly_empty(
        self, spacing_mm: tuple[float, float, float], tilt_deg: float, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            tilted(spacing_mm=spacing_mm, tilt_deg=tilt_deg).orthogonal()

    def test_what_is_not_related_by_a_shift_of_slices(self) -> None:
        source = tilted()
        others = [
            tilted(tilt_deg=12).orthogonal(),
            tilted(tilt_deg=-TILT_DEG),
            tilted(tilt_deg=0),
            Geometry(source.shape, np.diag([-1.0, -1.0, 4.0, 1.0])),
        ]
        for other in others:
            for one, two in ((source, other), (other, source)):
                with pytest.raises(ValueError, match="not parallel"):
                    one.axis_map(two)


class TestMoving:
    @pytest.mark.parametrize("codes", ALL_CODES)
    def test_a_ball_there_and_back(self, codes: str) -> None:
        source = tilted(codes=codes)
        straight = source.orthogonal()
        expected, centre = mass_and_centre(ball(source), source)
        there = move(ball(source), source, straight, order=3)
        mass, place = mass_and_centre(there, straight)
        assert mass == pytest.approx(expected, rel=1e-3)
        np.testing.assert_allclose(place, centre, atol=0.01)
        np.testing.assert_allclose(there.numpy(), ball(straight).numpy(), atol=6e-3)
        back = move(there, straight, source, order=3)
        np.testing.assert_allclose(back.numpy(), ball(source).numpy(), atol=6e-3)

    def test_taken_for_orthogonal_it_would_be_no_ball(self) -> None:
        """What the test above would find if the shear were ignored."""
        source = tilted()
        ignored = Geometry(source.shape, tilted(tilt_deg=0).affine_ras)
        assert np.abs(ball(source).numpy() - ball(ignored).numpy()).max() > 0.3

    @pytest.mark.parametrize("codes", SOME_CODES)
    def test_to_another_spacing_at_once(self, codes: str) -> None:
        source = tilted(codes=codes)
        target = source.orthogonal().oriented("RAS").respaced((1.5, 1.25, 2.0))
        there = move(ball(source), source, target, order=3)
        np.testing.assert_allclose(there.numpy(), ball(target, middle_ras(source)).numpy(), atol=0.06)
        mass, place = mass_and_centre(there, target)
        expected, centre = mass_and_centre(ball(source), source)
        assert mass == pytest.approx(expected, rel=5e-3)
        np.testing.assert_allclose(place, centre, atol=0.05)

    @pytest.mark.parametrize("order", [1, 3])
    @pytest.mark.parametrize("codes", SOME_CODES)
    def test_scipy_agrees(self, codes: str, order: Order) -> None:
        """Where planes coincide a spline in space is a spline in the plane."""
        source = tilted((15, 14, 6), codes=codes)
        for one, two in ((source, source.orthogonal()), (source.orthogonal(), source)):
            voxels = noise(one)
            matrix = np.linalg.solve(one.affine_ras, two.affine_ras)
            theirs = affine_transform(
                voxels[0].double().numpy(), matrix, output_shape=two.shape, order=order, mode="mirror"
            )
            places = one.ijk_from_ras(centres_ras(two)).reshape(*two.shape, 3)
            inside = ((places >= -1e-9) & (places <= np.asarray(one.shape) - 1 + 1e-9)).all(axis=-1)
            assert inside.mean() > 0.5
            ours = move(voxels, one, two, order=order, fill=-7.0)[0].numpy()
            np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-5)
            far = ((places < -1.01) | (places > np.asarray(one.shape) + 0.01)).any(axis=-1)
            assert (ours[far] == -7.0).all()

    @pytest.mark.parametrize("order", [0, 1, 3])
    def test_nothing_is_interpolated_between_slices(self, order: Order) -> None:
        source = tilted((15, 14, 6))
        straight = source.orthogonal()
        for one, two in ((source, straight), (straight, source)):
            voxels = noise(one)
            changed = voxels.clone()
            changed[..., 3] += 100
            moved = move(changed, one, two, order=order) != move(voxels, one, two, order=order)
            assert [bool(moved[..., k].any()) for k in range(6)] == [False, False, False, True, False, False]

    @pytest.mark.parametrize("codes", SOME_CODES)
    def test_shifts_by_whole_voxels_are_copies(self, codes: str) -> None:
        """A stack that leans by one row a slice; an odd number of slices has one in the middle."""
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        affine[1, 2] = -1.0
        source = Geometry((5, 6, 3), affine).oriented(codes)
        voxels = noise(source)
        straight = source.orthogonal().oriented("RAS")
        assert straight.shape == (5, 8, 3)
        there = move(voxels, source, straight, order=1, fill=9.0)
        leaning = move(voxels, source, source.oriented("RAS"))
        for k in range(3):
            assert torch.equal(there[:, :, 2 - k : 8 - k, k], leaning[..., k])
        assert torch.equal(move(there, straight, source), voxels)

    def test_a_ramp_stays_a_ramp(self) -> None:
        source = tilted((14, 12, 8))
        target = source.orthogonal().oriented("SAR").respaced((1.7, 0.8, 0.9))

        def ramp(geometry: Geometry) -> torch.Tensor:
            values = (centres_ras(geometry) @ [1.0, -2.0, 0.5]).reshape(1, *geometry.shape)
            return torch.from_numpy(values.astype(np.float32))

        places = source.ijk_from_ras(centres_ras(target)).reshape(*target.shape, 3)
        inside = ((places >= 0) & (places <= np.asarray(source.shape) - 1)).all(axis=-1)
        # Between two slices the wedge beside one of them is no part of the ramp.
        inside &= (np.abs(places[..., 1] - 5.5) < 3.5) & inside
        moved = move(ramp(source), source, target, order=1, fill=0.0)[0].numpy()
        assert inside.sum() > 200
        np.testing.assert_allclose(moved[inside], ramp(target)[0].numpy()[inside], atol=1e-4)

    @pytest.mark.parametrize("codes", SOME_CODES)
    def test_classes_and_scores(self, codes: str) -> None:
        """Two balls of two classes, as labels and as scores: volumes and centres stay, numbers are never mixed."""
        source = tilted(codes=codes)
        shift = np.array([2.0, -4.0, 4.0])
        whole = ball(source) > 0.5
        core = ball(source, middle_ras(source) + shift) > 0.8
        classes = torch.where(core, 300, torch.where(whole, 2, 0)).to(torch.int32)
        straight = source.orthogonal()
        there = move_classes(classes, source, straight)
        assert there.dtype == torch.int32
        assert there.unique().tolist() == [0, 2, 300]
        for number in (2, 300):
            expected, centre = mass_and_centre((classes == number).float(), source)
            mass, place = mass_and_centre((there == number).float(), straight)
            assert mass == pytest.approx(expected, rel=0.03)
            np.testing.assert_allclose(place, centre, atol=0.3)
        back = move_classes(there, straight, source)
        assert (back != classes).float().mean() < 0.01
        scores = torch.cat([(there == number).float() for number in (0, 2, 300)])
        winner = move_argmax(scores, straight, source)
        assert torch.equal(winner[0].long(), torch.unique(back, return_inverse=True)[1][0])
        # And from a sheared grid to an orthogonal one, where what was never measured is background.
        assert (
            int(move_argmax(torch.ones(2, *source.shape), source, straight.window((-3, -3, -3), (4, 4, 4))).sum()) == 0
        )

    def test_only_a_finite_value_can_lie_beside_slices(self) -> None:
        source = tilted((4, 4, 4))
        with pytest.raises(ValueError, match="filled with a finite value, found -inf"):
            move(noise(source), source, source.orthogonal(), fill=-torch.inf)


class TestChain:
    @pytest.mark.parametrize("codes", ALL_CODES)
    def test_every_orientation_is_placed_alike(self, codes: str) -> None:
        place = OrientAndRespaced(
            ["image", "label"], class_keys=["label"], axis_codes="RAS", spacing_mm=(1.5, 1.5, 3.0)
        )
        source, turned = tilted(codes="RAS"), tilted(codes=codes)
        found = []
        for grid in (source, turned):
            image = torch.cat([ball(grid) * 700 - 1000, ball(grid) + 2])
            data = {"image": as_metatensor(image, grid), "label": as_metatensor((ball(grid) > 0.5).byte(), grid)}
            found.append(place(data))
        first, second = found
        assert geometry_of(first["image"]).difference(geometry_of(second["image"])) is None
        np.testing.assert_allclose(first["image"].numpy(), second["image"].numpy(), atol=2e-2)
        assert torch.equal(first["label"].as_tensor(), second["label"].as_tensor())

    def test_what_was_never_measured_is_each_channels_lowest_value(self) -> None:
        source = tilted()
        values = torch.cat([ball(source) * 700 - 1000, ball(source) + 2])
        place = OrientAndRespaced(["image"], class_keys=(), axis_codes="RAS", spacing_mm=(1.0, 1.0, 3.793))
        image = place({"image": as_metatensor(values, source)})["image"]
        grid = geometry_of(image)
        assert not grid.is_sheared
        assert grid.axis_codes == "RAS"
        assert image[:, 0, -1, 0].tolist() == pytest.approx([-1000.0, 2.0], abs=0.01)
        np.testing.assert_allclose(image[0].numpy(), ball(grid, middle_ras(source))[0].numpy() * 700 - 1000, atol=20)


def test_nibabel_turns_sheared_grids_alike() -> None:
    source = tilted()
    image = nib.as_closest_canonical(nib.Nifti1Image(np.zeros(source.shape, np.uint8), source.affine_ras))
    assert Geometry(image.shape, image.affine).difference(source.oriented("RAS")) is None
