"""What `volseg info` tells of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.bundle import BundleFacts, save_bundle
from pipeline.describe import facts_of
from pipeline.errors import RunError
from pipeline.files import sha256_of_file, write_json
from pipeline.folds import Folds, write_folds
from pipeline.manifest import Dataset
from pipeline.models.registry import build_network
from pipeline.plan import Plan
from pipeline.report_values import read_report

from .test_compare import report


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


def test_a_run_tells_the_dice_of_its_reports(tmp_path: Path) -> None:
    """Not the one from before the folds agreed on mirrored passes, which the end of a fold wrote down."""
    write_folds(Folds(count=2, seed=0, fixed=False, fold_of={}, cases=()), tmp_path / "folds.json")
    (tmp_path / "dataset.json").write_text("{}")
    write_json(tmp_path / "fold_0" / "done.json", {"steps": 3, "seconds": 90, "dice": {"out_of_fold_dice/mean": 0.1}})
    write_json(tmp_path / "fold_0" / "report.json", report({"x": [0.5, None], "y": [0.7, None]}).to_json())
    found = told(tmp_path)
    assert found["fold 0"] == "3 steps in 1.5 minutes; Dice a 0.600, mean 0.600"
    assert found["fold 1"] == "not finished"


def test_a_report_that_is_none_is_named(tmp_path: Path) -> None:
    for text, reason in (("{", "cannot be read as a report"), ("[]", "not an evaluation report"), ("{}", "settings")):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(RunError, match=rf"report\.json: .*{reason}"):
            read_report(tmp_path / "report.json")
    with pytest.raises(RunError, match="FileNotFoundError"):
        read_report(tmp_path / "nothing.json")


def test_a_model_that_takes_axes_as_stored_says_so(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    plan = json.loads((bundle / "plan.json").read_text())
    (bundle / "plan.json").write_text(json.dumps(plan | {"placing": {}}))
    index = json.loads((bundle / "bundle.json").read_text())
    index["sha256"]["plan.json"] = sha256_of_file(bundle / "plan.json")
    (bundle / "bundle.json").write_text(json.dumps(index))
    assert told(bundle)["axes"].startswith("as each study is stored")
    assert "axes" not in told(small_bundle)
