"""Eight bits: rounded by what real windows hold, proven on other cases, and put into bundles or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from typer.testing import CliRunner

from pipeline import bundle as bundle_module
from pipeline.backends import int8_proof, with_backend
from pipeline.backends.int8 import evenly, full_windows, int8_model
from pipeline.backends.int8_proof import Evidence, quantise
from pipeline.backends.openvino import compiled
from pipeline.bundle import (
    BundleFacts,
    is_mirrored,
    load_bundle,
    save_bundle,
    set_air,
    set_int8,
    set_mirror,
    set_postprocessing,
)
from pipeline.cli import app
from pipeline.console import Silence
from pipeline.errors import BundleError, ConfigError, ExportError
from pipeline.export import Source, export
from pipeline.interop.network_graph import difference, example_of
from pipeline.manifest import Dataset, save_manifest
from pipeline.plan import Plan
from pipeline.predict import Model, PredictSettings, predict
from pipeline.runs import open_run
from pipeline.windows import predict_windows, window_settings
from tests.pipeline.interop.network_choices import CHOICES, bundle_of
from tests.pipeline.test_crossval import Listener, config_at
from transforms.volume import read_label, read_volume

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = "int8.onnx"


class TestNetwork:
    @pytest.mark.parametrize("choice", ["instance normalisation", "attention gates", "residual, standardised weights"])
    def test_it_is_close_on_patches_batches_and_other_sides(self, small_plan: Plan, choice: str) -> None:
        bundle = bundle_of(small_plan, **CHOICES[choice])
        small = int8_model(bundle, [example_of((1, 1, 16, 8, 16))])
        found = difference(bundle, compiled(small, "f32", threads=1))
        assert 1e-3 * found.peak < found.largest < 0.3 * found.peak

    def test_slices(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan, dimensions=2)
        found = difference(bundle, compiled(int8_model(bundle, [example_of((1, 1, 16, 1, 8))]), "f32", threads=1))
        assert found.within(0.3)

    def test_every_convolution_takes_eight_bits_and_two_products_never_overflow_sixteen(self, small_plan: Plan) -> None:
        graph = onnx.load_from_string(int8_model(bundle_of(small_plan), [example_of((1, 1, 16, 8, 16))])).graph
        weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
        made_by = {node.output[0]: node for node in graph.node}
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        assert len(convolutions) >= 5
        for node in convolutions:
            image, weight = (made_by[name] for name in node.input[:2])
            assert (image.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
            values = weights[weight.input[0]]
            assert values.dtype == "int8"
            assert 2 * 255 * int(abs(values.astype(int)).max()) < 2**15

    def test_the_same_windows_give_the_same_bytes(self, small_plan: Plan) -> None:
        bundle, window = bundle_of(small_plan), example_of((1, 1, 16, 8, 16))
        assert int8_model(bundle, [window]) == int8_model(bundle, [window])
        assert int8_model(bundle, [window]) != int8_model(bundle, [2 * window])


class TestWindows:
    def test_they_are_among_those_that_prediction_cuts_and_hold_most(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        image = torch.zeros(1, 70, 8, 20)
        image[:, 50:] = 1 + torch.rand(1, 20, 8, 20, generator=torch.Generator().manual_seed(1))
        seen: list[Tensor] = []

        def watch(window: Tensor) -> Tensor:
            seen.append(window.clone())
            return torch.zeros(1, 3, *window.shape[2:])

        predict_windows(watch, image, window_settings(bundle.plan, bundle.schema, step=0.5, mirror=False))
        found = full_windows(bundle, image, 3)
        assert 1 < len(found) <= 3 < len(seen)
        assert all(any(torch.equal(window, other) for other in seen) for window in found)
        assert all((window > 0.5).float().mean() > 0.2 for window in found)

    def test_an_image_smaller_than_a_window_ends_in_its_lowest_value(self, small_plan: Plan) -> None:
        image = torch.full((1, 10, 8, 16), 3.0)
        image[0, 0, 0, 0] = -2.0
        (window,) = full_windows(bundle_of(small_plan), image, 4)
        assert window.shape == (1, 1, 16, 8, 16)
        assert (window == 3.0).sum() == image.numel() - 1
        assert (window == -2.0).sum() == window.numel() - image.numel() + 1

    def test_evenly(self) -> None:
        assert evenly("abcdefgh", 3) == ["a", "c", "f"]
        assert evenly("ab", 3) == ["a", "b"]


@pytest.fixture(scope="module")
def home(small_dataset: Dataset, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two folds with one model, whose own answers are the references: in float32 its Dice is 1."""
    home = tmp_path_factory.mktemp("home")
    torch.set_num_threads(1)
    model = load_bundle(small_bundle)
    for case in small_dataset.manifest.cases:
        (image,), label = small_dataset.image_paths(case), small_dataset.label_path(case)
        assert label is not None
        target = home / "data" / image.relative_to(small_dataset.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, target)
        volume = read_volume(image)
        found = predict(Model((model,)), [volume], settings=PredictSettings(mirror=False), device=torch.device("cpu"))
        folder = (home / "data" / label.relative_to(small_dataset.root)).parent
        export(found, formats=["nifti"], out=folder, name=case.case_id, source=Source(volume))
    save_manifest(small_dataset.model_copy(update={"root": home / "data"}), home / "cases.json")
    run = open_run(config_at(home), home / "run", Silence())
    for fold in range(2):
        facts = BundleFacts("tiny", fold, False, 0.5, model.plan, model.schema, "", {"volseg": "0"})
        save_bundle(run.fold_folder(fold) / "bundle", model.network.state_dict(), facts)
    return home


@pytest.fixture(scope="module")
def quantised(home: Path) -> tuple[Path, list[tuple[Path, Evidence]]]:
    """The run with both of its bundles in eight bits too, and what was told."""
    run = copied(home, "quantised")
    with pytest.MonkeyPatch.context() as patch:
        be_lenient(patch)
        return run, quantise(run, [], console=Silence())


def copied(home: Path, name: str) -> Path:
    """The run, in a copy of its home."""
    return Path(shutil.copytree(home, home.parent / name)) / "run"


def be_lenient(patch: pytest.MonkeyPatch) -> None:
    """So small a network loses more in eight bits than real ones."""
    patch.setattr(int8_proof, "DICE_LOSS", 0.1)
    patch.setattr(int8_proof, "OTHER_LABELS", 0.15)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_lenient(monkeypatch)


@pytest.fixture
def plain(home: Path, tmp_path: Path) -> Path:
    """A bundle outside its run that a test may change."""
    return Path(shutil.copytree(home / "run" / "fold_0" / "bundle", tmp_path / "bundle"))


@pytest.fixture
def small(quantised: tuple[Path, Any], tmp_path: Path) -> Path:
    """As `plain`, with its network in eight bits."""
    return Path(shutil.copytree(quantised[0] / "fold_0" / "bundle", tmp_path / "bundle"))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated on windows that hold nothing: whatever convolutions take is cut off."""

    def cut_off(bundle: Any, windows: Sequence[Tensor]) -> bytes:
        return int8_model(bundle, [torch.zeros_like(window) for window in windows])

    monkeypatch.setattr(int8_proof, "int8_model", cut_off)


def images(dataset: Dataset) -> list[Path]:
    return [path for case in dataset.manifest.cases for path in dataset.image_paths(case)]


class TestProof:
    def test_a_run_is_calibrated_on_its_training_cases_and_proven_on_those_held_out(
        self, quantised: tuple[Path, list[tuple[Path, Evidence]]], home: Path
    ) -> None:
        run, told = quantised
        assert [folder for folder, _ in told] == [run / f"fold_{fold}" / "bundle" for fold in (0, 1)]
        for folder, evidence in told:
            assert (evidence.calibration_cases, evidence.cases, evidence.apart) == (2, 2, True)
            assert evidence.dice == 1
            assert evidence.dice_int8 is not None
            assert 0.9 < evidence.dice_int8 < 1
            assert 0 < evidence.other_labels < 0.15
            kept = json.loads((folder / "bundle.json").read_text())["provenance"]["int8"]
            assert kept["dice_int8"] == evidence.dice_int8
            before = home / folder.relative_to(run.parent) / "weights.safetensors"
            assert (folder / "weights.safetensors").read_bytes() == before.read_bytes()

    @pytest.mark.usefixtures("lenient")
    def test_again_gives_the_same_bytes(self, quantised: tuple[Path, Any]) -> None:
        folder = copied(quantised[0].parent, "again") / "fold_0"
        before = (folder / "bundle" / NETWORK).read_bytes(), (folder / "bundle" / "bundle.json").read_bytes()
        quantise(folder, [], console=Silence())
        assert ((folder / "bundle" / NETWORK).read_bytes(), (folder / "bundle" / "bundle.json").read_bytes()) == before

    @pytest.mark.usefixtures("lenient")
    def test_a_manifest_is_shared_out_and_its_labels_are_compared(self, plain: Path, home: Path) -> None:
        ((_, evidence),) = quantise(plain, [home / "cases.json"], console=Silence())
        assert (evidence.calibration_cases, evidence.cases, evidence.apart) == (2, 2, True)
        assert evidence.dice == 1

    @pytest.mark.usefixtures("lenient")
    def test_images_alone_are_compared_with_float32(self, plain: Path, small_dataset: Dataset) -> None:
        ((_, evidence),) = quantise(plain, images(small_dataset)[:1], console=Silence())
        assert (evidence.cases, evidence.apart, evidence.dice) == (1, False, None)
        assert evidence.sentence.endswith("(1 case, calibrated on as well, without references)")

    @pytest.mark.usefixtures("broken", "lenient")
    def test_a_dice_that_falls_is_refused_and_nothing_is_written(self, home: Path) -> None:
        folder = home / "run" / "fold_1" / "bundle"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        says = r"fold_1/bundle: not as good in eight bits: Dice 0\.\d+ .*, 1\.0000 in float32 \(-0\.\d+; 2 cases"
        with pytest.raises(ExportError, match=says) as refused:
            quantise(folder, [], console=Silence())
        assert "expected: Dice may fall by 0.1; nothing was written" in str(refused.value)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    @pytest.mark.usefixtures("broken", "lenient")
    def test_too_many_other_labels_are_refused(self, plain: Path, small_dataset: Dataset) -> None:
        with pytest.raises(ExportError, match=r"% of labelled voxels .* \(1 case, .* expected: at most 15 % of them"):
            quantise(plain, images(small_dataset)[:2], console=Silence())
        assert not (plain / NETWORK).exists()

    def test_no_bundle_is_written_unless_all_pass(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = copied(home, "refused")
        asked: list[Path] = []

        def require(evidence: Evidence, folder: Path) -> None:
            asked.append(folder)
            if len(asked) == 2:
                raise ExportError("the second is not as good")

        monkeypatch.setattr(Evidence, "require", require)
        with pytest.raises(ExportError, match="the second"):
            quantise(run, [], console=Silence())
        assert not list(run.glob(f"**/{NETWORK}"))

    @pytest.mark.parametrize(
        ("dice", "dice_int8", "others", "is_good"),
        [
            (0.9, 0.8981, 0.5, True),
            (0.9, 0.8979, 0.0, False),
            (0.9, 0.95, 0.5, True),
            (0.9, float("nan"), 0.0, False),
            (None, None, 0.0299, True),
            (None, None, 0.0301, False),
        ],
    )
    def test_the_limits(self, dice: float | None, dice_int8: float | None, others: float, is_good: bool) -> None:
        evidence = Evidence(2, 32, 20, True, dice, dice_int8, others)
        if is_good:
            evidence.require(Path("bundle"))
            return
        with pytest.raises(ExportError, match="bundle: not as good in eight bits"):
            evidence.require(Path("bundle"))


class TestRefusals:
    def test_nothing_to_calibrate_on(self, plain: Path) -> None:
        with pytest.raises(BundleError, match="lies in no run, whose cases are known; give images"):
            quantise(plain, [], console=Silence())

    def test_a_run_whose_cases_are_gone(self, home: Path, tmp_path: Path) -> None:
        run = Path(shutil.copytree(home / "run", tmp_path / "moved" / "run"))
        says = r"the cases of its run are not here \(.*no such manifest.*\); give images"
        with pytest.raises(BundleError, match=says):
            quantise(run, [], console=Silence())

    def test_a_run_whose_manifest_changed(self, home: Path) -> None:
        run = copied(home, "changed")
        document = json.loads((run.parent / "cases.json").read_text())
        document["cases"].pop()
        (run.parent / "cases.json").write_text(json.dumps(document))
        with pytest.raises(BundleError, match=r"are not here \(.*: another version than in training\); give images"):
            quantise(run, [], console=Silence())

    def test_a_manifest_of_other_labels(self, plain: Path, home: Path, tmp_path: Path) -> None:
        document = json.loads((home / "cases.json").read_text())
        document["labels"]["labels"][0]["name"] = "Middle"
        (tmp_path / "other.json").write_text(json.dumps(document))
        with pytest.raises(BundleError, match="its labels are not the model's"):
            quantise(plain, [tmp_path / "other.json"], root=(home / document["root"]).resolve(), console=Silence())

    def test_no_label_at_all(self) -> None:
        cases = int8_proof.Cases((), (), {})
        with pytest.raises(ExportError, match="neither in eight bits nor in float32 a voxel gets a label"):
            int8_proof._evidence(cases, 1, 1, [int8_proof._Compared(0, 0, None)])


class TestBundle:
    def test_weights_are_loaded_without_reading_it(self, small: Path) -> None:
        (small / NETWORK).write_bytes(b"another")
        bundle = load_bundle(small)
        assert with_backend(bundle, "torch") is bundle
        with pytest.raises(BundleError, match=r"int8.onnx: not the file that was saved \(its hash differs\)"):
            with_backend(bundle, "openvino-int8")
        (small / NETWORK).unlink()
        with pytest.raises(BundleError, match=r"int8.onnx is missing from the bundle; copy the whole folder again"):
            with_backend(load_bundle(small), "openvino-int8")

    def test_one_without_names_the_command(self, plain: Path) -> None:
        says = r"'tiny' \(fold 0\) has no network in eight bits; make one with `volseg bundle quantise MODEL`"
        with pytest.raises(BundleError, match=says):
            with_backend(load_bundle(plain), "openvino-int8")

    def test_results_are_told_apart_by_its_digest(self, small: Path) -> None:
        bundle = load_bundle(small)
        assert bundle.int8 is not None
        assert with_backend(bundle, "openvino-int8").digest == bundle.int8.sha256 != bundle.digest

    def test_what_was_proven_without_mirrored_passes_is_not_with_them(self, small: Path) -> None:
        set_mirror(small, not is_mirrored(small), {})
        assert load_bundle(small).int8 is None
        assert not (small / NETWORK).exists()
        assert "int8" not in load_bundle(small).index.provenance

    def test_a_bundle_that_was_changed_meanwhile_gets_none(self, small: Path) -> None:
        bundle = load_bundle(small)
        assert bundle.int8 is not None
        content = bundle.int8.read()
        set_mirror(small, not is_mirrored(small), {})
        with pytest.raises(BundleError, match="was changed while its network was brought to eight bits"):
            set_int8(small, content, {}, of=bundle)
        set_int8(small, content, {}, of=load_bundle(small))
        facts = BundleFacts("tiny", 0, is_mirrored(small), 0.5, bundle.plan, bundle.schema, "", {})
        other = {name: 2 * values for name, values in bundle.network.state_dict().items()}
        save_bundle(small, other, facts)
        with pytest.raises(BundleError, match="was changed while"):
            set_int8(small, content, {}, of=bundle)

    def test_what_else_is_set_leaves_it_there(self, small: Path) -> None:
        content = (small / NETWORK).read_bytes()
        set_mirror(small, is_mirrored(small), {})
        set_air(small, None)
        set_postprocessing(small, None)
        found = load_bundle(small)
        assert found.int8 is not None
        assert found.int8.read() == content
        assert "int8" in found.index.provenance

    def test_new_weights_are_without_it(self, small: Path) -> None:
        bundle = load_bundle(small)
        facts = BundleFacts("tiny", 0, False, 0.5, bundle.plan, bundle.schema, "", {})
        save_bundle(small, bundle.network.state_dict(), facts)
        assert load_bundle(small).int8 is None
        assert not (small / NETWORK).exists()

    @pytest.mark.parametrize("at", ["_write_index", "atomic_path"])
    @pytest.mark.parametrize("call", [1, 2])
    def test_whenever_it_is_cut_short_the_bundle_can_be_read(
        self, small: Path, at: str, call: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done, calls = getattr(bundle_module, at), []

        def killed(*arguments: Any) -> Any:
            calls.append(at)
            if len(calls) == call:
                raise KeyboardInterrupt
            return done(*arguments)

        before = (small / NETWORK).read_bytes()
        monkeypatch.setattr(bundle_module, at, killed)
        try:
            set_int8(small, b"another network", {"cases": 9}, of=load_bundle(small))
        except KeyboardInterrupt:
            assert len(calls) == call
        found = load_bundle(small)
        expected = {("_write_index", 1): before, ("atomic_path", 2): b"another network"}.get((at, call))
        assert (found.int8.read() if found.int8 else None) == expected
        assert ("int8" in found.index.provenance) == (expected is not None)


class TestCommands:
    def test_predict_averages_the_bundles_of_a_run(
        self, quantised: tuple[Path, Any], small_dataset: Dataset, tmp_path: Path
    ) -> None:
        (image, *_), run = images(small_dataset), quantised[0]
        maps = {}
        for name in ("torch", "openvino-int8"):
            out = tmp_path / name
            command = ["predict", str(run), str(image), "--out", str(out), "--backend", name]
            assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
            maps[name] = read_label(out / image.name).voxels
        assert 0 < (maps["torch"] != maps["openvino-int8"]).sum() < 0.15 * (maps["torch"] > 0).sum()

    @pytest.mark.parametrize("option", [["--mirror"], ["--step", "0.7"]])
    def test_what_was_not_proven_is_refused(
        self, quantised: tuple[Path, Any], small_dataset: Dataset, tmp_path: Path, option: list[str]
    ) -> None:
        command = ["predict", str(quantised[0]), str(images(small_dataset)[0]), "--out", str(tmp_path / "out"), *option]
        done = CliRunner().invoke(app, [*command, "--backend", "openvino-int8"])
        assert isinstance(done.exception, ConfigError)
        assert "proven with the model's own passes and windows alone" in str(done.exception)
        assert not (tmp_path / "out").exists()

    @pytest.mark.usefixtures("lenient")
    def test_a_case_that_cannot_be_read_is_set_aside_and_named(
        self, plain: Path, small_dataset: Dataset, tmp_path: Path
    ) -> None:
        for image in images(small_dataset):
            shutil.copy(image, tmp_path)
        files = sorted(tmp_path.glob("*.nii.gz"))
        files[1].write_bytes(b"no image")
        listener = Listener()
        ((_, evidence),) = quantise(plain, [tmp_path], console=listener)
        assert evidence.calibration_cases + evidence.cases == len(files) - 1
        assert [note for note in listener.notes if note.startswith("set aside ") and str(files[1]) in note]
        for file in files:
            file.write_bytes(b"no image")
        with pytest.raises(BundleError, match=r"none of \d can be read; give images, or --root"):
            quantise(plain, [tmp_path], console=Silence())

    def test_one_bundle_without_it_stops_an_ensemble(
        self, quantised: tuple[Path, Any], home: Path, small_dataset: Dataset, tmp_path: Path
    ) -> None:
        for fold, source in enumerate((quantised[0], home / "run")):
            shutil.copytree(source / f"fold_{fold}" / "bundle", tmp_path / "run" / f"fold_{fold}" / "bundle")
        command = ["predict", str(tmp_path / "run"), str(images(small_dataset)[0]), "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, [*command, "--backend", "openvino-int8"])
        assert isinstance(done.exception, BundleError)
        assert "(fold 1) has no network in eight bits" in str(done.exception)
        assert not (tmp_path / "out").exists()

    @pytest.mark.usefixtures("lenient")
    def test_quantise_tells_the_figures_and_how_to_use_it(self, plain: Path, home: Path) -> None:
        command = ["bundle", "quantise", str(plain), str(home / "cases.json")]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0
        assert f"{plain}: Dice 0." in done.stdout
        assert "--backend openvino-int8" in done.stdout
        assert load_bundle(plain).int8 is not None
