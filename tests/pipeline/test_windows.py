"""Sliding windows, with networks whose answer is known at every voxel."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from pipeline import tile_scores
from pipeline.models.registry import build_network
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet
from pipeline.onednn import OneDnnConvolutions
from pipeline.windows import WindowSettings, mirror_passes, predict_windows, window_shape

pytestmark = pytest.mark.usefixtures("one_thread")

Triple = tuple[int, int, int]


def settings(
    patch: Triple = (8, 8, 8),
    *,
    factor: Triple = (4, 4, 4),
    step: float = 0.5,
    mirror: tuple[int, ...] = (),
    twins: tuple[int, ...] = (0, 1, 2),
) -> WindowSettings:
    return WindowSettings(patch, factor, step, mirror, twins)


def volume(shape: Triple, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(seed))


def pointwise(image: Tensor) -> Tensor:
    """Logits of three classes that depend on each voxel alone."""
    first = image[:, :1]
    return torch.cat([torch.zeros_like(first), first, first.square() - 1], dim=1)


def constant(image: Tensor) -> Tensor:
    logits = torch.tensor([0.5, 2.0, -1.0]).reshape(1, 3, 1, 1, 1)
    return logits.expand(image.shape[0], 3, *image.shape[2:])


class Recorder:
    """A pointwise network that remembers what it was given."""

    def __init__(self) -> None:
        self.tiles: list[Tensor] = []

    def __call__(self, image: Tensor) -> Tensor:
        self.tiles.append(image.clone())
        return pointwise(image)


SHAPES: list[Triple] = [(8, 8, 8), (20, 21, 22), (5, 30, 8), (3, 2, 1), (8, 13, 40)]


class TestBlending:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("step", [0.3, 0.5, 1.0])
    def test_a_constant_network_is_constant(self, shape: Triple, step: float) -> None:
        found = predict_windows(constant, volume(shape), settings(step=step))
        expected = torch.tensor([0.5, 2.0, -1.0]).softmax(dim=0)
        assert found.shape == (3, *shape)
        torch.testing.assert_close(found, expected.reshape(3, 1, 1, 1).expand_as(found), atol=3e-6, rtol=0)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("mirror", [(), (0,), (1, 2), (0, 1, 2)])
    def test_a_pointwise_network_sees_no_tiles(self, shape: Triple, mirror: tuple[int, ...]) -> None:
        image = volume(shape)
        found = predict_windows(pointwise, image, settings(mirror=mirror))
        torch.testing.assert_close(found, pointwise(image[None])[0].softmax(dim=0), atol=1e-6, rtol=1e-5)

    def test_probabilities_sum_to_one(self) -> None:
        network = torch.nn.Conv3d(1, 3, 3, padding=1)
        with torch.inference_mode():
            found = predict_windows(network, volume((20, 9, 30)), settings(mirror=(0, 1)))
        torch.testing.assert_close(found.sum(dim=0), torch.ones(20, 9, 30), atol=1e-5, rtol=0)

    def test_tiles_count_most_at_their_centre(self) -> None:
        """Of two overlapping tiles with different answers, each wins near its own middle."""

        def by_content(image: Tensor) -> Tensor:
            winner = 1 if bool(image[0, 0, 0, 0, 0] == 0) else 2
            logits = torch.zeros(1, 3, *image.shape[2:])
            logits[:, winner] = 20
            return logits

        image = torch.arange(14.0).reshape(1, 14, 1, 1).expand(1, 14, 8, 8)
        # 14 > 1.5 * 8, so there are tiles at 0 and 6, or closer.
        classes = predict_windows(by_content, image, settings(step=1.0)).argmax(dim=0)[:, 4, 4]
        assert classes.tolist() == [1] * 7 + [2] * 7

    def test_every_tile_is_of_one_shape_inside_the_volume(self) -> None:
        network = Recorder()
        predict_windows(network, volume((20, 8, 13)), settings())
        assert {tuple(tile.shape) for tile in network.tiles} == {(1, 1, 8, 8, 8)}
        assert len(network.tiles) == 4 * 1 * 3


class TestPadding:
    def test_it_is_the_volumes_minimum_on_both_sides_and_cut_off_again(self) -> None:
        network, image = Recorder(), volume((3, 8, 5))
        found = predict_windows(network, image, settings())
        (tile,) = network.tiles
        assert tile.shape == (1, 1, 8, 8, 8)
        torch.testing.assert_close(tile[0, :, 2:5, :, 1:6], image)
        outside = torch.ones(8, 8, 8, dtype=torch.bool)
        outside[2:5, :, 1:6] = False
        assert (tile[0, 0][outside] == image.min()).all()
        assert found.shape == (3, 3, 8, 5)

    def test_each_channel_keeps_its_place(self) -> None:
        network, image = Recorder(), volume((3, 8, 5), channels=2)
        predict_windows(network, image, settings())
        torch.testing.assert_close(network.tiles[0][0, :, 2:5, :, 1:6], image)


class TestWindowShape:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((8, 8, 8), (8, 8, 8)),
            ((3, 8, 5), (8, 8, 8)),  # smaller volumes are padded to the patch
            ((9, 11, 12), (12, 12, 12)),  # up to half as long again in one tile, rounded up to the factor
            ((13, 12, 100), (8, 12, 8)),  # 13 would want 16, twice the patch
        ],
    )
    def test_it_takes_a_volume_whole_where_that_is_hardly_longer(self, shape: Triple, expected: Triple) -> None:
        assert window_shape(shape, settings()) == expected

    def test_a_slice_stays_a_slice(self) -> None:
        assert window_shape((30, 30, 2), settings((24, 24, 1), factor=(4, 4, 1))) == (32, 32, 1)

    def test_one_tile_is_what_the_network_says(self) -> None:
        network = torch.nn.Conv3d(1, 3, 3, padding=1)
        image = volume((12, 12, 12))
        with torch.inference_mode(), OneDnnConvolutions():
            assert torch.equal(predict_windows(network, image, settings()), network(image[None])[0].softmax(dim=0))


class TestMirroring:
    def test_passes_are_all_combinations(self) -> None:
        assert mirror_passes(()) == [()]
        assert mirror_passes((1,)) == [(), (1,)]
        assert mirror_passes((2, 0)) == [(), (0,), (2,), (0, 2)]
        assert len(mirror_passes((0, 1, 2))) == 8

    def test_the_result_is_the_mean_over_flips(self) -> None:
        network = torch.nn.Conv3d(1, 3, 3, padding=1)
        image = volume((12, 8, 10))
        with torch.inference_mode():
            found = predict_windows(network, image, settings((12, 8, 12), mirror=(0, 2)))
            padded = torch.nn.functional.pad(image, (1, 1), value=float(image.min()))
            expected = torch.zeros(3, 12, 8, 12)
            for flip_i, flip_k in product([False, True], repeat=2):
                dims = [d for d, flip in ((1, flip_i), (3, flip_k)) if flip]
                expected += network(padded.flip(dims)[None])[0].softmax(dim=0).flip(dims) / 4
        torch.testing.assert_close(found, expected[..., 1:11], atol=1e-6, rtol=1e-5)

    def test_left_and_right_are_exchanged_when_x_is_mirrored(self) -> None:
        """A network that calls the low-x half class 1 and the other class 2 agrees with its mirrored self."""

        def by_side(image: Tensor) -> Tensor:
            side = image.shape[2]
            logits = torch.zeros(1, 3, *image.shape[2:])
            logits[:, 1, : side // 2] = 20
            logits[:, 2, side // 2 :] = 20
            return logits

        image = volume((8, 8, 8))
        once = predict_windows(by_side, image, settings())
        twice = predict_windows(by_side, image, settings(mirror=(0,), twins=(0, 2, 1)))
        torch.testing.assert_close(twice, once)
        confused = predict_windows(by_side, image, settings(mirror=(0,), twins=(0, 1, 2)))
        torch.testing.assert_close(confused[1], confused[2])

    def test_they_are_not_when_another_axis_is(self) -> None:
        def left(image: Tensor) -> Tensor:
            logits = torch.zeros(1, 3, *image.shape[2:])
            logits[:, 1] = 20
            return logits

        found = predict_windows(left, volume((8, 8, 8)), settings(mirror=(1, 2), twins=(0, 2, 1)))
        assert (found[1] > 0.99).all()


def test_a_deeply_supervised_network_answers_at_full_resolution() -> None:
    spec = UNetSpec(
        out_channels=3,
        features=(4, 8),
        strides=((1, 1, 1), (2, 2, 2)),
        kernel_shapes=((3, 3, 3),) * 2,
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
        deep_supervision=True,
    )
    network = build_network("unet", spec, (8, 8, 8), generator=torch.Generator().manual_seed(0)).eval()
    with torch.inference_mode():
        found = predict_windows(network, volume((8, 8, 8)), settings(factor=(2, 2, 2)))
    assert found.shape == (3, 8, 8, 8)


@pytest.mark.parametrize("mirror", [(), (0, 2)])
def test_logits_of_many_classes_are_made_piece_by_piece(
    mirror: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = UNetSpec(
        out_channels=40,
        features=(4, 8),
        strides=((1, 1, 1), (2, 2, 2)),
        kernel_shapes=((3, 3, 3),) * 2,
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    network = build_network("unet", spec, (8, 8, 8), generator=torch.Generator().manual_seed(0)).eval()
    assert isinstance(network, UNet)
    made: list[int] = []
    network.heads[0].register_forward_hook(lambda _, __, logits: made.append(logits.numel()))
    monkeypatch.setattr(tile_scores, "CHUNK_VALUES", 40 * 3 * 8 * 8)
    wanted = settings(factor=(2, 2, 2), mirror=mirror, twins=tuple(range(40)))
    with torch.inference_mode():
        found = predict_windows(network, volume((20, 8, 8)), wanted)
        assert max(made) == 40 * 3 * 8 * 8
        monkeypatch.setattr(tile_scores, "widening", lambda _: None)
        whole = predict_windows(network, volume((20, 8, 8)), wanted)
    assert max(made) == 40 * 8 * 8 * 8
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shape", "count"), [((8, 8, 8), 1), ((20, 8, 8), 4)])
def test_every_tile_is_told(shape: Triple, count: int) -> None:
    told: list[tuple[int, int]] = []
    predict_windows(constant, volume(shape), settings(), on_tile=lambda done, total: told.append((done, total)))
    assert told == [(n + 1, count) for n in range(count)]


def test_every_channel_is_padded_with_its_own_minimum() -> None:
    """A case without its second channel, in a window that is larger than the volume."""
    image = volume((5, 8, 8), channels=3) + torch.tensor([10.0, 0, -10]).reshape(3, 1, 1, 1)
    image[1] = 0
    recorder = Recorder()
    predict_windows(recorder, image, settings())
    (tile,) = recorder.tiles
    assert torch.equal(tile[0, :, 1:6], image)
    for plane in (0, 6, 7):
        expected = image.flatten(1).amin(dim=1).reshape(3, 1, 1).expand(3, 8, 8)
        assert torch.equal(tile[0, :, plane], expected)
