"""The command line: light at its start, with help for all, and each subcommand doing what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import typer

from pipeline.cli import app
from pipeline.config import reference

from .conftest import ROOT, Outcome, World, environment

HEAVY = ("highdicom", "lightning_fabric", "matplotlib", "mlflow", "monai", "nibabel", "scipy", "SimpleITK", "torch")
COMMANDS = ("manifest", "dicom", "check", "plan", "train", "crossval", "predict", "evaluate", "export", "view", "info",
            "config", "pacs", "import", "bundle", "compare", "postprocess", "inspect", "promote", "report", "runs",
            "scores")  # fmt: skip
Call = Callable[..., Outcome]


class TestStart:
    def test_help_and_version_load_nothing_heavy(self) -> None:
        source = f"""
import sys
from pipeline.cli import main
for arguments in (["--help"], ["--version"], ["predict", "--help"], ["manifest", "build", "--help"], ["config"]):
    sys.argv = ["volseg", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print("loaded:", *sorted(set({HEAVY}) & set(sys.modules)))
"""
        done = subprocess.run(
            [sys.executable, "-c", source], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "loaded:"
        assert done.stderr == ""

    def test_as_its_user_starts_it(self, real_process: Call, tmp_path: Path) -> None:
        done = real_process("--version", cwd=tmp_path)
        assert (done.code, done.out, done.err) == (0, f"volseg {version('volseg')}\n", "")

    def test_every_subcommand_is_listed_with_a_line(self, in_process: Call) -> None:
        done = in_process("--help")
        assert done.code == 0
        for name in COMMANDS:
            line = next(line for line in done.out.splitlines() if line.split()[:1] == [name])
            assert len(line.split()) > 3

    def test_every_option_of_every_subcommand_is_explained(self) -> None:
        group: Any = typer.main.get_command(app)
        commands = dict(group.commands)
        for name in ("manifest", "dicom", "pacs", "import", "bundle", "scores"):
            # `bundle export` is not `export`.
            commands |= {f"{name} {inner}": command for inner, command in group.commands[name].commands.items()}
        nested = ("manifest build", "dicom ls", "pacs echo", "pacs find", "pacs fetch", "pacs send",
                  "import nnunet", "import monai", "bundle export", "bundle quantise", "scores combine")  # fmt: skip
        assert set(commands) == {*COMMANDS, *nested}
        for name, found in commands.items():
            assert found.help, name
            for parameter in found.params:
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"

    def test_without_a_word_it_says_what_there_is(self, in_process: Call) -> None:
        done = in_process()
        assert "Commands:" in done.out + done.err

    @pytest.mark.parametrize(
        "arguments",
        [["trian"], ["train"], ["train", "x.yaml"], ["train", "x.yaml", "--fold", "one"], ["check", "--wrong", "x"],
         ["crossval", "x.yaml", "--folds", "a,b"], ["predict", "model", "--out", "x"]],
    )  # fmt: skip
    def test_wrong_usage_is_2(self, in_process: Call, arguments: list[str]) -> None:
        done = in_process(*arguments)
        assert done.code == 2
        assert done.err.startswith("Usage: ")
        assert "Error: " in done.err or "error" in done.err.lower()
        assert "Traceback" not in done.err

    def test_the_reference_of_keys_is_printed(self, in_process: Call) -> None:
        assert in_process("config").out == reference()


class TestInfo:
    def test_a_volume(self, in_process: Call, trained: World) -> None:
        done = in_process("info", trained.image(0))
        assert (done.code, done.err) == (0, "")
        assert "volume case_0.nii.gz" in done.out
        assert "16x16x12 voxels of 1x1.5x2 mm, RAS" in done.out
        assert "16.0 x 24.0 x 24.0 mm" in done.out

    def test_a_dicom_folder_without_whose_it_is(self, in_process: Call, data_dir: Path) -> None:
        folder = data_dir / "dicom_hippocrop"
        done = in_process("info", folder)
        assert done.code == 0
        header = pydicom.dcmread(next(folder.glob("*.dcm")), stop_before_pixels=True)
        assert header.SeriesInstanceUID in done.out
        assert "MR" in done.out
        for secret in (str(header.PatientName), str(header.PatientID)):
            assert not secret or secret not in done.out + done.err

    def test_a_manifest(self, in_process: Call, trained: World) -> None:
        done = in_process("info", trained.manifest)
        assert done.code == 0
        assert "manifest 'phantoms'" in done.out
        assert "1 bright, 2 dark" in done.out

    def test_a_run_and_its_model(self, in_process: Call, trained: World) -> None:
        done = in_process("info", trained.run)
        assert done.code == 0
        assert re.search(r"fold 1\W+not finished", done.out)
        assert "12 steps in" in done.out
        done = in_process("info", trained.run / "fold_0" / "bundle")
        assert done.code == 0
        assert "model bundle 'tiny'" in done.out
        assert "unet, features 4 8" in done.out
        assert version("torch") in done.out


class TestStages:
    def test_check_is_content_with_a_sound_dataset(self, in_process: Call, trained: World, tmp_path: Path) -> None:
        done = in_process("check", trained.manifest, "--json", tmp_path / "check.json")
        assert (done.code, done.err) == (0, "")
        assert "phantoms: 4 cases, 0 errors, 0 notes" in done.out
        assert json.loads((tmp_path / "check.json").read_text())["ok"] is True

    def test_plan_gives_reasons_and_json(self, in_process: Call, trained: World, tmp_path: Path) -> None:
        done = in_process("plan", trained.config, "--out", tmp_path / "plan.json", "--set", "plan.patch_shape=null")
        assert done.code == 0
        for word in ("spacing_mm", "the median of 4 training cases", "set by hand", "bottleneck sees"):
            assert word in done.out
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["spacing_mm"] == [1.0, 1.5, 2.0]
        assert plan["unet"]["features"] == [4, 8]

    def test_train_says_where_its_results_lie(self, in_process: Call, trained: World) -> None:
        assert (trained.run / "fold_0" / "done.json").is_file()
        again = in_process("train", trained.config, "--fold", 0)
        assert again.code == 0
        assert "fold 0 is finished already (12 steps)" in again.err
        assert f"model: {trained.run / 'fold_0' / 'bundle'}" in again.out

    def test_predict_evaluate_export(self, in_process: Call, trained: World, tmp_path: Path) -> None:
        out = tmp_path / "out"
        done = in_process("predict", trained.run, trained.image(2), "--out", out, "--as", "nifti,overlay")
        assert done.code == 0, done.err
        assert done.out.splitlines() == [
            f"{out / 'case_2.nii.gz'}  (read back and compared: the same)",
            f"{out / 'case_2.png'}",
        ]
        result, source = nib.load(out / "case_2.nii.gz"), nib.load(trained.image(2))  # type: ignore[attr-defined]
        assert result.shape == source.shape
        assert np.allclose(result.affine, source.affine)

        report = tmp_path / "report.json"
        done = in_process("evaluate", out / "case_2.nii.gz", trained.label(2), "--json", report)
        assert done.code == 0, done.err
        assert "bright" in done.out
        assert [row["label"] for row in json.loads(report.read_text())["labels"]] == ["bright", "dark"]

        done = in_process("export", out / "case_2.nii.gz", "--source", trained.image(2), "--out", tmp_path / "again",
                          "--as", "nifti")  # fmt: skip
        assert done.code == 0, done.err
        again = nib.load(tmp_path / "again" / "case_2.nii.gz")  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(again.dataobj), np.asarray(result.dataobj))

    def test_a_manifest_is_segmented_whole_and_scored(self, in_process: Call, trained: World, tmp_path: Path) -> None:
        out = tmp_path / "out"
        done = in_process("predict", trained.run / "fold_0", trained.manifest, "--out", out)
        assert done.code == 0, done.err
        assert sorted(p.name for p in out.glob("*.nii.gz")) == [f"case_{n}.nii.gz" for n in range(4)]
        done = in_process("evaluate", out, trained.manifest, "--csv", tmp_path / "scores.csv")
        assert done.code == 0, done.err
        assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + 4 * 2

    def test_a_dicom_series_becomes_a_dicom_segmentation(
        self, in_process: Call, trained: World, data_dir: Path, tmp_path: Path
    ) -> None:
        series, out = data_dir / "dicom_hippocrop", tmp_path / "out"
        done = in_process("predict", trained.run, series, "--out", out, "--as", "seg")
        assert done.code == 0, done.err
        found = pydicom.dcmread(out / "dicom_hippocrop.seg.dcm", stop_before_pixels=True)
        source = pydicom.dcmread(next(series.glob("*.dcm")), stop_before_pixels=True)
        assert found.Modality == "SEG"
        assert found.StudyInstanceUID == source.StudyInstanceUID

    def test_crossval_runs_the_folds_that_are_left(self, in_process: Call, world: World) -> None:
        done = in_process("crossval", world.config, "--folds", "1")
        assert done.code == 0, done.err
        assert not (world.run / "fold_0").exists()
        done = in_process("crossval", world.config)
        assert done.code == 0, done.err
        assert "fold 1 is finished already, kept" in done.err
        assert {case["fold"] for case in json.loads((world.run / "report.json").read_text())["cases"]} == {0, 1}
        done = in_process("crossval", world.config, "--folds", "2")
        assert (done.code, done.err) == (1, "error: fold 2: there are folds 0 to 1 (folds.count)\n")
        done = in_process("postprocess", world.run, "--dry-run")
        assert done.code == 0, done.err
        assert "nothing chosen: 4 patients in 2 finished folds; at least 10 patients" in done.out
        assert "nothing was written (--dry-run)" in done.out
        done = in_process("postprocess", world.run, "--none")
        assert done.code == 0, done.err
        assert "post-processing: none is wanted" in done.out
        report = json.loads((world.run / "report.json").read_text())
        assert report["postprocessing"]["note"].startswith("none is wanted")
        assert "None is wanted" in (world.run / "report.html").read_text()
        done = in_process("crossval", world.config)
        assert "post-processing: none is wanted" in done.out
        done = in_process("postprocess", world.run, "--none", "--dry-run")
        assert (done.code, done.out) == (1, "")
        done = in_process("postprocess", world.run)
        assert done.code == 0, done.err
        assert "nothing chosen: 4 patients" in done.out
        assert "written to the bundles of folds 0, 1\nreport: " in done.out
        done = in_process("postprocess", world.run / "fold_0")
        assert done.code == 1
        assert "not the folder of a cross-validation (no dataset.json in it)" in done.err
