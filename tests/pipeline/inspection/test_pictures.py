"""Pictures of levels: the right slice, the right way round, to scale, and the channels that matter in front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.bundle import load_bundle
from pipeline.dataset import prepare_case
from pipeline.inspection.attention import attention_maps, attention_weights, draw_attention
from pipeline.inspection.figures import LevelFigures, figures_of, record_levels
from pipeline.inspection.overview import draw_overview
from pipeline.inspection.pictures import window_of_case, write_pictures
from pipeline.inspection.scene import Scene, grid_shape
from pipeline.inspection.sheets import MOST_CHANNELS, channels_of, draw_sheet, write_sheets
from pipeline.inspection.window import Window, window_of
from pipeline.manifest import Dataset
from pipeline.models.registry import build_network
from pipeline.models.transformer import SelfAttention, rotary_table
from pipeline.preparing import Prepared
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, schema_from_names

from .worlds import generator, noise, small_spec

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMA = schema_from_names({1: "bright", 2: "dark"})
SHAPE = (8, 12, 16)
TRANSFORMER = {"bottleneck": "transformer", "transformer_layers": 1, "transformer_heads": 1}


def world(*, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0), codes: str = "RAS") -> Scene:
    """A box of class 1 to the right, front and top of the patient; stored along `codes`."""
    geometry = Geometry(SHAPE, np.diag([*spacing_mm, 1.0]))
    classes = torch.zeros(SHAPE, dtype=torch.uint8)
    classes[5:8, 8:12, 10:14] = 1
    image = classes[None].float() * 100 + torch.arange(16.0)
    target = geometry.oriented(codes)
    return Scene(Window(*(turned(v, geometry, target) for v in (image, classes)), target, (6, 9, 11)),
                 turned(classes, geometry, target), SCHEMA)  # fmt: skip


def turned(voxels: Tensor, source: Geometry, target: Geometry) -> Tensor:
    axes, first = source.axis_map(target), voxels.ndim - 3
    order = [*range(first), *(first + axis for axis in axes.source_axes)]
    return voxels.permute(order).flip([first + t for t, scale in enumerate(axes.scales) if scale < 0])


def halved(voxels: Tensor) -> Tensor:
    """(1, C, i, j, k) of (C, I, J, K), at half the resolution."""
    return torch.nn.functional.avg_pool3d(voxels[None].float(), 2)


def level(name: str, features: Tensor) -> LevelFigures:
    (figures,) = figures_of({name: features})
    return figures


class TestScene:
    @pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "PIR", "SLA"])
    def test_right_is_left_and_front_is_up_however_it_is_stored(self, codes: str) -> None:
        scene = world(codes=codes)
        assert scene.view.name == "Axial"
        pixels = scene.plane(scene.level(halved(scene.window.classes[None] if scene.window.classes is not None else
                                                torch.zeros(1, 8, 8, 8))))[0]  # fmt: skip
        rows, columns = np.nonzero(pixels == 1)
        # I = 6 and 7 are the right-most of 8 voxels: the first column; J = 8 to 11 the front: the first two rows.
        assert (set(rows.tolist()), set(columns.tolist())) == ({0, 1}, {0})

    def test_the_slice_is_the_one_with_most_of_the_object(self) -> None:
        scene = world()
        classes = scene.window.classes
        assert classes is not None
        classes[4, 8:12, 13] = 1
        # K = 13 is the fourteenth from below: the third of sixteen from above.
        assert scene.part == pytest.approx(2.5 / 16)
        assert (scene.plane(classes.numpy()) == 1).sum() == 16

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((32, 32, 8), "Axial"),
            ((32, 8, 32), "Coronal"),
            ((8, 32, 32), "Sagittal"),
            ((1, 32, 32), "Sagittal"),
            ((32, 40, 40), "Axial"),
        ],
    )
    def test_the_plane_is_one_that_shows_most(self, shape: tuple[int, int, int], expected: str) -> None:
        classes = torch.zeros(shape, dtype=torch.uint8)
        window = Window(classes[None].float(), classes, Geometry(shape, np.eye(4)), (0, 0, 0))
        assert Scene(window, classes, SCHEMA).view.name == expected

    def test_lengths_are_to_scale(self) -> None:
        scene = world(spacing_mm=(1.0, 3.0, 1.0))
        assert scene.size_mm == (8.0, 36.0)
        axes = draw_sheet(scene, halved(scene.window.image), level("encoder 2", halved(scene.window.image))).axes[0]
        assert tuple(axes.images[0].get_extent()) == (0.0, 8.0, 36.0, 0.0)
        assert axes.get_aspect() == 1.0

    def test_a_slice_stays_a_slice(self) -> None:
        flat = Geometry((8, 1, 16), np.eye(4))
        classes = torch.zeros(flat.shape, dtype=torch.uint8)
        classes[1, 0, 3] = 1
        scene = Scene(Window(classes[None].float(), classes, flat, (1, 0, 3)), classes, SCHEMA)
        assert scene.view.name == "Coronal"
        assert scene.level(torch.zeros(1, 5, 4, 8)).shape == (5, 4, 1, 8)
        assert scene.plane(scene.level(torch.zeros(1, 5, 4, 8))).shape == (5, 8, 4)

    def test_tiles_are_as_large_as_the_room_allows(self) -> None:
        assert grid_shape(4, 1.0, (4.0, 4.0), most=8, gap=(0, 0)) == 2
        assert grid_shape(4, 1.0, (8.0, 2.0), most=8, gap=(0, 0)) == 4
        assert grid_shape(4, 1.0, (8.0, 2.0), most=1, gap=(0, 0)) == 1


class TestChannels:
    def test_what_follows_the_labels_comes_first_and_what_is_dead_last(self) -> None:
        scene = world()
        inside = scene.window.classes == 1 if scene.window.classes is not None else torch.zeros(SHAPE)
        half = torch.zeros(SHAPE)
        half[:, :, 8:] = 1.0
        features = torch.stack([torch.zeros(SHAPE), half, torch.full(SHAPE, 0.5), 2.0 * inside])[None]
        ranked = channels_of(scene, features)
        assert [channel.number for channel in ranked] == [3, 1, 2, 0]
        assert [channel.dead for channel in ranked] == [False, False, False, True]
        told = [channel.told for channel in ranked]
        # Of 1536 voxels 48 are inside, all in the upper half, where 720 of 1488 others are; eta squared by hand:
        # (48 * 0.5^2 + 1488 * (720/1488 - 0.5)^2) / (1536 * 0.5^2).
        assert told == pytest.approx([1.0, (12 + 1488 * (720 / 1488 - 0.5) ** 2) / 384, 0.0, 0.0])

    def test_a_coarse_voxel_counts_by_what_fills_it(self) -> None:
        scene = world()
        assert scene.window.classes is not None
        (channel,) = channels_of(scene, halved((scene.window.classes == 1)[None]))
        assert channel.told is not None
        assert 0.5 < channel.told < 1.0

    def test_without_a_reference_energy_decides(self) -> None:
        scene = world()
        blind = replace(scene, window=replace(scene.window, classes=None))
        ranked = channels_of(blind, torch.stack([torch.ones(SHAPE), 3 * torch.ones(SHAPE)])[None])
        assert [(channel.number, channel.told) for channel in ranked] == [(1, None), (0, None)]

    def test_dead_ones_are_those_that_figures_count(self) -> None:
        features = noise(1, 6, *SHAPE)
        features[:, 2] = 0.0
        features[:, 4] = -features[:, 4].abs() * 1e-3
        features[:, 5] = -features[:, 5].abs()
        dead = {channel.number for channel in channels_of(world(), features) if channel.dead}
        assert dead == {2, 4}
        assert level("encoder 1", features).dead == 2


class TestSheets:
    def test_a_tile_a_channel_and_no_more_than_fit(self) -> None:
        for count in (1, 5, MOST_CHANNELS + 3):
            features = noise(1, count, 4, 6, 8)
            figure = draw_sheet(world(), features, level("encoder 2", features))
            assert len(figure.axes) == 1 + min(count, MOST_CHANNELS) + 1

    def test_dead_channels_are_crossed_out_and_counted(self) -> None:
        features = noise(1, 3, *SHAPE)
        features[:, 1] = 0.0
        figure = draw_sheet(world(), features, level("encoder 1", features))
        assert [len(axes.lines) for axes in figure.axes[1:4]] == [0, 0, 2]
        assert "1 dead channel" in [text.get_text() for text in figure.texts]

    def test_its_figures_and_sizes_are_told(self) -> None:
        features = halved(noise(3, *SHAPE))
        figures = level("decoder 2", features)
        told = [text.get_text() for text in draw_sheet(world(), features, figures).texts]
        assert "3 channels of 4 x 6 x 8 voxels of 2 x 2 x 2 mm" in told
        assert any(f"effective rank {figures.effective_rank:.1f} of 3" in text for text in told)

    def test_a_skip_that_only_hands_on_has_no_sheet(self, tmp_path: Path) -> None:
        features = noise(1, 2, *SHAPE)
        recorded = {"encoder 1": features, "skip 1": features.clone(), "encoder 2": halved(features[0])}
        recorded["skip 2"] = 0.5 * recorded["encoder 2"]
        written = write_sheets(tmp_path, world(), recorded, figures_of(recorded))
        assert [path.name for path in written] == ["encoder_1.png", "encoder_2.png", "skip_2.png"]


class TestOverview:
    @pytest.mark.parametrize(("changes", "parts", "arrows"), [({}, 7, 10), (TRANSFORMER, 8, 11)])
    def test_every_part_is_there_and_what_flows_is_joined(
        self, changes: dict[str, object], parts: int, arrows: int
    ) -> None:
        network = build_network("unet", small_spec(**changes), (8, 12, 16)).eval()
        with torch.inference_mode(), record_levels(network) as recorded:
            network(world().window.image[None])
        figure = draw_overview(world(), recorded, figures_of(recorded))
        assert len(figure.axes) == parts + 2  # and the image, and the result
        assert sum(type(artist).__name__ == "FancyArrowPatch" for artist in figure.get_children()) == arrows

    def test_networks_that_add_their_skips_have_arrows_without_them(self) -> None:
        recorded = {"encoder 1": noise(1, 2, *SHAPE), "bottleneck 2": noise(1, 2, 4, 6, 8)}
        recorded["decoder 1"] = noise(1, 2, *SHAPE)
        figure = draw_overview(world(), recorded, figures_of(recorded))
        assert sum(type(artist).__name__ == "FancyArrowPatch" for artist in figure.get_children()) == 5


class TestAttention:
    def test_gates_are_those_that_the_network_itself_tells(self) -> None:
        network = build_network("unet", small_spec(skip="attention"), (8, 8, 8), generator=generator()).eval()
        image = noise(1, 1, 8, 8, 8)
        found = attention_maps(network, image, (4, 4, 4))
        assert [(each.kind, each.number) for each in found] == [("gate", 1), ("gate", 2)]
        for each, expected in zip(found, network.attention_maps(image), strict=True):  # type: ignore[operator]
            assert torch.equal(each.values, expected)

    @pytest.mark.parametrize("rotary", [True, False])
    def test_weights_are_those_that_values_are_mixed_by(self, rotary: bool) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            attention = SelfAttention(24, 2).eval()
        tokens = noise(1, 12, 24)
        table = rotary_table((2, 2, 3), 12, torch.device("cpu")) if rotary else None
        with torch.inference_mode():
            whole = attention(tokens, table)[0]
            for query in (0, 7):
                weights = attention_weights(attention, tokens, table, query=query)
                assert weights.sum(dim=-1) == pytest.approx(1.0)
                values = attention.value(tokens).view(1, 12, 2, 12)
                mixed = torch.einsum("bhn,bnhc->bhc", weights, values).flatten(1)
                assert torch.allclose(attention.output(mixed)[0], whole[query], atol=1e-5)

    def test_a_transformer_is_asked_by_the_voxel_of_the_object(self) -> None:
        spec = small_spec(**(TRANSFORMER | {"transformer_layers": 2}))
        network = build_network("unet", spec, (8, 12, 16), generator=generator()).eval()
        image = noise(1, 1, 8, 12, 16)
        here, there = (attention_maps(network, image, place) for place in ((0, 0, 0), (7, 11, 15)))
        assert [(each.kind, each.number) for each in here] == [("transformer", 1), ("transformer", 2)]
        assert all(each.values.shape == (1, 1, 2, 3, 4) for each in here)
        assert [float(each.values.mean()) for each in here] == pytest.approx([1.0, 1.0])
        assert not torch.equal(here[0].values, there[0].values)
        # Voxels of one voxel of the bottleneck ask the same.
        assert torch.equal(here[0].values, attention_maps(network, image, (3, 3, 3))[0].values)

    def test_the_cross_is_where_the_object_is(self) -> None:
        network = build_network("unet", small_spec(**TRANSFORMER), (8, 12, 16)).eval()
        scene = world(codes="LPS")
        centre = tuple(int(n) for n in torch.nonzero(scene.window.classes)[0])
        scene = replace(scene, window=replace(scene.window, centre_ijk=centre))  # type: ignore[arg-type]
        maps = attention_maps(network, scene.window.image[None], scene.window.centre_ijk)
        axes = draw_attention(scene, maps).axes[0]
        (across_mm,), (down_mm,) = axes.lines[1].get_data()
        assert 0 < across_mm < 3  # right
        assert 0 < down_mm < 4  # front

    def test_a_network_without_attention_has_no_maps(self) -> None:
        assert (
            attention_maps(build_network("unet", small_spec(), (8, 8, 8)).eval(), noise(1, 1, 8, 8, 8), (0, 0, 0)) == ()
        )


class TestWindow:
    def test_it_holds_the_object_and_stays_inside(self) -> None:
        geometry = Geometry((20, 20, 20), np.diag([2.0, 2.0, 2.0, 1.0]))
        classes = torch.zeros(geometry.shape, dtype=torch.uint8)
        classes[17:20, 9:12, 0:3] = 2
        window = window_of(torch.rand(1, 20, 20, 20), classes, geometry, (8, 8, 8), class_count=3)
        assert window.classes is not None
        assert torch.equal(window.classes, classes[12:20, 6:14, 0:8])
        assert window.centre_ijk == (6, 4, 1)
        assert window.geometry.ras_from_ijk([[0, 0, 0]])[0] == pytest.approx([24, 12, 0])

    def test_a_ring_is_asked_where_it_is_and_what_is_ignored_is_not(self) -> None:
        geometry = Geometry((9, 9, 1), np.eye(4))
        classes = torch.zeros(geometry.shape, dtype=torch.uint8)
        classes[1:8, 1:8] = 1
        classes[2:7, 2:7] = 0
        classes[8, 8] = 3
        window = window_of(torch.rand(1, 9, 9, 1), classes, geometry, (9, 9, 1), class_count=3)
        assert window.classes is not None
        assert int(window.classes[window.centre_ijk]) == 1

    def test_beyond_a_small_image_is_its_lowest_value(self) -> None:
        image = torch.full((2, 4, 4, 4), 5.0)
        image[1, 0, 0, 0] = -1.0
        window = window_of(image, None, Geometry((4, 4, 4), np.eye(4)), (8, 4, 4), class_count=2)
        assert torch.equal(window.image[:, 2:6], image)
        assert window.image[:, 0].amax(dim=(1, 2)).tolist() == [5.0, -1.0]
        assert window.classes is None
        assert window.centre_ijk == (4, 2, 2)

    def test_of_a_case_without_a_reference_the_result_says_where(self, small_bundle: Path) -> None:
        bundle = load_bundle(small_bundle)
        grid = Geometry((40, 40, 40), np.eye(4))
        result = np.zeros(grid.shape, np.uint8)
        result[30:34, 4:8, 10:14] = 1
        prepared = Prepared(torch.rand(1, *grid.shape), grid, grid, grid)
        blind = window_of_case(bundle, prepared, grid, result=result, reference=None)
        seen = window_of_case(bundle, prepared, grid, result=np.zeros_like(result), reference=result)
        assert blind.classes is None
        assert blind.geometry.difference(seen.geometry) is None
        assert seen.classes is not None
        assert int(seen.classes.sum()) == 64


def test_all_pictures_of_a_real_case(small_bundle: Path, small_dataset: Dataset, tmp_path: Path) -> None:
    bundle = load_bundle(small_bundle)
    case = prepare_case(small_dataset, small_dataset.manifest.cases[0], bundle.plan, tmp_path / "cache")
    schema: LabelSchema = bundle.schema
    window = window_of(
        case.image, case.classes[0], case.geometry, bundle.plan.patch_shape, class_count=schema.class_count
    )
    written = write_pictures(tmp_path / "inspection", bundle, window)
    assert [path.name for path in written] == ["overview.png", "encoder_1.png", "bottleneck_2.png", "decoder_1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
