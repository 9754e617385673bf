"""Where patches and tiles lie: worked out by hand, and for any shape by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.signal.windows import gaussian

from transforms import patches
from transforms.patches import (
    GAUSSIAN_SIGMA,
    SMALLEST_WEIGHT,
    VOXELS_PER_CLASS,
    blending_weights,
    class_positions,
    draw_centre,
    nnunet_weights,
    padding_to,
    tile_starts,
)

Triple = tuple[int, int, int]
NOWHERE = np.empty((0, 4), np.int32)

sides = st.tuples(*[st.integers(1, 40)] * 3)


def starts(
    shape: Triple, patch: Triple, positions: np.ndarray = NOWHERE, share: float = 0.5, count: int = 200
) -> np.ndarray:
    """First voxels (count, 3) of drawn patches."""
    random = np.random.RandomState(0)
    centres = [draw_centre(random, shape, patch, positions=positions, foreground_share=share) for _ in range(count)]
    return np.asarray(centres) - (np.asarray(patch) - 1) / 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_positions_by_hand(dtype: type[np.uint8 | np.uint16]) -> None:
    classes = np.zeros((3, 4, 5), dtype)
    classes[0, 1, 2], classes[2, 3, 4], classes[1, 0, 0] = 3, 1, 3
    positions = class_positions(classes, class_count=4)
    assert positions.dtype == np.int32
    assert positions.tolist() == [[1, 2, 3, 4], [3, 0, 1, 2], [3, 1, 0, 0]]


@pytest.mark.parametrize("class_count", [1, 3])
def test_no_positions_without_foreground(class_count: int) -> None:
    assert class_positions(np.zeros((3, 4, 5), np.uint8), class_count=class_count).shape == (0, 4)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_small_classes_are_complete(seed: int) -> None:
    classes = np.random.default_rng(seed).integers(0, 4, (7, 6, 5)).astype(np.uint8)
    found = {tuple(row) for row in class_positions(classes, class_count=4).tolist()}
    assert found == {(int(classes[ijk]), *ijk) for ijk in np.ndindex(classes.shape) if classes[ijk]}


@pytest.mark.parametrize(("size", "kept"), [(50, 50), (51, 26), (99, 50), (100, 50), (101, 34), (150, 50), (1000, 50)])
def test_large_classes_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch, size: int, kept: int) -> None:
    """Every second, third, ... voxel, so that never more than the bound are left, from one end to the other."""
    monkeypatch.setattr(patches, "VOXELS_PER_CLASS", 50)
    classes = np.zeros((size + 3, 1, 1), np.uint8)
    classes[:size] = 1
    classes[size:] = 2
    positions = class_positions(classes, class_count=3)
    large = positions[positions[:, 0] == 1]
    assert len(large) == kept
    assert len(set(np.diff(large[:, 1]))) == 1
    assert large[0, 1] == 0
    assert large[-1, 1] >= size - size / kept - 1
    assert len(positions) == kept + 3


def test_the_bound_on_positions_holds_for_real_sizes() -> None:
    classes = np.ones((19_999, 1, 1), np.uint8)
    assert VOXELS_PER_CLASS / 2 < len(class_positions(classes, class_count=2)) <= VOXELS_PER_CLASS


@given(sides, sides, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 10_000))
@settings(max_examples=200)
def test_patches_lie_inside_as_far_as_they_fit(shape: Triple, patch: Triple, share: float, seed: int) -> None:
    """On whole voxels; along an axis that is too short the volume is in the middle, as prediction pads it."""
    random = np.random.RandomState(seed)
    voxel = random.randint(0, shape)
    positions = np.asarray([[2, *voxel]], np.int32)
    centre = draw_centre(random, shape, patch, positions=positions, foreground_share=share)
    start = centre - (np.asarray(patch) - 1) / 2
    assert np.array_equal(start, np.rint(start))
    for axis, (before, _) in enumerate(padding_to(shape, patch)):
        if shape[axis] >= patch[axis]:
            assert 0 <= start[axis] <= shape[axis] - patch[axis]
        else:
            assert start[axis] == -before
        if share == 1.0:
            assert start[axis] <= voxel[axis] < start[axis] + patch[axis]


def test_a_foreground_patch_is_centred_where_there_is_room() -> None:
    positions = np.asarray([[1, 20, 15, 2]], np.int32)
    found = starts((40, 40, 40), (9, 9, 9), positions, share=1.0, count=3)
    assert found.tolist() == [[16, 11, 0]] * 3


def test_every_place_is_drawn_about_as_often() -> None:
    """Without foreground the centre is uniform, so only starts at the ends, where patches are pushed in, are drawn
    more often."""
    found = starts((20, 12, 1), (5, 12, 1), count=4000)[:, 0]
    counts = np.bincount(found.astype(int), minlength=16)
    assert len(counts) == 16
    expected = 4000 / 19
    assert counts[1:-1] == pytest.approx(expected, abs=5 * np.sqrt(expected))
    assert counts[[0, -1]] == pytest.approx(2.5 * expected, abs=5 * np.sqrt(2.5 * expected))


def test_classes_are_drawn_evenly_and_in_their_share() -> None:
    """A class of one voxel as often as one of a thousand; those that are absent (2) not at all."""
    large = np.concatenate([np.ones((1000, 1)), np.random.RandomState(1).randint(0, 20, (1000, 3))], axis=1)
    positions = np.concatenate([large, [[3, 50, 50, 50]]]).astype(np.int32)
    found = starts((60, 60, 60), (3, 3, 3), positions, share=0.6, count=4000)
    rare = (found == 49).all(axis=1).mean()
    assert rare == pytest.approx(0.3, abs=0.03)
    # Of the rest, 0.3 lie about the large class and 0.4 anywhere, (20.5 / 59)^3 of those in its corner.
    corner = (found + 1 < 20).all(axis=1).mean()
    assert corner == pytest.approx(0.3 + 0.4 * (19.5 / 59) ** 3, abs=0.03)


def test_a_draw_is_that_of_its_seed() -> None:
    positions = np.asarray([[1, 20, 15, 2], [2, 1, 1, 1]], np.int32)
    assert np.array_equal(starts((40, 40, 40), (9, 8, 7), positions), starts((40, 40, 40), (9, 8, 7), positions))


@pytest.mark.parametrize(
    ("size", "side", "step", "expected"),
    [
        (10, 10, 0.5, [0]),
        (11, 10, 0.5, [0, 1]),
        (15, 10, 0.5, [0, 5]),
        (16, 10, 0.5, [0, 3, 6]),
        (30, 10, 1.0, [0, 10, 20]),
        (4, 1, 0.5, [0, 1, 2, 3]),
        (1, 1, 1.0, [0]),
    ],
)
def test_tiles_by_hand(size: int, side: int, step: float, expected: list[int]) -> None:
    assert tile_starts((size, 1, 1), (side, 1, 1), step=step) == [(i, 0, 0) for i in expected]
    assert tile_starts((1, 2, size), (1, 1, side), step=step) == [(0, j, k) for j in (0, 1) for k in expected]


@given(sides, sides, st.floats(0.05, 1.0))
@settings(max_examples=150)
def test_tiles_cover_the_volume_and_nothing_else(shape: Triple, patch: Triple, step: float) -> None:
    assume(all(n >= p for n, p in zip(shape, patch, strict=True)))
    found = np.asarray(tile_starts(shape, patch, step=step))
    assert len({tuple(row) for row in found.tolist()}) == len(found)
    for axis, (size, side) in enumerate(zip(shape, patch, strict=True)):
        firsts = np.unique(found[:, axis])
        assert firsts[0] == 0
        assert firsts[-1] == size - side
        gaps = np.diff(firsts)
        assert (gaps <= max(1, np.ceil(side * step))).all()
        if len(gaps):
            assert gaps.max() - gaps.min() <= 1 + (side * step < 2)
        # Not one tile more than needed: with one fewer, the mean gap would pass the step.
        assert (len(firsts) - 2) * max(1.0, side * step) < size - side or len(firsts) == 1
    assert len(found) == np.prod([len(np.unique(found[:, axis])) for axis in range(3)])


def test_a_volume_smaller_than_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(9, 10, 10\) is smaller than the patch \(10, 10, 10\)"):
        tile_starts((9, 10, 10), (10, 10, 10), step=0.5)


@given(sides)
@settings(max_examples=40)
def test_blending_weights_are_symmetric_and_positive(patch: Triple) -> None:
    weights = blending_weights(patch)
    assert weights.shape == patch
    assert weights.dtype == torch.float32
    assert float(weights.max()) == 1.0
    assert float(weights.min()) >= np.float32(SMALLEST_WEIGHT)
    for axis in range(3):
        assert torch.equal(weights, weights.flip(axis))
    assert float(weights[patch[0] // 2, patch[1] // 2, patch[2] // 2]) == 1.0


@pytest.mark.parametrize("patch", [(16, 24, 10), (9, 1, 32), (1, 1, 1)])
def test_blending_weights_are_a_product_of_gaussians(patch: Triple) -> None:
    profiles = [gaussian(side, GAUSSIAN_SIGMA * side) for side in patch]
    product = np.einsum("i,j,k->ijk", *[profile / profile.max() for profile in profiles])
    np.testing.assert_allclose(blending_weights(patch).numpy(), np.maximum(product, SMALLEST_WEIGHT), rtol=1e-6)


def test_corners_are_raised_to_the_smallest_weight() -> None:
    weights = blending_weights((32, 32, 32))
    assert float(weights[0, 0, 0]) == pytest.approx(SMALLEST_WEIGHT)
    assert float(weights[4, 16, 16]) == pytest.approx(np.exp(-0.5 * (11.5**2 - 0.5**2) / 4**2))


@given(sides, sides)
def test_padding_makes_room_as_evenly_as_can_be(shape: Triple, patch: Triple) -> None:
    for n, p, (before, after) in zip(shape, patch, padding_to(shape, patch), strict=True):
        assert before + n + after == max(n, p)
        assert 0 <= before <= after <= before + 1


def test_padding_by_hand() -> None:
    assert padding_to((10, 7, 4), (10, 10, 2)) == ((0, 0), (1, 2), (0, 0))


def test_where_voxels_are_ignored_all_that_counts_is_class_0_too() -> None:
    classes = np.full((3, 4, 5), 3, np.uint8)
    classes[0, 1, 2], classes[2, 3, 4], classes[1, 0, 0] = 0, 1, 2
    positions = class_positions(classes, class_count=3)
    assert positions.tolist() == [[0, 0, 1, 2], [0, 1, 0, 0], [0, 2, 3, 4], [1, 2, 3, 4], [2, 1, 0, 0]]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_patch_is_drawn_about_an_ignored_voxel(share: float) -> None:
    """The only background that counts is at (2, 2, 2), the only label at (7, 7, 7)."""
    classes = np.full((9, 9, 9), 2, np.uint8)
    classes[2, 2, 2], classes[7, 7, 7] = 0, 1
    found = starts((9, 9, 9), (1, 1, 1), class_positions(classes, class_count=2), share=share)
    assert {tuple(start) for start in found.tolist()} <= {(2, 2, 2), (7, 7, 7)}
    about_label = float((found[:, 0] == 7).mean())
    assert about_label == pytest.approx(share + (1 - share) / 2, abs=0.1)


def test_with_nothing_but_labels_counted_these_are_drawn() -> None:
    classes = np.full((9, 9, 9), 2, np.uint8)
    classes[7, 7, 7] = 1
    assert {tuple(s) for s in starts((9, 9, 9), (1, 1, 1), class_positions(classes, class_count=2)).tolist()} == {
        (7, 7, 7)
    }


def test_weights_of_nnunet_by_hand() -> None:
    """Along an axis of 8 sigma is 1 and the centre is voxel 4, so that the ends differ."""
    weights = nnunet_weights((8, 1, 1))[:, 0, 0]
    expected = np.float16(10 * np.exp(-0.5 * (np.arange(8) - 4.0) ** 2))
    assert weights.tolist() == expected.tolist()


def test_weights_of_nnunet_are_what_scipy_makes_of_one_voxel() -> None:
    patch = (20, 28, 16)
    one = np.zeros(patch)
    one[10, 14, 8] = 1
    blurred = gaussian_filter(one, [n / 8 for n in patch], mode="constant")
    expected = (blurred / (blurred.max() / 10)).astype(np.float16)
    rounded_away = expected == 0
    assert rounded_away.any()
    expected[rounded_away] = expected[~rounded_away].min()
    assert nnunet_weights(patch).numpy() == pytest.approx(expected.astype(np.float32), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(("size", "side", "overlap"), [(50, 24, 0.5), (50, 24, 0.3), (24, 24, 0.5), (25, 24, 0.9)])
def test_stepped_tiles_lie_where_monai_has_them(size: int, side: int, overlap: float) -> None:
    from monai.data.utils import dense_patch_slices

    interval = side if size == side else int(side * (1 - overlap))
    theirs = dense_patch_slices((size, 8, 8), (side, 8, 8), (interval, 8, 8))
    found = tile_starts((size, 8, 8), (side, 8, 8), step=1 - overlap, spread=False)
    assert found == [tuple(box.start for box in boxes) for boxes in theirs]
