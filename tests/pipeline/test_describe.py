"""What `volseg info` tells of a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from pipeline.bundle import BundleFacts, save_bundle
from pipeline.describe import facts_of
from pipeline.manifest import Dataset
from pipeline.models.registry import build_network
from pipeline.plan import Plan


def told(path: Path) -> dict[str, str]:
    return {row["what"]: row["value"] for row in facts_of(path)[1]}


def test_the_folder_of_a_fold_is_its_bundle(small_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(small_bundle, tmp_path / "fold_0" / "bundle")
    assert told(tmp_path / "fold_0") == told(small_bundle)
    assert told(small_bundle)["network"] == "unet, features 4 8"


def test_what_is_unusual_in_a_network_is_told(small_dataset: Dataset, small_plan: Plan, tmp_path: Path) -> None:
    unet = small_plan.unet.model_copy(update={"block": "residual", "deep_supervision": True})
    plan = small_plan.model_copy(update={"unet": unet})
    network = build_network(plan.network, unet, plan.patch_shape, generator=torch.Generator().manual_seed(0))
    facts = BundleFacts(
        name="unusual",
        fold=None,
        mirror=False,
        tile_step=0.5,
        plan=plan,
        schema=small_dataset.manifest.labels,
        config_yaml="name: unusual\n",
        provenance={},
    )
    save_bundle(tmp_path / "bundle", network.state_dict(), facts)
    assert told(tmp_path / "bundle")["network"] == "unet, features 4 8, block residual, deep supervision True"
