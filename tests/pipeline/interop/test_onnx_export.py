"""ONNX and TorchScript files: the bundle's own logits, whatever the network, or no file at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from pipeline.bundle import ModelBundle, load_bundle
from pipeline.errors import ExportError, RunError
from pipeline.interop.exporting import export_model
from pipeline.interop.model_card import model_card
from pipeline.interop.network_graph import Difference, difference, for_recording, has_free_sides, larger_shape
from pipeline.interop.onnx_export import onnx_model, onnx_run, require_same
from pipeline.interop.torchscript_export import recorded
from pipeline.plan import Plan
from tests.pipeline.interop.network_choices import CHOICES, bundle_of

pytestmark = pytest.mark.usefixtures("one_thread")

Recorder = Callable[[ModelBundle], Callable[[Tensor], Tensor]]
RECORDERS: dict[str, Recorder] = {"onnx": lambda bundle: onnx_run(onnx_model(bundle)), "torchscript": recorded}


@pytest.mark.parametrize("to", RECORDERS)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_the_unet_gives_the_same_logits(small_plan: Plan, choice: str, to: str) -> None:
    """On patches, on several at once and on volumes of other sides."""
    bundle = bundle_of(small_plan, **CHOICES[choice])
    assert len({i.shape for i in inputs_of(bundle, RECORDERS[to](bundle))}) == 3


def inputs_of(bundle: ModelBundle, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What `difference` ran it on, once it has passed."""
    seen: list[Tensor] = []

    def watched(image: Tensor) -> Tensor:
        seen.append(image)
        return run(image)

    found = difference(bundle, watched)
    assert found.passes, found
    assert found.peak > 0.1
    return seen


@pytest.mark.parametrize("to", RECORDERS)
def test_a_network_of_slices(small_plan: Plan, to: str) -> None:
    bundle = bundle_of(small_plan, dimensions=2)
    assert [i.shape[3] for i in inputs_of(bundle, RECORDERS[to](bundle))] == [1, 1, 1]


@pytest.mark.parametrize("to", RECORDERS)
def test_a_network_of_monai(small_plan: Plan, to: str) -> None:
    bundle = bundle_of(small_plan, network="dynunet")
    inputs_of(bundle, RECORDERS[to](bundle))


def test_the_larger_shape_fits_and_is_larger(small_plan: Plan) -> None:
    assert larger_shape(bundle_of(small_plan).plan) == (20, 12, 20)
    assert larger_shape(bundle_of(small_plan, dimensions=2).plan) == (20, 1, 12)


class TestDifference:
    def test_another_network_does_not_pass(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        found = difference(bundle, lambda image: bundle.network(image) + 1e-2)
        assert found.largest == pytest.approx(1e-2, rel=1e-3)
        assert not found.passes

    @pytest.mark.parametrize("spoil", [lambda x: x[:, :2], lambda x: x / 0 * 0])
    def test_another_shape_or_no_numbers_do_not_pass(self, small_plan: Plan, spoil: Any) -> None:
        bundle = bundle_of(small_plan)
        assert not difference(bundle, lambda image: spoil(bundle.network(image))).passes

    def test_a_refusal_says_by_how_much(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"m\.onnx: logits differ by 0\.5 from the bundle's own, which reach 3; "):
            require_same(Difference(0.5, 3.0), tmp_path / "m.onnx")


def test_what_is_recorded_leaves_the_bundle_as_it_is(small_plan: Plan) -> None:
    bundle = bundle_of(small_plan, block="residual", weight_standardisation=True)
    kinds = [type(m) for m in bundle.network.modules()]
    plain = {type(m) for m in for_recording(bundle).modules()}
    assert nn.InstanceNorm3d in plain
    assert nn.GroupNorm not in plain
    assert kinds == [type(m) for m in bundle.network.modules()]


class TestFiles:
    @pytest.mark.parametrize(("to", "suffix"), [("onnx", ".onnx"), ("torchscript", ".pt")])
    def test_a_file_and_its_card(self, small_bundle: Path, tmp_path: Path, to: str, suffix: str) -> None:
        out = tmp_path / f"model{suffix}"
        lines = export_model(small_bundle, out, to=to, force=False)
        assert lines[0].startswith(f"{out}: logits differ by at most ")
        assert "24x36x28, or any divisible by 2x2x2" in lines[1]
        assert {p.name for p in tmp_path.iterdir()} == {out.name, f"{out.name}.json"}
        with pytest.raises(RunError, match=r"exists already; give --force"):
            export_model(small_bundle, out, to=to, force=False)
        export_model(small_bundle, out, to=to, force=True)

    def test_onnx_runtime_reads_it_without_volseg(self, small_bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "model.onnx"
        export_model(small_bundle, out, to="onnx", force=False)
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        held = json.loads(session.get_modelmeta().custom_metadata_map["volseg"])
        assert held == json.loads((tmp_path / "model.onnx.json").read_text())
        image = np.random.default_rng(0).normal(size=(3, 1, 26, 30, 24)).astype(np.float32)
        with torch.inference_mode():
            expected = load_bundle(small_bundle).network(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(session.run(["logits"], {"image": image})[0], expected, atol=1e-5)
        assert onnx.load(out).opset_import[0].version == 18

    def test_torchscript_is_read_where_volseg_is_not(self, small_bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "model.pt"
        export_model(small_bundle, out, to="torchscript", force=False)
        source = (
            "import sys, json, torch; sys.path = [p for p in sys.path if p]; card = {'volseg.json': ''}\n"
            f"network = torch.jit.load({str(out)!r}, _extra_files=card)\n"
            "assert not [m for m in sys.modules if m.split('.')[0] in ('pipeline', 'transforms', 'monai')]\n"
            "print(json.loads(card['volseg.json'])['name'], *network(torch.zeros(1, 1, 24, 36, 28)).shape)"
        )
        command = [sys.executable, "-W", "ignore", "-c", source]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.stdout.split() == ["small", "1", "3", "24", "36", "28"], run.stderr

    @pytest.mark.parametrize(("to", "suffix"), [("onnx", ".onnx"), ("torchscript", ".pt")])
    def test_a_name_that_says_something_else(self, small_bundle: Path, tmp_path: Path, to: str, suffix: str) -> None:
        with pytest.raises(RunError, match=f"expected a name that ends in {suffix}"):
            export_model(small_bundle, tmp_path / "model.bin", to=to, force=False)

    def test_missing_packages_are_told_in_one_line_each(self, small_bundle: Path, tmp_path: Path) -> None:
        source = (
            "import sys; from pathlib import Path; from pipeline.errors import ExportError\n"
            "from pipeline.interop.exporting import export_model\n"
            "for package in ('onnx', 'onnxruntime'):\n"
            "    sys.modules[package] = None\n"
            "    try: export_model(Path(sys.argv[1]), Path(sys.argv[2]), to='onnx', force=False)\n"
            "    except ExportError as error: print(error)\n"
            "    del sys.modules[package]\n"
        )
        command = [sys.executable, "-c", source, str(small_bundle), str(tmp_path / "model.onnx")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.stdout.splitlines() == [
            'the package onnx is not installed; pip install "volseg[onnx]"',
            'ONNX Runtime is not installed; pip install "volseg[onnx]"',
        ], run.stderr
        assert list(tmp_path.iterdir()) == []


class TestCard:
    def test_a_channel_a_patch_and_labels(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        card = model_card(bundle, Difference(0.0, 1.0))
        assert json.loads(json.dumps(card)) == card
        assert card["input"]["channels"] == ["T1 (MR)"]
        assert card["input"]["other_sides_divisible_by"] == [4, 4, 4]
        assert (card["output"]["outputs"], card["output"]["label_ids"]) == (["background", "one", "five"], [0, 1, 5])
        assert card["plan"]["spacing_mm"] == list(small_plan.spacing_mm)
        assert card["plan"]["channels"][0]["normalisation"]["kind"] == "zscore"
        assert "reasons" not in card["plan"]

    def test_regions_paint_their_own_labels(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        labels = bundle.schema.model_dump() | {
            "regions": [
                {"name": "all", "labels": ["one", "five"], "paints": "five"},
                {"name": "core", "labels": ["one"], "paints": "one"},
            ]
        }
        card = model_card(replace(bundle, schema=type(bundle.schema).model_validate(labels)), Difference(0.0, 1.0))
        assert (card["output"]["outputs"], card["output"]["label_ids"]) == (["all", "core"], [5, 1])
        assert card["output"]["activation"] == "sigmoid"

    def test_sides_that_are_fixed(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        fixed = replace(bundle, plan=bundle.plan.model_copy(update={"network": "swin_unetr"}))
        assert not has_free_sides(fixed.plan)
        assert model_card(fixed, Difference(0.0, 1.0))["input"]["other_sides_divisible_by"] is None
