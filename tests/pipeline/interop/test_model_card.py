"""What a card says of the way from a volume to the network and back: each step, in the order in which it is done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from pipeline.bundle import ModelBundle
from pipeline.interop.model_card import NORMALISED, model_card
from pipeline.interop.network_graph import Difference
from pipeline.interop.onnx_export import told
from pipeline.plan import InferenceConventions, Plan
from tests.pipeline.interop.network_choices import bundle_of
from transforms.intensity_spec import Normalisation
from transforms.placing_spec import Placing
from transforms.recipe_spec import CropForeground

FOUND = Difference(0.0, 1.0)


def words(bundle: ModelBundle, *hows: Normalisation, **changes: Any) -> str:
    """The card's steps, of a plan with `changes` and a channel for each normalisation."""
    channels = [bundle.plan.channels[0].model_copy(update={"normalisation": how}) for how in hows]
    update = changes | ({"channels": tuple(channels)} if hows else {})
    card = model_card(replace(bundle, plan=bundle.plan.model_copy(update=update)), FOUND)
    return " ".join(card["steps"])


def in_order(said: str, *parts: str) -> bool:
    """Whether all parts are there, each after the one before it."""
    places = [said.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


class TestPreparing:
    def test_normalised_before_it_is_resampled(self, small_plan: Plan) -> None:
        assert in_order(words(bundle_of(small_plan)), "normalised as plan.channels", "axes towards", "resampled to")

    def test_nnunet_crops_normalises_and_resamples(self, small_plan: Plan) -> None:
        said = words(bundle_of(small_plan), placing=Placing())
        assert in_order(
            said, "axes as they are stored", "is cut off", "normalised as", "resampled to", "as plan.placing"
        )
        assert in_order(said, "as plan.placing.scores says", "what was cut off is background")
        assert "axes towards RAS" in words(bundle_of(small_plan), placing=Placing(reorients=True))

    @pytest.mark.parametrize("kind", get_args(Normalisation.model_fields["kind"].annotation))
    def test_every_way_to_normalise_is_described(self, small_plan: Plan, kind: str) -> None:
        how = Normalisation.model_validate({"kind": kind, "lower": -1.0, "upper": 1.0})
        said = words(bundle_of(small_plan), how)
        assert [name for name in NORMALISED if f"'{name}' " in said] == [kind]

    def test_several_ways_and_what_is_0(self, small_plan: Plan) -> None:
        plain, masked = Normalisation(kind="zscore"), Normalisation(kind="zscore", nonzero=True)
        window = Normalisation(kind="window", lower=-100, upper=200)
        said = words(bundle_of(small_plan), window, masked)
        assert in_order(
            said, "'window' clips", "'zscore' subtracts", "with nonzero, both are of the voxels that are not"
        )
        assert "nonzero" not in words(bundle_of(small_plan), window, plain)
        assert "smallest_divisor" not in said
        floored = Normalisation(kind="zscore", smallest_divisor=1e-8)
        assert "its own deviation; what divides is at least smallest_divisor." in words(bundle_of(small_plan), floored)


class TestTilesAndBack:
    def test_tiles_are_spread_or_stepped(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        stepped = InferenceConventions(tiles="stepped")
        assert "tiles of input.sides, at most tile_step of a side apart" in words(bundle)
        assert "tiles of input.sides, tile_step of a side apart (in whole voxels, rounded down), the last" in words(
            bundle, inference=stepped
        )

    def test_what_is_brought_back(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        logits = InferenceConventions(blend="logits")
        turned = InferenceConventions(blend="logits", restores="probabilities")
        assert "own grid, linearly, as probabilities; the highest" in words(bundle)
        assert "own grid, linearly, as logits; the highest" in words(bundle, inference=logits)
        assert in_order(
            words(bundle, inference=turned),
            "logits are averaged with", "logits become probabilities, by output.activation", "as probabilities;",
        )  # fmt: skip

    def test_a_region_is_painted_where_it_is_likelier_than_not(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        regions = [{"name": "all", "labels": ["one", "five"], "paints": "five"}]
        schema = type(bundle.schema).model_validate(bundle.schema.model_dump() | {"regions": regions})
        bundle = replace(bundle, schema=schema)
        assert "as probabilities; every region above 0.5 is painted" in words(bundle)
        logits = InferenceConventions(blend="logits")
        assert "as logits; every region above 0 (a probability of 0.5) is" in words(bundle, inference=logits)

    def test_what_a_recipe_cuts_off(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        assert "what was cut off is background" in words(bundle, recipe=(CropForeground(margin=0),))
        assert "cut off" not in words(bundle, recipe=())


def test_a_network_of_slices_takes_exactly_one(small_plan: Plan, tmp_path: Any) -> None:
    bundle = bundle_of(small_plan, dimensions=2)
    card = model_card(bundle, FOUND)
    assert (card["input"]["sides"], card["input"]["other_sides_divisible_by"]) == ([16, 1, 8], [4, None, 4])
    assert "along j the side of its input is always 1" in " ".join(card["steps"])
    lines = told(tmp_path / "m.onnx", bundle, FOUND)
    assert lines[1] == "tiles: 16x1x8, or any divisible by 4x4 along i and k, always 1 along j; any batch"
    assert told(tmp_path / "m.onnx", bundle_of(small_plan), FOUND)[1] == (
        "tiles: 16x8x16, or any divisible by 4x4x4; any batch"
    )
