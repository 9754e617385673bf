"""A trained nnU-Net folder becomes bundles, and bundles its folder again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.bundle import WEIGHTS, find_bundles, load_bundle
from pipeline.cli import app
from pipeline.errors import BundleError, ExportError, RunError
from pipeline.files import sha256_of_file
from pipeline.interop.exporting import export_model
from pipeline.interop.nnunet_checkpoint import read_checkpoint
from pipeline.interop.nnunet_import import import_nnunet
from pipeline.manifest import load_dataset
from pipeline.predict import refuse_modality

DATA = Path(__file__).parents[2] / "data" / "nnunet"
CHECKPOINT = "checkpoint_final.pth"
NAMES = ("plain_3d", "plain_2d", "resenc_3d")
TRANSPOSED = [
    ("plain_3d", [0, 1, 2], (2, 1, 0)),
    ("plain_3d", [1, 0, 2], (1, 2, 0)),
    ("plain_2d", [1, 0, 2], (1, 2, 0)),
    ("plain_2d", [2, 0, 1], (0, 2, 1)),
    ("resenc_3d", [2, 0, 1], (0, 2, 1)),
]
"""transpose_forward, and for each axis of nnU-Net's network that of the file, worked out by hand."""


def copied(name: str, target: Path, *, folds: tuple[str, ...] = ("0",)) -> Path:
    shutil.copytree(DATA / name, target)
    for fold in folds:
        if fold != "0":
            shutil.copytree(DATA / name / "fold_0", target / f"fold_{fold}")
    if "0" not in folds:
        shutil.rmtree(target / "fold_0")
    return target


def edited(folder: Path, name: str, change: object) -> Path:
    document = json.loads((folder / name).read_text())
    assert callable(change)
    change(document)
    (folder / name).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(("name", "transpose", "files"), TRANSPOSED)
def test_a_bundle_gives_nnunets_logits_for_volumes_as_files_store_them(
    name: str, transpose: list[int], files: tuple[int, ...], tmp_path: Path
) -> None:
    def turn(plans: dict[str, object]) -> None:
        plans["transpose_forward"] = transpose

    (path,) = import_nnunet(edited(copied(name, tmp_path / "source"), "plans.json", turn), tmp_path / "bundle")
    bundle, check = load_bundle(path), np.load(DATA / name / "network_check.npz")
    image, logits = (torch.from_numpy(check[key]) for key in ("image", "logits"))
    if name == "plain_2d":
        image, logits = image[:, None], logits[:, None]
    order = (0, *(1 + files.index(axis) for axis in range(3)))
    image, logits = image.permute(order), logits.permute(order)
    assert bundle.plan.patch_shape == tuple(image.shape[1:])
    with torch.no_grad():
        found = bundle.network(image[None].contiguous())[0]
    assert torch.allclose(found, logits, rtol=0, atol=1e-5)
    slice_axis = files[0] if name == "plain_2d" else None
    assert bundle.plan.slice_axis == slice_axis
    assert bundle.plan.mirror_axes == tuple(axis for axis in range(3) if axis != slice_axis)


def test_what_a_bundle_says_of_its_origin(tmp_path: Path) -> None:
    def name_people(dataset: dict[str, object]) -> None:
        dataset["training"] = [{"image": "imagesTr/Doe_John.nii.gz"}]

    source = edited(copied("plain_3d", tmp_path / "source"), "dataset.json", name_people)
    (path,) = import_nnunet(source, tmp_path / "bundle")
    index = load_bundle(path).index
    assert (index.name, index.fold, index.mirror, index.tile_step) == ("Dataset999_Oracle_3d_fullres", 0, True, 0.5)
    assert index.provenance["nnunet_checkpoint"] == f"fold_0/{CHECKPOINT}"
    sha256 = read_checkpoint(source / "fold_0" / CHECKPOINT).sha256
    assert index.provenance["nnunet_checkpoint_sha256"] == sha256
    everything = "".join(file.read_text() for file in path.iterdir() if file.suffix in {".json", ".yaml"})
    assert "Doe" not in everything
    assert str(tmp_path) not in everything


def test_folds_become_a_run_folder_and_the_one_of_all_cases_a_bundle(tmp_path: Path) -> None:
    source = copied("plain_3d", tmp_path / "source", folds=("0", "3", "all"))
    bundles = import_nnunet(source, tmp_path / "run")
    assert bundles == find_bundles(tmp_path / "run")
    assert [load_bundle(path).index.fold for path in bundles] == [0, 3]
    assert all("nnunet_unfinished" not in load_bundle(path).index.provenance for path in bundles)
    (whole,) = import_nnunet(source, tmp_path / "whole", folds=["all"])
    assert (whole, load_bundle(whole).index.fold) == (tmp_path / "whole", None)
    with pytest.raises(BundleError, match="no checkpoint of fold 1; folds that have one: 0, 3, all"):
        import_nnunet(source, tmp_path / "other", folds=["0", "1"])
    assert not (tmp_path / "other").exists()


def ended_early(source: Path, *folds: str) -> Path:
    for fold in folds:
        (source / f"fold_{fold}" / CHECKPOINT).rename(source / f"fold_{fold}" / "checkpoint_best.pth")
    return source


def test_a_fold_whose_training_did_not_end_is_left_out_and_named(tmp_path: Path) -> None:
    source = ended_early(copied("plain_2d", tmp_path / "source", folds=("0", "3", "4")), "3")
    (source / "fold_1").mkdir()
    bundles = import_nnunet(source, tmp_path / "run")
    assert [load_bundle(path).index.fold for path in bundles] == [0, 4]
    told = "fold 1, 3 left out: no checkpoint_final.pth there, so the training did not end"
    assert [load_bundle(path).index.provenance["nnunet_unfinished"] for path in bundles] == [told, told]
    asked = import_nnunet(source, tmp_path / "asked", folds=["0", "3"])
    told = "fold 3 taken from checkpoint_best.pth: no checkpoint_final.pth there, so the training did not end"
    assert [load_bundle(path).index.provenance["nnunet_unfinished"] for path in asked] == [told, told]
    done = CliRunner().invoke(app, ["import", "nnunet", str(source), "--out", str(tmp_path / "told")])
    assert "fold 1, 3 left out" in " ".join(done.output.split()), done.output


def test_where_no_training_ended_the_best_of_each_fold_counts(tmp_path: Path) -> None:
    source = ended_early(copied("plain_2d", tmp_path / "source", folds=("0", "3")), "0", "3")
    bundles = import_nnunet(source, tmp_path / "run")
    facts = [load_bundle(path).index.provenance for path in bundles]
    assert [fact["nnunet_checkpoint"] for fact in facts] == [f"fold_{n}/checkpoint_best.pth" for n in (0, 3)]
    assert facts[0]["nnunet_unfinished"].startswith("fold 0, 3 taken from checkpoint_best.pth: no checkpoint_final")


def test_a_finished_fold_of_all_cases_counts_before_unfinished_ones(tmp_path: Path) -> None:
    source = ended_early(copied("plain_2d", tmp_path / "source", folds=("0", "all")), "0")
    (path,) = import_nnunet(source, tmp_path / "whole")
    index = load_bundle(path).index
    assert index.fold is None
    assert index.provenance["nnunet_unfinished"].startswith("fold 0 left out")


def changed_checkpoint(source: Path, **changes: Any) -> Path:
    path = source / "fold_0" / CHECKPOINT
    document = torch.load(path, map_location="cpu", weights_only=False)
    torch.save(document | changes, path)
    return source


@pytest.mark.parametrize(
    "trainer",
    ["nnUNetTrainer_4000epochs_NoMirroring", "nnUNetTrainerDA5_10epochs", "nnUNetTrainer_onlyMirror01_1500ep",
     "nnUNetTrainer_1epoch", "nnUNetTrainerBN", "nnUNetTrainerNoDeepSupervision", "nnUNetTrainerAdan1en3"],
)  # fmt: skip
def test_trainers_that_build_the_network_of_the_plans(trainer: str, tmp_path: Path) -> None:
    source = changed_checkpoint(copied("plain_2d", tmp_path / "source"), trainer_name=trainer)
    (path,) = import_nnunet(source, tmp_path / "bundle")
    assert load_bundle(path).index.provenance["nnunet_trainer"] == str(trainer)


@pytest.mark.parametrize(
    "trainer", ["nnUNetTrainerGELU", "nnUNet_Primus_S_Trainer", "nnUNetTrainerBN_GELU", "MyTrainer_5epochs", None]
)
def test_other_trainers_are_refused_by_name(trainer: str | None, tmp_path: Path) -> None:
    source = changed_checkpoint(copied("plain_2d", tmp_path / "source"), trainer_name=trainer)
    with pytest.raises(BundleError, match=f"trainer_name: found '{trainer}', expected a trainer of nnU-Net v2"):
        import_nnunet(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    (path,) = import_nnunet(source, tmp_path / "bundle", as_planned=True)
    assert load_bundle(path).index.provenance["nnunet_trainer"] == str(trainer)


def test_a_network_far_larger_than_the_checkpoint_is_refused_before_it_is_built(tmp_path: Path) -> None:
    def widen(plans: Any) -> None:
        (configuration,) = plans["configurations"].values()
        arguments = configuration["architecture"]["arch_kwargs"]
        arguments["features_per_stage"] = [10**9] * len(arguments["features_per_stage"])

    source = edited(copied("plain_3d", tmp_path / "source"), "plans.json", widen)
    with pytest.raises(BundleError, match=r"checkpoint_final.pth: found \d+ weights, expected \d+ for the network"):
        import_nnunet(source, tmp_path / "bundle")


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"batch_size": ' + "1" * 5000 + "}", "{", "[]"])
def test_files_that_are_no_plans_are_told_in_one_line(text: str, tmp_path: Path) -> None:
    source = copied("plain_2d", tmp_path / "source")
    (source / "plans.json").write_text(text)
    with pytest.raises(BundleError, match=r"plans.json: (cannot be read as JSON|found list)") as caught:
        import_nnunet(source, tmp_path / "bundle")
    assert "\n" not in str(caught.value)


def test_a_channel_that_names_its_normalisation_takes_any_modality(tmp_path: Path) -> None:
    """As nnU-Net tells its users to choose one; the bundle is read again, told, and refuses no CT."""
    source = edited(copied("plain_3d", tmp_path / "source"), "dataset.json", name_by_normalisation)
    (path,) = import_nnunet(source, tmp_path / "bundle")
    _, channel = load_bundle(path).plan.channels
    assert (channel.modality, channel.described) == (None, "zscore (modality unknown)")
    refuse_modality("CT", channel)
    told = CliRunner().invoke(app, ["info", str(path)])
    assert (told.exit_code, "zscore (modality unknown)" in " ".join(told.output.split())) == (0, True), told.output


def name_by_normalisation(dataset: Any) -> None:
    dataset["channel_names"] = {"0": "CT", "1": "zscore"}


def test_a_raw_folder_and_the_model_of_its_dataset_name_channels_alike(tmp_path: Path) -> None:
    """The names and modalities of one dataset.json, as the manifest's reader and as the import give them."""

    def name_both(dataset: Any) -> None:
        dataset |= {"channel_names": {"0": "CBCT", "1": "CBCT"}, "file_ending": ".nii.gz", "numTraining": 1}

    source = edited(copied("plain_3d", tmp_path / "source"), "dataset.json", name_both)
    (path,) = import_nnunet(source, tmp_path / "bundle")
    imported = [(channel.name, channel.modality) for channel in load_bundle(path).plan.channels]
    (source / "imagesTr").mkdir()
    (source / "labelsTr").mkdir()
    for name in ("imagesTr/one_0000", "imagesTr/one_0001", "labelsTr/one"):
        (source / f"{name}.nii.gz").touch()
    raw = load_dataset(source / "dataset.json").manifest
    assert imported == [(channel.name, channel.modality) for channel in raw.channels]
    assert imported == [("CBCT_0", "CT"), ("CBCT_1", "CT")]


def test_nothing_of_a_model_whose_outputs_are_no_numbers_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = import_nnunet(DATA / "plain_2d", tmp_path / "bundle")
    monkeypatch.setattr("pipeline.interop.nnunet_export._difference", lambda *_: float("nan"))
    with pytest.raises(ExportError, match="fold 0 reads back with other outputs"):
        export_model(path, tmp_path / "back", to="nnunet", force=False)
    assert not (tmp_path / "back").exists()


def test_a_weight_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    (path,) = import_nnunet(DATA / "plain_2d", tmp_path / "bundle")
    weights = load_file(path / WEIGHTS)
    weights["network.heads.0.bias"][0] = float("inf")
    save_file(weights, path / WEIGHTS)
    index = json.loads((path / "bundle.json").read_text())
    index["sha256"][WEIGHTS] = sha256_of_file(path / WEIGHTS)
    (path / "bundle.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"bundle: heads\.0\.bias: found values that are not finite"):
        export_model(path, tmp_path / "back", to="nnunet", force=False)
    assert not (tmp_path / "back").exists()


def test_a_model_that_gives_zeros_alone_goes_back_too(tmp_path: Path) -> None:
    weights = torch.load(DATA / "plain_2d" / "fold_0" / CHECKPOINT, weights_only=False)["network_weights"]
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    source = changed_checkpoint(copied("plain_2d", tmp_path / "source"), network_weights=zeros)
    import_nnunet(source, tmp_path / "bundle")
    lines = export_model(tmp_path / "bundle", tmp_path / "back", to="nnunet", force=False)
    assert "the same" in lines[1]


def test_the_folder_above_is_enough_where_one_model_fits(tmp_path: Path) -> None:
    for name in ("plain_3d", "plain_2d"):
        configuration = {"plain_3d": "3d_fullres", "plain_2d": "2d"}[name]
        copied(name, tmp_path / "results" / f"nnUNetTrainer__nnUNetPlans__{configuration}")
    with pytest.raises(
        BundleError, match=r"several trained models; give one of nnUNetTrainer__nnUNetPlans__2d, nnUNet"
    ):
        import_nnunet(tmp_path / "results", tmp_path / "bundle")
    (path,) = import_nnunet(tmp_path / "results", tmp_path / "bundle", configuration="2d")
    assert load_bundle(path).plan.unet.dimensions == 2
    with pytest.raises(BundleError, match="no model of configuration '3d_lowres'"):
        import_nnunet(tmp_path / "results", tmp_path / "bundle", configuration="3d_lowres")
    with pytest.raises(BundleError, match="no trained nnU-Net v2 model"):
        import_nnunet(tmp_path / "bundle", tmp_path / "other")


def test_nothing_but_bundles_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    with pytest.raises(RunError, match="not to be replaced"):
        import_nnunet(DATA / "plain_2d", tmp_path / "precious", force=True)
    import_nnunet(DATA / "plain_2d", tmp_path / "bundle")
    with pytest.raises(RunError, match="exists already"):
        import_nnunet(DATA / "plain_2d", tmp_path / "bundle")
    import_nnunet(DATA / "plain_2d", tmp_path / "bundle", force=True)
    with pytest.raises(RunError, match="not to be replaced"):
        export_model(tmp_path / "bundle", tmp_path / "precious", to="nnunet", force=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_goes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = copied(name, tmp_path / "source", folds=("0", "1"))
    import_nnunet(source, tmp_path / "run")
    lines = export_model(tmp_path / "run", tmp_path / "back", to="nnunet", force=False)
    assert "folds 0 1" in lines[0]
    for fold in ("fold_0", "fold_1"):
        before, after = (read_checkpoint(folder / fold / CHECKPOINT) for folder in (source, tmp_path / "back"))
        assert before.weights.keys() == after.weights.keys()
        assert all(torch.equal(before.weights[key], after.weights[key]) for key in before.weights)
        assert (before.configuration, before.mirror_axes) == (after.configuration, after.mirror_axes)
    import_nnunet(tmp_path / "back", tmp_path / "again")
    for first, second in zip(find_bundles(tmp_path / "run"), find_bundles(tmp_path / "again"), strict=True):
        assert load_bundle(first).plan == load_bundle(second).plan
        assert load_bundle(first).digest == load_bundle(second).digest


def test_a_bundle_that_nnunet_did_not_train_is_refused_with_the_reason(tmp_path: Path) -> None:
    (path,) = import_nnunet(DATA / "plain_2d", tmp_path / "bundle")
    index = json.loads((path / "bundle.json").read_text())
    (path / "config.yaml").write_text("name: ours\n")
    index["sha256"]["config.yaml"] = sha256_of_file(path / "config.yaml")
    (path / "bundle.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match="was not trained by nnU-Net, whose plans cannot say its preprocessing"):
        export_model(path, tmp_path / "back", to="nnunet", force=False)
    assert not (tmp_path / "back").exists()
    with pytest.raises(ExportError, match="did you mean 'nnunet'"):
        export_model(path, tmp_path / "back", to="nnunett", force=False)


def test_the_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["import", "nnunet", str(DATA / "plain_2d"), "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.output
    assert "nnunet_trainer: nnUNetTrainer" in done.output
    options = ["--to", "nnunet", "--out", str(tmp_path / "back")]
    done = runner.invoke(app, ["bundle", "export", str(tmp_path / "bundle"), *options])
    assert done.exit_code == 0, done.output
    assert f"-m {tmp_path / 'back'} -f 0" in done.output
