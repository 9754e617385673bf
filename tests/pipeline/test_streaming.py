"""Scores that stream: the same as if the whole volume had been held, whatever is held at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.live_scores import FIXED_POINT, MOST_FLOAT32_OUTPUTS, LiveScores, store_of
from pipeline.models.registry import build_network
from pipeline.models.spec import UNetSpec
from pipeline.outputs import Goal, segment_image
from pipeline.plan import InferenceConventions
from pipeline.tiling import WindowSettings, lay_out
from pipeline.windows import AT_ONCE, Member, Pace, predict_windows, stream_windows
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, Region, schema_from_names
from transforms.patches import blending_weights, tile_starts

pytestmark = pytest.mark.usefixtures("one_thread")

Triple = tuple[int, int, int]
Blend = Literal["probabilities", "logits"]


def settings(patch: Triple = (8, 8, 8), outputs: int = 3, **values: object) -> WindowSettings:
    found = WindowSettings(patch, (1, 1, 1), 0.5, (), tuple(range(outputs)))
    return replace(found, **values)  # type: ignore[arg-type]


def network(outputs: int = 3, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    convolution = torch.nn.Conv3d(1, outputs, 3, padding=1)
    for values in convolution.parameters():
        torch.nn.init.normal_(values, generator=generator)
    return convolution.requires_grad_(False)


def volume(shape: Triple, seed: int = 0) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def by_hand(net: torch.nn.Module, image: Tensor, patch: Triple) -> Tensor:
    """Sums of weighted probabilities over sums of weights, in double precision, all of the volume at once."""
    weights = blending_weights(patch).double()
    total, coverage = torch.zeros(()), torch.zeros(image.shape[1:], dtype=torch.float64)
    for start in tile_starts(image.shape[1:], patch, step=0.5):
        box = tuple(slice(a, a + n) for a, n in zip(start, patch, strict=True))
        scores = net(image[(slice(None), *box)][None])[0].softmax(dim=0).double()
        if not total.ndim:
            total = torch.zeros((len(scores), *image.shape[1:]), dtype=torch.float64)
        total[(slice(None), *box)] += scores * weights
        coverage[box] += weights
    return total / coverage


def streamed(members: list[Member], image: Tensor, pace: Pace = AT_ONCE) -> tuple[Tensor, list[int]]:
    layout = lay_out(image.shape[1:], [member.settings for member in members])
    slabs = [(first, slab.clone()) for first, slab in stream_windows(members, image, layout, pace=pace)]
    assert [first for first, _ in slabs] == np.cumsum([0, *(s.shape[layout.axis + 1] for _, s in slabs)])[:-1].tolist()
    return torch.cat([slab for _, slab in slabs], dim=layout.axis + 1), [s.shape[layout.axis + 1] for _, s in slabs]


SHAPES: list[Triple] = [(30, 13, 14), (13, 30, 14), (13, 14, 30), (20, 20, 20)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stream_is_what_the_whole_volume_gives(shape: Triple) -> None:
    image, net = volume(shape), network()
    found = predict_windows(net, image, settings(conventions=InferenceConventions(longest_window=1.0)))
    torch.testing.assert_close(found.double(), by_hand(net, image, (8, 8, 8)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", [3, MOST_FLOAT32_OUTPUTS + 1])
def test_slabs_of_any_size_are_the_same_bits(shape: Triple, outputs: int) -> None:
    members = [Member(network(outputs), settings(outputs=outputs))]
    whole, _ = streamed(members, volume(shape))
    for planes in (1, 3):
        found, sizes = streamed(members, volume(shape), Pace(slab_planes=planes))
        assert max(sizes) <= planes
        assert torch.equal(found, whole)


@pytest.mark.parametrize("outputs", [3, MOST_FLOAT32_OUTPUTS, MOST_FLOAT32_OUTPUTS + 1])
@pytest.mark.parametrize("mirror", [(), (1,)])
def test_a_figure_is_one_channel_more_and_changes_no_other(outputs: int, mirror: tuple[int, ...]) -> None:
    members = [Member(network(outputs, seed), settings(outputs=outputs, mirror_axes=mirror)) for seed in range(2)]
    image = volume((13, 14, 30))
    layout = lay_out(image.shape[1:], [member.settings for member in members])
    plain, _ = streamed(members, image)
    slabs = stream_windows(members, image, layout, figure=lambda scores: scores[0] - 2 * scores[1])
    found = torch.cat([slab.clone() for _, slab in slabs], dim=layout.axis + 1)
    assert torch.equal(found[:-1], plain)
    # This one is linear, so that its mean is the figure of the mean.
    torch.testing.assert_close(found[-1], plain[0] - 2 * plain[1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_a_batch_of_windows_gives_the_same_bits(block: str) -> None:
    spec = UNetSpec(
        out_channels=3,
        features=(4, 8),
        strides=((1, 1, 1), (2, 2, 2)),
        kernel_shapes=((3, 3, 3),) * 2,
        encoder_blocks=(2, 2),
        decoder_blocks=(2,),
        block=block,  # type: ignore[arg-type]
    )
    net = build_network("unet", spec, (8, 8, 8), generator=torch.Generator().manual_seed(0)).eval()
    with torch.inference_mode():
        whole, _ = streamed([Member(net, settings())], volume((20, 21, 22)))
        for batch in (2, 5, 100):
            assert torch.equal(streamed([Member(net, settings())], volume((20, 21, 22)), Pace(batch=batch))[0], whole)


@pytest.mark.parametrize("patches", [((8, 8, 8), (8, 8, 8)), ((8, 8, 8), (12, 6, 10)), ((8, 8, 8), (20, 20, 20))])
def test_networks_are_averaged_whatever_their_windows(patches: tuple[Triple, Triple]) -> None:
    image = volume((13, 14, 30))
    members = [Member(network(seed=seed), settings(patch)) for seed, patch in enumerate(patches)]
    found, _ = streamed(members, image)
    each = [predict_windows(member.network, image, member.settings) for member in members]
    torch.testing.assert_close(found, (each[0] + each[1]) / 2, atol=1e-6, rtol=0)


class TestConventions:
    def test_logits_are_blended_as_they_are(self) -> None:
        conventions = InferenceConventions(blend="logits", longest_window=1.0)
        found = predict_windows(network(), volume((8, 8, 8)), settings(conventions=conventions))
        assert torch.equal(found, network()(volume((8, 8, 8))[None])[0])

    def test_the_mean_of_logits_is_not_that_of_probabilities(self) -> None:
        """Class 1 by 9 to 1 and class 2 by 3 to 1 each against the third: logits take the one, whoever asks."""

        def constant(*logits: float) -> Member:
            answer = torch.tensor(logits).reshape(1, 3, 1, 1, 1)
            return Member(lambda image: answer.expand(1, 3, *image.shape[2:]), wanted)

        for blend, expected in (("logits", [4.0, 1.0, -1.0]), ("probabilities", None)):
            wanted = settings(conventions=InferenceConventions(blend=blend))  # type: ignore[arg-type]
            found, _ = streamed([constant(8, 0, 0), constant(0, 2, -2)], volume((8, 8, 8)))
            mean = torch.stack([torch.tensor([8.0, 0, 0]).softmax(0), torch.tensor([0.0, 2, -2]).softmax(0)]).mean(0)
            torch.testing.assert_close(found[:, 3, 4, 5], mean if expected is None else torch.tensor(expected))

    def test_padding_may_be_zero(self) -> None:
        seen: list[Tensor] = []

        def remember(image: Tensor) -> Tensor:
            seen.append(image.clone())
            return torch.cat([image, image, image], dim=1)

        image = volume((3, 8, 5)) - 9
        predict_windows(remember, image, settings(conventions=InferenceConventions(padding="zero")))
        torch.testing.assert_close(seen[0][0, :, 2:5, :, 1:6], image)
        assert seen[0].count_nonzero() == image.numel()

    @pytest.mark.parametrize(("blend", "low", "high"), [("probabilities", 0.45, 0.55), ("logits", -0.1, 0.1)])
    def test_a_region_is_where_it_is_likelier_than_not(self, blend: Blend, low: float, high: float) -> None:
        labels = schema_from_names({1: "a", 2: "b"}).labels
        regions = (Region(name="whole", labels=("a", "b"), paints="b"), Region(name="core", labels=("a",), paints="a"))
        schema = LabelSchema(labels=labels, regions=regions)
        grid = Geometry((8, 8, 8), np.eye(4))
        wanted = settings(outputs=2, overlap=True, conventions=InferenceConventions(blend=blend))
        for values, expected in (((high, low), 2), ((high, high), 1), ((low, low), 0)):
            logits = torch.tensor(values)
            logits = (logits if blend == "logits" else logits.logit()).reshape(1, 2, 1, 1, 1)
            member = Member(lambda image, logits=logits: logits.expand(1, 2, *image.shape[2:]), wanted)
            found = segment_image([member], volume((8, 8, 8)), Goal(grid, grid, schema))
            assert found.unique().tolist() == [expected]

    @pytest.mark.parametrize("blend", ["probabilities", "logits"])
    def test_a_threshold_is_one_of_probabilities_whatever_is_blended(self, blend: Blend) -> None:
        """Of 0.6, 0.3 and 0.1: the second has a third of what it has together with the first."""
        schema, grid = schema_from_names({1: "a", 2: "b"}), Geometry((8, 8, 8), np.eye(4))
        logits = torch.tensor([0.6, 0.3, 0.1]).log().reshape(1, 3, 1, 1, 1)
        wanted = settings(conventions=InferenceConventions(blend=blend))
        member = Member(lambda image: logits.expand(1, 3, *image.shape[2:]), wanted)
        for thresholds, expected in ((None, 0), ({"a": 0.34}, 0), ({"a": 0.33}, 1), ({"b": 0.14}, 2)):
            found = segment_image([member], volume((8, 8, 8)), Goal(grid, grid, schema, thresholds))
            assert found.unique().tolist() == [expected]


class TestManyClasses:
    def test_sixteen_bits_lose_less_than_the_windows_round(self) -> None:
        outputs = MOST_FLOAT32_OUTPUTS + 8
        image, net = volume((20, 13, 14)), network(outputs)
        conventions = InferenceConventions(longest_window=1.0)
        found = predict_windows(net, image, settings(outputs=outputs, conventions=conventions))
        expected = by_hand(net, image, (8, 8, 8))
        # Twenty is 8 and 3 steps of 4, thirteen 8 and 2 steps of 2 or 3: up to 2 x 3 x 3 windows see a voxel.
        assert float((found - expected).abs().max()) < 18 / (2 * FIXED_POINT) + 1e-6
        best = expected.topk(2, dim=0).values
        clear = best[0] - best[1] > 18 / FIXED_POINT
        assert torch.equal(found.argmax(dim=0)[clear], expected.argmax(dim=0)[clear])
        assert clear.double().mean() > 0.9

    def test_logits_go_to_half_precision(self) -> None:
        outputs = MOST_FLOAT32_OUTPUTS + 1
        wanted = settings(outputs=outputs, conventions=InferenceConventions(blend="logits"))
        found = predict_windows(network(outputs), volume((8, 8, 8)), wanted)
        expected = network(outputs)(volume((8, 8, 8))[None])[0]
        assert torch.equal(found, expected.half().float())

    def test_the_model_alone_decides(self) -> None:
        assert store_of(MOST_FLOAT32_OUTPUTS, "probabilities") == store_of(2, "logits") == "float32"
        assert store_of(MOST_FLOAT32_OUTPUTS + 1, "probabilities") == "fixed"
        assert store_of(MOST_FLOAT32_OUTPUTS + 1, "logits") == "float16"


class TestLiveScores:
    def test_what_is_not_held_is_refused(self) -> None:
        layout = lay_out((30, 8, 8), [settings()])
        live = LiveScores(2, layout, "float32", torch.device("cpu"))
        live.add((0, 0, 0), torch.ones(2, 8, 8, 8), torch.ones(8, 8, 8))
        with pytest.raises(ValueError, match="planes 4 to 12 of 0 to 8"):
            live.add((4, 0, 0), torch.ones(2, 8, 8, 8), torch.ones(8, 8, 8))
        assert [(first, slab.shape[1]) for first, slab in live.take(4, 3)] == [(0, 3), (3, 1)]
        live.add((4, 0, 0), torch.ones(2, 8, 8, 8), torch.ones(8, 8, 8))
        found = torch.cat([slab.clone() for _, slab in live.take(12, 99)], dim=1)
        assert found[0, :, 0, 0].tolist() == [2.0] * 4 + [1.0] * 4

    @pytest.mark.parametrize("likely", [0.1, 0.9])
    def test_classes_of_which_nothing_is_left_in_16_bits_are_not_missed(self, likely: float) -> None:
        """Few are likely anywhere, or most; some by just enough for one part in 32,000."""
        generator = torch.Generator().manual_seed(2)
        scores = 1e-7 * torch.rand(50, 8, 8, 8, generator=generator)
        scores[torch.rand(50, generator=generator) < likely] *= 1e6
        scores[7, 3, 3, 3], scores[9, 3, 3, 3] = 0.51 / FIXED_POINT, 0.49 / FIXED_POINT
        weights = torch.rand(8, 8, 8, generator=generator)
        weights[3, 3, 3] = 1.0
        live = LiveScores(50, lay_out((8, 8, 8), [settings()]), "fixed", torch.device("cpu"))
        for _ in range(2):
            live.add((0, 0, 0), scores, weights)
        ((_, found),) = live.take(8, 8)
        torch.testing.assert_close(found, 2 * (scores * weights * FIXED_POINT).round() / FIXED_POINT)
        if likely < 0.5:
            assert (found[7].count_nonzero(), found[9].count_nonzero()) == (1, 0)

    @pytest.mark.parametrize("shape", [(30, 8, 8), (8, 30, 8), (8, 8, 30)])
    def test_a_plane_lies_together(self, shape: Triple) -> None:
        layout = lay_out(shape, [settings()])
        live = LiveScores(3, layout, "float32", torch.device("cpu"))
        live.add((0, 0, 0), volume((8, 8, 8)).expand(3, -1, -1, -1), torch.ones(8, 8, 8))
        for _, slab in live.take(8, 3):
            assert slab.select(layout.axis + 1, 0).stride(-1) == 1


class TestEmptyWindows:
    """A phantom: a bright box in air, in the middle of a volume much longer than a window."""

    @staticmethod
    def phantom(noise: float = 0.0) -> Tensor:
        image = torch.full((1, 64, 16, 16), -9.0)
        image[:, 24:40, 4:12, 4:12] = volume((16, 8, 8))
        return image + noise * torch.rand(image.shape, generator=torch.Generator().manual_seed(3))

    def counted(self, image: Tensor, *, skip: bool) -> tuple[Tensor, int]:
        net, calls = network(), []

        def counting(tiles: Tensor) -> Tensor:
            calls.append(len(tiles))
            return net(tiles)

        found, _ = streamed([Member(counting, settings())], image, Pace(skip_empty=skip))
        return found, sum(calls)

    def test_the_network_sees_one_of_them_and_nothing_changes(self) -> None:
        whole, every = self.counted(self.phantom(), skip=False)
        found, some = self.counted(self.phantom(), skip=True)
        assert torch.equal(found, whole)
        # Windows begin every 4 voxels; those from 20 to 36 meet the box along the first axis, of 15 in all.
        assert (every, some) == (15 * 9, 5 * 9 + 1)

    def test_the_faintest_noise_is_something(self) -> None:
        _, every = self.counted(self.phantom(1e-4), skip=False)
        assert self.counted(self.phantom(1e-4), skip=True)[1] == every
