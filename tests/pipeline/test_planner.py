"""The planner: pure, every choice with its reason, and right in worlds whose plan can be worked out by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import NetworkConfig, PlanConfig
from pipeline.errors import ManifestError, PlanError
from pipeline.manifest import parse_manifest
from pipeline.models.needs import NEEDS
from pipeline.models.shape import output_shape
from pipeline.plan import Budget, CaseFingerprint, ChannelFingerprint, Fingerprint, Plan, read_plan
from pipeline.planner import make_plan, percentile
from pipeline.sizing import MIRRORED_ROUNDS

AMPLE = Budget("cpu", memory_gb=64.0, minutes=None, gflops=60.0)
Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]


def channel(modality: str = "MR", **facts: float) -> ChannelFingerprint:
    values: dict[str, Any] = {
        "name": "image",
        "modality": modality,
        "lowest": 0.0,
        "highest": 900.0,
        "zero_share": 0.0,
        "inside_percentile_00_5": 100.0,
        "inside_percentile_99_5": 800.0,
        "inside_mean": 400.0,
        "inside_deviation": 90.0,
    }
    return ChannelFingerprint.model_validate(values | facts)


def fingerprint(
    shapes: Sequence[Triple] = ((40, 40, 40),),
    spacings_mm: Sequence[Spacing] = ((1.0, 1.0, 1.0),),
    *,
    extent_mm: Spacing = (10.0, 10.0, 10.0),
    twins: bool = False,
    image: ChannelFingerprint | None = None,
) -> Fingerprint:
    cases = tuple(
        CaseFingerprint(
            case_id=f"case_{n}",
            shape=shape,
            spacing_mm=spacing_mm,
            label_volumes_mm3={"a": 100.0},
            label_extents_mm={"a": extent_mm},
        )
        for n, (shape, spacing_mm) in enumerate(zip(shapes, spacings_mm, strict=True))
    )
    return Fingerprint(channels=(image or channel(),), class_count=2, has_twins=twins, cases=cases)


def plan_for(facts: Fingerprint, budget: Budget = AMPLE, *, dimensions: int = 3, **values: Any) -> Plan:
    network = {k: values.pop(k) for k in list(values) if k in NetworkConfig.model_fields}
    return make_plan(
        facts,
        budget,
        settings=PlanConfig.model_validate(values),
        network=NetworkConfig.model_validate({"dimensions": dimensions, **network}),
    )


def least_gb(facts: Fingerprint, **values: Any) -> float:
    """What the plan says its step takes when memory is ample."""
    return plan_for(facts, **values).memory_gb


class TestPurity:
    def test_the_same_facts_give_the_same_bytes(self) -> None:
        facts = fingerprint([(35, 50, 36), (90, 12, 64)], [(1, 1, 1), (0.7, 3.0, 0.7)])
        budget = Budget("cuda", 11.0, 30.0, 20_000.0)
        first, second = (plan_for(facts, budget).model_dump_json() for _ in range(2))
        assert first == second

    def test_the_order_of_cases_changes_nothing(self) -> None:
        shapes, spacings = [(35, 50, 36), (90, 12, 64), (40, 40, 40)], [(1, 1, 1), (0.7, 3.0, 0.7), (2, 2, 2)]
        forth = plan_for(fingerprint(shapes, spacings)).model_dump_json()
        assert forth == plan_for(fingerprint(shapes[::-1], spacings[::-1])).model_dump_json()

    def test_json_reads_back_the_same(self, tmp_path: Any) -> None:
        plan = plan_for(fingerprint())
        path = tmp_path / "plan.json"
        path.write_text(plan.model_dump_json())
        assert read_plan(path) == plan

    @pytest.mark.parametrize("text", ["", "{}", '{"format": "volseg-plan-2"}'])
    def test_what_is_no_plan_is_refused(self, tmp_path: Any, text: str) -> None:
        path = tmp_path / "plan.json"
        path.write_text(text)
        with pytest.raises(PlanError, match="not a volseg plan"):
            read_plan(path)
        with pytest.raises(PlanError, match="cannot read the plan"):
            read_plan(tmp_path / "missing.json")


class TestReasons:
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_every_choice_has_one(self, dimensions: int) -> None:
        reasons = plan_for(fingerprint(), dimensions=dimensions).reasons
        expected = {"spacing_mm", "median_shape", "normalisation of image", "patch_shape", "stages", "features"}
        expected |= {"batch_size", "checkpointing", "mirror_axes"} | ({"slice_axis"} if dimensions == 2 else set())
        assert set(reasons) == expected
        assert all(len(reason) > 10 for reason in reasons.values())

    def test_what_is_set_by_hand_is_called_so(self) -> None:
        values = {"patch_shape": (32, 32, 32), "spacing_mm": (1, 1, 1), "batch_size": 3, "features": (4, 8)}
        plan = plan_for(fingerprint(), checkpointing="off", **values)
        by_hand = {key for key, reason in plan.reasons.items() if reason.startswith("set by hand")}
        assert by_hand == {*values, "checkpointing"}
        assert (plan.batch_size, plan.patch_shape, plan.unet.features) == (3, (32, 32, 32), (4, 8))

    def test_features_that_find_no_room_are_told(self) -> None:
        plan = plan_for(fingerprint([(12, 12, 12)]), features=(4, 8, 16, 32))
        assert plan.unet.features == (4, 8)
        assert "the last 2 are left out" in plan.reasons["features"]


class TestPatch:
    def test_divisibility_is_said_and_kept(self) -> None:
        plan = plan_for(fingerprint([(50, 70, 90)]))
        # 50 -> 25 -> 13 -> 7 is not halved again; 70 and 90 go on to 9 and 6 (twice as coarse axes wait for no one).
        assert plan.factor == plan.unet.downsampling_factor
        assert all(side % f == 0 for side, f in zip(plan.patch_shape, plan.factor, strict=True))
        assert f"divisible by {'x'.join(map(str, plan.factor))}" in plan.reasons["patch_shape"]

    def test_a_patch_that_does_not_fit_is_told_the_nearest_that_do(self) -> None:
        # 40 -> 20 -> 10 -> 5: three halvings, so sides are multiples of 8.
        facts = fingerprint()
        with pytest.raises(PlanError) as caught:
            plan_for(facts, patch_shape=(30, 32, 41))
        assert str(caught.value) == (
            "plan.patch_shape: [30, 32, 41] must be divisible by [8, 8, 8]; "
            "the nearest are [24, 32, 40] and [32, 32, 48]"
        )
        for patch in ((24, 32, 40), (32, 32, 48)):
            assert plan_for(facts, patch_shape=patch).patch_shape == patch

    def test_below_the_smallest_there_is_only_a_larger_one(self) -> None:
        with pytest.raises(
            PlanError, match=r"\[3, 3, 3\] must be divisible by \[8, 8, 8\]; the nearest are \[8, 8, 8\]$"
        ):
            plan_for(fingerprint(), patch_shape=(3, 3, 3))

    def test_one_voxel_at_the_bottleneck_is_refused_where_it_would_be_a_constant(self) -> None:
        with pytest.raises(PlanError, match="one voxel at the bottleneck"):
            plan_for(fingerprint(), patch_shape=(8, 8, 8))
        assert plan_for(fingerprint(), patch_shape=(8, 8, 8), normalisation="batch").patch_shape == (8, 8, 8)

    def test_slices_name_shapes_with_all_three_axes(self) -> None:
        with pytest.raises(
            PlanError, match=r"\[30, 32, 1\] must be divisible by \[8, 8, 1\]; the nearest are \[24, 32, 1\]"
        ):
            plan_for(fingerprint(), dimensions=2, patch_shape=(30, 32, 1))
        with pytest.raises(PlanError, match="must have 1 on axis K, the axis across slices"):
            plan_for(fingerprint(), dimensions=2, patch_shape=(32, 32, 8))

    @pytest.mark.parametrize("values", [{"patch_shape": (0, 8, 8)}, {"spacing_mm": (1, -1, 1)}])
    def test_sizes_must_be_positive(self, values: dict[str, Any]) -> None:
        with pytest.raises(PlanError, match="must be positive"):
            plan_for(fingerprint(), **values)

    def test_it_is_no_larger_than_the_median_case_needs(self) -> None:
        plan = plan_for(fingerprint([(35, 50, 36)] * 3, [(1, 1, 1)] * 3))
        assert all(side <= n + f / 2 for side, n, f in zip(plan.patch_shape, (35, 50, 36), plan.factor, strict=True))


class TestSpacing:
    def test_the_median_of_each_axis(self) -> None:
        spacings = [(1.0, 1.0, 1.0), (1.2, 0.8, 1.0), (2.0, 0.6, 1.0)]
        assert plan_for(fingerprint([(40, 40, 40)] * 3, spacings)).spacing_mm == (1.2, 0.8, 1.0)

    def test_a_coarse_axis_keeps_more_of_its_slices(self) -> None:
        spacings = [(0.5, 0.5, float(z)) for z in range(1, 12)]
        plan = plan_for(fingerprint([(64, 64, 20)] * 11, spacings))
        # The median 6 mm is twelve times 0.5, so the tenth percentile of 1..11 is taken: 2.
        assert plan.spacing_mm == (0.5, 0.5, 2.0)
        assert "over 3 times coarser" in plan.reasons["spacing_mm"]

    def test_a_coarse_axis_is_halved_later_and_convolved_flat_till_then(self) -> None:
        plan = plan_for(fingerprint([(128, 128, 24)], [(0.5, 0.5, 2.5)]))
        # 0.5 -> 1 -> 2 mm in plane before 2.5 mm across is within twice the finest.
        assert plan.unet.strides[:4] == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2))
        assert plan.unet.kernel_shapes[:4] == ((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3))

    def test_percentiles_are_numpys(self) -> None:
        import numpy as np

        values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
        for q in (0, 10, 33.3, 50, 95, 100):
            assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-12)


class TestNormalisation:
    def test_ct_has_a_window_from_inside_the_labels(self) -> None:
        facts = channel("CT", lowest=-1024, inside_percentile_00_5=-37.5, inside_percentile_99_5=210.25)
        plan = plan_for(fingerprint(image=facts))
        how = plan.normalisations[0]
        assert (how.kind, how.lower, how.upper, how.mean, how.deviation) == ("window", -37.5, 210.25, 400.0, 90.0)
        assert "-37.5 to 210.25 HU" in plan.reasons["normalisation of image"]
        assert plan.channels[0].lowest == -1024

    def test_mr_has_a_z_score(self) -> None:
        how = plan_for(fingerprint()).normalisations[0]
        assert (how.kind, how.nonzero) == ("zscore", False)

    def test_a_masked_background_is_left_out_of_it(self) -> None:
        plan = plan_for(fingerprint(image=channel(zero_share=0.6)))
        assert plan.normalisations[0].nonzero
        assert "60% are exactly 0" in plan.reasons["normalisation of image"]

    @pytest.mark.parametrize(("wrong", "near"), [("ct", "CT"), ("MRI", "MR"), ("mr", "MR")])
    def test_a_misspelt_modality_never_gets_here(self, wrong: str, near: str) -> None:
        document = {
            "name": "x",
            "channels": [{"name": "image", "modality": wrong}],
            "labels": {"labels": [{"id": 1, "name": "a", "colour": [1, 2, 3]}]},
            "cases": [{"case_id": "a", "patient_id": "a", "images": {"image": "a.nii"}}],
        }
        with pytest.raises(ManifestError, match=f"'{wrong}' is none of CT, MR, .*did you mean '{near}'"):
            parse_manifest(document, source="manifest.json")


class TestBudget:
    BIG = fingerprint([(256, 256, 256)])

    def test_less_memory_gives_a_narrower_network_or_a_smaller_patch(self) -> None:
        sizes = [plan_for(self.BIG, Budget("cpu", gb, None, 60.0)) for gb in (64.0, 4.0, 1.0, 0.25)]
        cost = [math.prod(p.patch_shape) * p.unet.features[0] for p in sizes]
        assert cost == sorted(cost, reverse=True)
        assert cost[0] > 50 * cost[-1]
        assert all(p.memory_gb <= gb for p, gb in zip(sizes, (64.0, 4.0, 1.0, 0.25), strict=True))

    def test_less_time_gives_less_work_a_patch(self) -> None:
        work = [plan_for(self.BIG, Budget("cpu", 64.0, minutes, 60.0)).patch_gflop for minutes in (600, 60, 6)]
        assert work == sorted(work, reverse=True)
        assert work[0] > 20 * work[-1]

    def test_checkpointing_is_switched_on_when_memory_asks(self) -> None:
        patch = {"patch_shape": (96, 96, 96), "features": (16, 32, 64, 128)}
        plain = least_gb(self.BIG, checkpointing="off", **patch)
        saving = least_gb(self.BIG, checkpointing="on", **patch)
        assert saving < 0.8 * plain
        between = Budget("cpu", (plain + saving) / 2, None, 60.0)
        tight, ample = plan_for(self.BIG, between, **patch), plan_for(self.BIG, AMPLE, **patch)
        assert (tight.unet.checkpointing, ample.unet.checkpointing) == (True, False)
        assert tight.reasons["checkpointing"].startswith(f"on: {plain:.2f} GB without it")
        assert plan_for(self.BIG, between, checkpointing="off", **patch).unet.checkpointing is False

    def test_a_gpu_takes_the_largest_batch_that_fits(self) -> None:
        facts, patch = fingerprint(), {"patch_shape": (32, 32, 32), "features": (16, 32)}
        per_patch = least_gb(facts, batch_size=2, **patch) - least_gb(facts, batch_size=1, **patch)
        room = least_gb(facts, batch_size=1, **patch) + 8 * per_patch
        assert plan_for(facts, Budget("cuda", room, None, 2e4), **patch).batch_size == 8
        assert plan_for(facts, Budget("cuda", 1000.0, None, 2e4), **patch).batch_size == 16
        assert plan_for(facts, Budget("cpu", 1000.0, None, 60.0), **patch).batch_size == 2

    def test_no_room_at_all_is_an_error(self) -> None:
        with pytest.raises(PlanError, match=r"no network fits 1e-06 GB and 0.01 minutes; the nearest plan") as caught:
            plan_for(self.BIG, Budget("cpu", 1e-6, 0.01, 60.0))
        keys = dict(re.findall(r"--set (\S+)=([\d.]+)", str(caught.value)))
        enough = Budget("cpu", float(keys["plan.memory_gb"]), float(keys["train.budget_minutes"]), 60.0)
        plan = plan_for(self.BIG, enough)
        assert (plan.patch_shape, plan.batch_size, plan.unet.features[0]) == ((16, 16, 16), 1, 8)
        assert f"patches of 16x16x16 and {plan.unet.features[0]} channels" in str(caught.value)
        assert enough.minutes is not None
        for less in (
            replace(enough, memory_gb=0.98 * enough.memory_gb),
            replace(enough, minutes=0.98 * enough.minutes),
        ):
            with pytest.raises(PlanError, match="the nearest plan that does"):
                plan_for(self.BIG, less)

    def test_a_patch_does_not_shrink_to_nothing(self) -> None:
        """Sixteen voxels, or what an axis has."""
        flat = fingerprint([(200, 200, 9)])
        with pytest.raises(PlanError, match="has patches of 16x16x10 and 8 channels"):
            plan_for(flat, Budget("cpu", 1e-6, None, 60.0))

    def test_one_patch_in_a_step_where_two_do_not_fit(self) -> None:
        values = {"patch_shape": (64, 64, 64), "features": (16, 32, 64)}
        one = least_gb(self.BIG, checkpointing="on", batch_size=1, **values)
        plan = plan_for(self.BIG, Budget("cuda", 1.1 * one, None, 60.0), **values)
        assert plan.batch_size == 1
        assert "two patches do not fit" in plan.reasons["batch_size"]


class TestNetworks:
    BIG = fingerprint([(256, 256, 256)])

    @pytest.mark.parametrize("dimensions", [2, 3])
    @pytest.mark.parametrize("shape", [(35, 50, 36), (300, 280, 20), (5, 5, 5), (90, 90, 90)])
    @pytest.mark.parametrize("name", ["segresnet", "swin_unetr", "mednext"])
    def test_a_patch_is_one_that_the_network_accepts(self, name: str, shape: Triple, dimensions: int) -> None:
        for budget in (AMPLE, Budget("cpu", 8.0, 3.0, 60.0)):
            plan = plan_for(fingerprint([shape]), budget, dimensions=dimensions, name=name)
            inside = [n for axis, n in enumerate(plan.patch_shape) if axis != plan.slice_axis]
            divisor = NEEDS[name].divisor
            assert divisor is not None
            assert all(n % divisor == 0 for n in inside)
            assert math.prod(inside) > divisor**dimensions  # more than one voxel at the bottleneck
            assert plan.memory_gb <= budget.memory_gb
            assert f"those of network '{name}'" in plan.reasons["features"]

    @pytest.mark.parametrize("name", ["dynunet", "attention_unet"])
    def test_networks_of_the_plans_stages_get_them(self, name: str) -> None:
        plan = plan_for(fingerprint([(64, 64, 32)], [(1, 1, 2)]), name=name)
        assert plan.unet.strides == plan_for(fingerprint([(64, 64, 32)], [(1, 1, 2)])).unet.strides
        assert plan.unet.decoder_blocks[0] == 2  # theirs cannot be one

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"name": "segresnet", "block": "residual"}, "network.block: says nothing to network 'segresnet', which"),
            ({"name": "dynunet", "skip": "attention"}, "network.skip: .* which follows network.block: leave it out"),
            ({"name": "swin_unetr", "preset": "resenc_m"}, "network.preset: says nothing"),
            ({"name": "mednext", "checkpointing": "on"}, "network.checkpointing: .* follows none of them"),
            ({"name": "mednext", "bottleneck": "transformer"}, "network.bottleneck: says nothing"),
            ({"name": "swin_unetr", "features": (8, 16)}, "plan.features: network 'swin_unetr' has widths of its own"),
            ({"name": "uunet"}, "did you mean 'unet'"),
        ],
    )
    def test_keys_that_say_nothing_to_a_network_are_refused_by_name(self, values: Any, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            plan_for(self.BIG, **values)

    def test_too_few_voxels_for_a_networks_stages(self) -> None:
        with pytest.raises(PlanError, match="'dynunet' needs 3 resolutions, but patches of 8x8x8"):
            plan_for(fingerprint([(8, 8, 8)]), name="dynunet")

    def test_checkpointing_where_the_network_has_it(self) -> None:
        swin = plan_for(self.BIG, Budget("cpu", 4.0, None, 60.0), name="swin_unetr")
        assert swin.unet.checkpointing
        mednext = plan_for(self.BIG, Budget("cpu", 4.0, None, 60.0), name="mednext")
        assert not mednext.unet.checkpointing
        assert mednext.reasons["checkpointing"] == "off: network 'mednext' has none"

    def test_a_block_that_contradicts_a_preset_is_refused(self) -> None:
        with pytest.raises(PlanError, match=r"^network.block: plain, but network.preset resenc_l has residual blocks"):
            plan_for(self.BIG, preset="resenc_l", block="plain")

    def test_a_block_that_agrees_with_a_preset_changes_nothing(self) -> None:
        """As every config does that was written out with all its keys."""
        assert plan_for(self.BIG, preset="resenc_m", block="residual") == plan_for(self.BIG, preset="resenc_m")
        written = NetworkConfig(preset="resenc_m").model_dump(mode="json")
        assert written["block"] == "residual"
        assert NetworkConfig.model_validate(written) == NetworkConfig(preset="resenc_m")

    def test_what_else_is_set_stands_beside_a_preset(self) -> None:
        plan = plan_for(self.BIG, preset="resenc_m", features=(16, 32, 64), normalisation="group", skip="attention")
        assert plan.unet.features == (16, 32, 64)
        assert (plan.unet.normalisation, plan.unet.skip) == ("group", "attention")
        assert plan.unet.encoder_blocks == (1, 3, 4)

    @pytest.mark.parametrize(("preset", "gb"), [("resenc_m", 8.0), ("resenc_l", 24.0), ("resenc_xl", 40.0)])
    def test_a_preset_has_its_blocks_and_fills_its_memory(self, preset: str, gb: float) -> None:
        plan = plan_for(self.BIG, Budget("cuda", 70.0, None, 20_000.0), preset=preset)
        assert plan.unet.encoder_blocks == (1, 3, 4, 6, 6, 6)
        assert plan.unet.decoder_blocks == (1,) * 5
        assert plan.unet.features == (32, 64, 128, 256, 320, 320)
        assert (plan.unet.block, plan.unet.block_of_decoder) == ("residual", "plain")
        assert 0.7 * gb < plan.memory_gb <= gb
        assert f"meant for {gb:g} GB; which is there" in plan.reasons["preset"]

    def test_the_smaller_memory_wins_over_a_preset_and_a_key_over_both(self) -> None:
        less = plan_for(self.BIG, Budget("cuda", 6.0, None, 20_000.0), preset="resenc_l")
        assert less.memory_gb <= 6.0
        assert "meant for 24 GB; 6 GB is what the device has, and wins" in less.reasons["preset"]
        more = plan_for(self.BIG, Budget("cuda", 50.0, None, 20_000.0), preset="resenc_m", memory_gb=50.0)
        assert more.memory_gb > 8.0
        assert "plan.memory_gb says 50" in more.reasons["preset"]

    def test_time_narrows_a_preset(self) -> None:
        plan = plan_for(self.BIG, Budget("cpu", 6.0, 30.0, 100.0), preset="resenc_m")
        assert plan.unet.features[0] < 32
        assert f"{plan.unet.features[0]} channels at full resolution: 30 minutes" in plan.reasons["features"]

    def test_a_transformer_sees_the_patch_and_has_a_head_for_32_channels(self) -> None:
        plan = plan_for(fingerprint([(64, 64, 48)], extent_mm=(60.0, 60.0, 45.0)), bottleneck="transformer")
        assert plan.unet.transformer_heads == plan.unet.features[-1] // 32
        assert all(mm >= n for mm, n in zip(plan.receptive_field_mm, plan.patch_shape, strict=True))
        assert plan.warnings == ()

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_learned_positions_are_as_many_as_the_bottleneck_has_voxels(self, dimensions: int) -> None:
        choices = {"bottleneck": "transformer", "positions": "learned", "dimensions": dimensions}
        plan = plan_for(fingerprint([(70, 50, 41)]), Budget("cpu", 2.0, None, 60.0), **choices)
        inside = [n for axis, n in enumerate(plan.patch_shape) if axis != plan.slice_axis]
        grid = tuple(n // f for n, f in zip(inside, plan.unet.downsampling_factor, strict=True))
        assert plan.unet.position_grid == grid

    def test_heads_that_do_not_divide_are_refused_by_their_key(self) -> None:
        with pytest.raises(PlanError, match=r"network.transformer_heads: found 7, which does not divide"):
            plan_for(self.BIG, bottleneck="transformer", transformer_heads=7)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"drop_path": 0.1}, "drop_path needs block residual"),
            ({"transformer_heads": 4}, "transformer_heads needs bottleneck transformer"),
            ({"positions": "learned"}, "positions needs bottleneck transformer"),
        ],
    )
    def test_choices_that_would_do_nothing_are_no_config(self, values: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            NetworkConfig.model_validate(values)


class TestView:
    def test_a_label_larger_than_the_view_is_warned_of_on_its_axis(self) -> None:
        small = {"features": (4, 8), "patch_shape": (16, 16, 16)}
        plan = plan_for(fingerprint(extent_mm=(10.0, 10.0, 12.0)), **small)
        # Two 3-convolutions, one strided, one more at half resolution: 1 + 2 + 2 + 2 + 4 = 11 voxels.
        assert plan.receptive_field_mm == (11.0, 11.0, 11.0)
        assert len(plan.warnings) == 1
        assert "along axis K labels reach 12 mm but the bottleneck sees 11 mm" in plan.warnings[0]
        assert plan_for(fingerprint(extent_mm=(10.0, 10.0, 11.0)), **small).warnings == ()

    def test_it_is_in_millimetres(self) -> None:
        plan = plan_for(fingerprint(spacings_mm=[(0.5, 0.5, 0.5)]), features=(4, 8), patch_shape=(16, 16, 16))
        assert plan.receptive_field_mm == (5.5, 5.5, 5.5)


class TestSlices:
    def test_they_lie_across_the_coarsest_axis(self) -> None:
        plan = plan_for(fingerprint([(60, 12, 60)], [(1.0, 4.0, 1.0)]), dimensions=2)
        assert (plan.slice_axis, plan.unet.dimensions, plan.patch_shape[1]) == (1, 2, 1)
        assert plan.factor[1] == 1
        assert "axis J" in plan.reasons["slice_axis"]

    def test_across_slices_nothing_is_warned_of(self) -> None:
        facts = fingerprint([(60, 60, 12)], [(1.0, 1.0, 4.0)], extent_mm=(5.0, 5.0, 40.0))
        assert plan_for(facts, dimensions=2, features=(4, 8), patch_shape=(16, 16, 1)).warnings == ()


class TestMirroring:
    def test_left_to_right_where_there_is_time(self) -> None:
        plan = plan_for(fingerprint(twins=True))
        assert plan.mirror_axes == (0,)
        assert "left/right twins" in plan.reasons["mirror_axes"]

    def test_not_where_there_is_none(self) -> None:
        sizes = {"features": (4, 8), "patch_shape": (16, 16, 16)}
        facts = fingerprint([(40, 40, 40)] * 4, [(1.0, 1.0, 1.0)] * 4)
        gflop_s = 3 * plan_for(facts, **sizes).patch_gflop / (0.85 * 60)
        scant, ample = (
            plan_for(facts, Budget("cpu", 8.0, 1.0, rounds * len(facts.cases) * gflop_s), **sizes)
            for rounds in (0.87 * MIRRORED_ROUNDS, 1.1 * MIRRORED_ROUNDS)
        )
        assert (scant.mirror_axes, ample.mirror_axes) == ((), (0,))
        assert scant.reasons["mirror_axes"].startswith("none: 8")

    def test_axes_set_by_hand_are_the_plans(self) -> None:
        def axes(wanted: tuple[int, ...]) -> tuple[int, ...]:
            plan = make_plan(fingerprint(), AMPLE, settings=PlanConfig(), network=NetworkConfig(), mirror_axes=wanted)
            return plan.mirror_axes

        assert axes(()) == ()
        assert axes((2, 0, 2)) == (0, 2)


SIDE = st.one_of(st.integers(1, 40), st.integers(1, 700))
STEP_MM = st.floats(0.3, 10.0)


@settings(max_examples=60)
@given(
    shape=st.tuples(SIDE, SIDE, SIDE),
    spacing_mm=st.tuples(STEP_MM, STEP_MM, STEP_MM),
    memory_gb=st.floats(0.05, 80.0),
    minutes=st.one_of(st.none(), st.floats(0.1, 1000.0)),
    dimensions=st.sampled_from([2, 3]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_every_dataset_gets_a_plan_that_fits(
    shape: Triple, spacing_mm: Spacing, memory_gb: float, minutes: float | None, dimensions: int, device: Any
) -> None:
    budget = Budget(device, memory_gb, minutes, 60.0)
    plan = plan_for(fingerprint([shape], [spacing_mm]), budget, dimensions=dimensions)
    inside = tuple(n for axis, n in enumerate(plan.patch_shape) if axis != plan.slice_axis)
    assert output_shape(plan.unet, inside) == inside
    assert plan.memory_gb <= memory_gb + 5e-4


def test_a_long_thin_volume_is_cut_down_step_by_step() -> None:
    facts = fingerprint([(381, 62, 1)], [(7.113, 0.591, 4.728)])
    plan = plan_for(facts, Budget("cuda", 19.6, 0.1, 60.0))
    assert plan.patch_shape[0] < 100
    assert all(side % f == 0 for side, f in zip(plan.patch_shape, plan.factor, strict=True))
