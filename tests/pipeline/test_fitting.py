"""What a training that ran out of memory is told: a plan that is smaller, that fits, and that can be made."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import yaml

from pipeline.config import NetworkConfig, PlanConfig
from pipeline.fitting import nearest_fitting
from pipeline.plan import Budget, CaseFingerprint, ChannelFingerprint, Fingerprint, Plan
from pipeline.planner import advice_when_too_large, make_plan

MR = ChannelFingerprint(
    name="image",
    modality="MR",
    lowest=0,
    highest=900,
    zero_share=0,
    inside_percentile_00_5=100,
    inside_percentile_99_5=800,
    inside_mean=400,
    inside_deviation=90,
)


def plan_for(shape: tuple[int, int, int], memory_gb: float = 64.0, **values: Any) -> Plan:
    case = CaseFingerprint(
        case_id="a", shape=shape, spacing_mm=(1, 1, 1), label_volumes_mm3={"a": 9}, label_extents_mm={"a": (9, 9, 9)}
    )
    facts = Fingerprint(channels=(MR,), class_count=2, has_twins=False, cases=(case,))
    settings = {key: values.pop(key) for key in ("patch_shape", "features", "batch_size") if key in values}
    return make_plan(
        facts,
        Budget("cpu", memory_gb, None, 60.0),
        settings=PlanConfig.model_validate(settings),
        network=NetworkConfig.model_validate(values),
    )


def told(advice: str) -> dict[str, Any]:
    """The keys that an advice sets, as the command line would read them."""
    return {key: yaml.safe_load(value) for key, value in re.findall(r"--set (\S+?)=([^\s,]+(?:,\d+)*\]?)", advice)}


@pytest.mark.parametrize("memory_gb", [None, 20.0, 3.0, 0.5])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_plan_that_is_named_can_be_made_and_fits(memory_gb: float | None, dimensions: int) -> None:
    shape = (160, 128, 96)
    plan = plan_for(shape, dimensions=dimensions)
    one_gb = plan_for(shape, dimensions=dimensions, batch_size=1, checkpointing="off").memory_gb
    keys = told(advice_when_too_large(plan, memory_gb))
    assert keys["plan.memory_gb"] <= min(0.75 * one_gb, memory_gb or math.inf) + 0.001  # plans round theirs
    smaller = plan_for(
        shape,
        dimensions=dimensions,
        batch_size=1,
        patch_shape=keys["plan.patch_shape"],
        features=keys["plan.features"],
        checkpointing=keys.get("network.checkpointing", "auto"),
    )
    assert smaller.unet.strides == plan.unet.strides
    assert smaller.memory_gb <= keys["plan.memory_gb"] + 0.01  # which is rounded down


def test_checkpointing_comes_first_then_the_patch_then_the_width() -> None:
    plan = plan_for((96, 96, 96), features=(32, 64, 128))
    enough = plan_for((96, 96, 96), features=(32, 64, 128), checkpointing="on", batch_size=1).memory_gb
    same = nearest_fitting(plan, 1.01 * enough)
    assert same is not None
    assert same[1] == plan.patch_shape
    assert (same[0].checkpointing, same[0].features) == (True, plan.unet.features)
    patch = nearest_fitting(plan, 0.7 * enough)
    assert patch is not None
    assert math.prod(patch[1]) < math.prod(plan.patch_shape)
    assert patch[0].features == plan.unet.features
    width = nearest_fitting(plan, 0.3 * enough)
    assert width is not None
    assert width[0].features[0] < 32
    assert math.prod(width[1]) >= 0.5 * math.prod(plan.patch_shape)


def test_where_nothing_fits_that_is_said() -> None:
    plan = plan_for((64, 64, 64))
    assert nearest_fitting(plan, 1e-6) is None
    assert "no smaller plan of this network fits 1e-06 GB" in advice_when_too_large(plan, 1e-6)


def test_one_line() -> None:
    assert "\n" not in advice_when_too_large(plan_for((64, 64, 64)))
