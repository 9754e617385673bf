"""How a MONAI bundle brings its result back to the study's grid: done likewise, or told where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.bundle import load_bundle
from pipeline.cli import app
from pipeline.interop.monai_import import ImportChoices, import_monai
from pipeline.predict import Model, PredictSettings, predict
from tests.pipeline.interop.test_monai_import import AFTER, Change, make, put, run_by_monai
from transforms.volume import read_volume

pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATION, INVERT, DISCRETE, SAVE = AFTER
NEAREST = "brings labels back by the nearest voxel (Invertd nearest_interp)"
LABELS = "brings labels back as numbers, linearly (Invertd after AsDiscreted)"
ABSENT = "has no Invertd, so labels stay on the network's grid, or SaveImaged brings them back (resample)"
CODE = "brings results back as code says (Invertd nearest_interp), which is not run"


def after(*transforms: dict[str, Any]) -> Change:
    return put("postprocessing#transforms", list(transforms))


def invert(**said: Any) -> dict[str, Any]:
    return {**{k: v for k, v in INVERT.items() if k != "nearest_interp"}, **said}


def back(folder: Path, *changes: Change, choices: ImportChoices | None = None) -> tuple[str, str | None]:
    """What is restored, and the difference that is told."""
    bundle = load_bundle(import_monai(make(folder / "m", *changes), folder / "b", choices=choices))
    return bundle.plan.inference.restores, bundle.index.provenance.get("a difference from MONAI")


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ([after(ACTIVATION, invert(), DISCRETE)], NEAREST),
        ([after(ACTIVATION, invert(nearest_interp=True), DISCRETE)], NEAREST),
        ([after(ACTIVATION, invert(keys=["pred", "label"], nearest_interp=[True, False]), DISCRETE)], NEAREST),
        ([after(ACTIVATION, invert(nearest_interp="@rough"), DISCRETE), put("rough", True)], NEAREST),
        ([after(invert(), ACTIVATION, DISCRETE)], NEAREST),
        ([after(ACTIVATION, DISCRETE, invert(nearest_interp=True), SAVE)], NEAREST),
        ([after(ACTIVATION, DISCRETE, INVERT, SAVE)], LABELS),
        ([after(ACTIVATION, DISCRETE, {**SAVE, "resample": True})], ABSENT),
        ([after(ACTIVATION, {**INVERT, "_disabled_": True}, DISCRETE)], ABSENT),
        ([after(ACTIVATION, {**INVERT, "keys": "label"}, DISCRETE)], ABSENT),
        ([after(ACTIVATION, invert(nearest_interp="$not @fine"), DISCRETE)], CODE),
        ([after(ACTIVATION, invert(keys=["label", "pred"], nearest_interp=[True, "$not @fine"]), DISCRETE)], CODE),
        ([put("preprocessing#transforms#3#mode", "nearest")],
         "brings labels back by the nearest voxel (Invertd, as Spacingd's mode)"),
    ],
)  # fmt: skip
def test_another_way_back_is_told(tmp_path: Path, changes: list[Change], theirs: str) -> None:
    restores, told = back(tmp_path, *changes)
    ours = "volseg brings probabilities back linearly, so borders may differ by a voxel"
    assert (restores, told) == ("probabilities", f"its post-processing {theirs}; {ours}")


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [after(ACTIVATION, invert(keys=["label", "pred"], nearest_interp=[True, False]), DISCRETE)],
        [after(ACTIVATION, invert(nearest_interp="@rough", post_func="$my.code"), DISCRETE), put("rough", False)],
        [after(ACTIVATION, DISCRETE, SAVE), put("pixdim", [-1, -1, -1])],
        [after(ACTIVATION, invert(), DISCRETE), put("preprocessing#transforms#3#_disabled_", True)],
    ],
)
def test_nothing_is_told_where_the_way_back_is_the_same(tmp_path: Path, changes: list[Change]) -> None:
    assert back(tmp_path, *changes) == ("probabilities", None)


@pytest.mark.parametrize("transforms", [(INVERT, ACTIVATION, DISCRETE), (INVERT, DISCRETE)])
def test_logits_are_brought_back_where_the_bundle_does(
    tmp_path: Path, request: pytest.FixtureRequest, transforms: tuple[dict[str, Any], ...]
) -> None:
    study = Path(request.config.rootpath) / "tests/data/hippocampus/images/hippocampus_001.nii.gz"
    spaced = put("pixdim", [2.5, 2.5, 2.5])
    assert back(tmp_path, spaced, after(*transforms)) == ("blended", None)
    bundle = load_bundle(tmp_path / "b")
    found = predict(
        Model((bundle,)), [read_volume(study)], settings=PredictSettings(mirror=False), device=torch.device("cpu")
    )
    folder = make(tmp_path / "n", spaced, after(*transforms, SAVE))  # `run_by_monai` takes the last one off
    # Of probabilities 0.9965 are the same.
    assert float(np.mean(found.label_map == run_by_monai(folder, study))) > 0.9995


def test_the_command_tells_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", after(ACTIVATION, invert(), DISCRETE))
    result = CliRunner().invoke(app, ["import", "monai", str(folder), "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert f"a difference from MONAI: its post-processing {NEAREST}; volseg brings" in result.output
    again = CliRunner().invoke(app, ["info", str(tmp_path / "b")])
    assert "a difference from MONAI" in again.output
