"""What goes wrong for a new user: one clear line each, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli_console import TerminalConsole

from .conftest import ROOT, Outcome, World, command, environment, phantom, save

Call = Callable[..., Outcome]
INTERRUPTED = "interrupted; finished parts are kept, and an unfinished training goes on with --resume\n"


@pytest.fixture
def refused(in_process: Call, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail, and give its one line without `error: `."""

    def run(*arguments: Any) -> str:
        done = in_process(*arguments)
        assert done.code == 1, done
        assert "Traceback" not in done.err
        lines = done.err.splitlines()
        assert lines[-1].startswith("error: "), done.err
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert not left_over(tmp_path)
        return lines[-1].removeprefix("error: ")

    return run


def left_over(folder: Path) -> list[Path]:
    return [*folder.rglob(".writing-*"), *folder.rglob(".making-*")]


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class TestWrongPath:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["check", "MISSING"], "no such manifest; see data_manifests/ for examples"),
            (["plan", "MISSING"], "no such config file; see configs/ for examples"),
            (["train", "MISSING", "--fold", "0"], "no such config file"),
            (["crossval", "MISSING"], "no such config file"),
            (["predict", "MISSING", "IMAGE", "--out", "OUT"], "no such model; give a bundle or a run folder"),
            (["predict", "RUN", "MISSING", "--out", "OUT"], "no such file or folder"),
            (["evaluate", "MISSING", "IMAGE"], "MISSING"),
            (["evaluate", "IMAGE", "MISSING"], "MISSING"),
            (["export", "MISSING", "--source", "IMAGE", "--out", "OUT"], "no such file or folder"),
            (["export", "LABEL", "--source", "MISSING", "--out", "OUT", "--as", "nifti"], "no such file or folder"),
            (["info", "MISSING"], "no such file or folder"),
            (["manifest", "build", "MISSING", "--name", "x", "--channel", "T1:MR", "--out", "OUT"], "MISSING"),
        ],
    )
    def test_it_is_named(
        self, refused: Callable[..., str], trained: World, tmp_path: Path, arguments: list[str], says: str
    ) -> None:
        missing = tmp_path / "not_there"
        places = {
            "MISSING": missing,
            "IMAGE": trained.image(0),
            "LABEL": trained.label(0),
            "RUN": trained.run,
            "OUT": tmp_path / "out",
        }
        message = refused(*[places.get(argument, argument) for argument in arguments])
        assert message.startswith(f"{missing}: ")
        assert says.replace("MISSING", str(missing)) in message
        assert not (tmp_path / "out").exists()

    def test_a_manifest_whose_files_are_elsewhere(self, refused: Callable[..., str], world: World) -> None:
        shutil.move(world.folder / "images", world.folder / "moved")
        message = refused("check", world.manifest)
        assert "none of its 4 cases is below" in message
        assert message.endswith("give the right folder with --root")
        assert refused("plan", world.config) == message.replace(str(world.manifest), str(world.manifest))

    def test_an_empty_root(self, refused: Callable[..., str], world: World, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "give the right folder with --root" in refused("check", world.manifest, "--root", tmp_path / "empty")


class TestEmptyFolder:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["check", "EMPTY"], "this folder has no dataset.json (MSD, nnU-Net); name a manifest"),
            (["plan", "EMPTY"], "a folder; a config is a YAML file"),
            (["predict", "EMPTY", "IMAGE", "--out", "OUT"], "neither a model bundle nor a run folder"),
            (["predict", "RUN", "EMPTY", "--out", "OUT"], "no file in this folder; expected a DICOM series or .nii.gz"),
            (["evaluate", "EMPTY", "IMAGE"], ""),
            (["info", "EMPTY"], "neither a model, a run nor a folder with DICOM files"),
            (["manifest", "build", "EMPTY", "--name", "x", "--channel", "T1:MR", "--out", "OUT"], ""),
        ],
    )
    def test_it_is_called_so(
        self, refused: Callable[..., str], trained: World, tmp_path: Path, arguments: list[str], says: str
    ) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        places = {"EMPTY": empty, "IMAGE": trained.image(0), "RUN": trained.run, "OUT": tmp_path / "out"}
        message = refused(*[places.get(argument, argument) for argument in arguments])
        assert str(empty) in message
        assert says in message


class TestDamagedFile:
    def test_info_and_predict_say_cut_short(
        self, refused: Callable[..., str], trained: World, world: World, tmp_path: Path
    ) -> None:
        cut_short(world.image(0))
        for arguments in (["info", world.image(0)], ["predict", trained.run, world.image(0), "--out", tmp_path / "o"]):
            message = refused(*arguments)
            assert message.startswith(f"{world.image(0)}: ")
            assert "cut short" in message

    def test_check_has_it_in_its_table(self, in_process: Call, world: World) -> None:
        cut_short(world.image(0))
        done = in_process("check", world.manifest)
        assert (done.code, done.err) == (1, "")
        assert "case_0" in done.out
        assert "cut short" in done.out
        assert "phantoms: 4 cases, 1 error, 0 notes" in done.out

    def test_train_sets_it_aside_and_says_so(self, in_process: Call, world: World) -> None:
        cut_short(world.image(0))
        done = in_process("train", world.config, "--fold", 0)
        assert done.code == 0, done.err
        aside = [line for line in done.err.splitlines() if line.startswith("set aside case_0: ")]
        assert len(aside) == 1
        assert json.loads((world.run / "set_aside.json").read_text())[0]["case_id"] == "case_0"

    def test_predict_does_the_others(self, in_process: Call, trained: World, world: World, tmp_path: Path) -> None:
        cut_short(world.image(1))
        done = in_process("predict", trained.run, world.folder / "images", "--out", tmp_path / "out")
        assert done.code == 1
        notes = done.err.splitlines()
        assert notes[0].startswith(f"set aside case_1: {world.image(1)}: ")
        assert notes[1:] == ["1 of 4 studies were set aside, the others are done"]
        assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == [f"case_{n}.nii.gz" for n in (0, 2, 3)]

    def test_a_model_that_was_touched(self, refused: Callable[..., str], trained: World, tmp_path: Path) -> None:
        bundle = shutil.copytree(trained.run / "fold_0" / "bundle", tmp_path / "bundle")
        with (bundle / "weights.safetensors").open("ab") as stream:
            stream.write(b"x")
        for arguments in (["info", bundle], ["predict", bundle, trained.image(0), "--out", tmp_path / "out"]):
            assert "weights.safetensors: not the file that was saved (its hash differs)" in refused(*arguments)


class TestWrongData:
    def test_a_label_of_another_grid(self, in_process: Call, refused: Callable[..., str], world: World) -> None:
        save(world.label(2), phantom(2)[1], shift_mm=3.0)
        done = in_process("check", world.manifest)
        assert done.code == 1
        assert "image and label differ: 16x16x12 voxels" in done.out
        assert done.out.count("first voxel at RAS (") == 2
        message = refused("export", world.label(2), "--source", world.image(2), "--out", world.folder / "out",
                          "--as", "nifti")  # fmt: skip
        assert "the segmentation is not on the grid of its source image: 16x16x12 voxels" in message
        message = refused("evaluate", world.label(2), world.label(1))
        assert "16x16x12 voxels" in message

    def test_a_dataset_of_which_nothing_can_be_used(self, refused: Callable[..., str], world: World) -> None:
        for number in range(4):
            save(world.label(number), phantom(number)[1] * 0)
        assert "no case can be trained on, the first fault: no voxel is labelled" in refused("plan", world.config)

    def test_a_model_for_another_modality(self, refused: Callable[..., str], trained: World, tmp_path: Path) -> None:
        hu = np.linspace(-1000, 1500, 16 * 16 * 12, dtype=np.float32).reshape(16, 16, 12)
        message = refused("predict", trained.run, save(tmp_path / "ct.nii.gz", hu), "--out", tmp_path / "out")
        assert message == (
            f"{tmp_path / 'ct.nii.gz'}: intensities from -1000 to 1500 look like a CT in HU, "
            "the model's channel T1 is MR "
            f"(from {json.loads((trained.run / 'plan.json').read_text())['channels'][0]['lowest']:g} in training); "
            "choose a model that was trained on CT"
        )

    def test_a_format_that_needs_dicom(self, refused: Callable[..., str], trained: World, tmp_path: Path) -> None:
        message = refused("export", trained.label(0), "--source", trained.image(0), "--out", tmp_path / "out")
        assert "format 'seg' refers to a DICOM series, and the source is none" in message


class TestWrongSettings:
    def test_a_typo_in_a_key(self, refused: Callable[..., str], world: World) -> None:
        world.config.write_text(world.config.read_text().replace("steps:", "stepz:"))
        assert refused("train", world.config, "--fold", 0) == (
            f"{world.config}: unknown key 'train.stepz'; did you mean 'train.steps'?"
        )

    def test_a_typo_in_a_value_set_here(self, refused: Callable[..., str], world: World) -> None:
        message = refused("plan", world.config, "--set", "train.optimizer=sgd")
        assert message.endswith("unknown key 'train.optimizer'; did you mean 'train.optimiser'?")

    def test_a_patch_that_does_not_fit(self, refused: Callable[..., str], world: World) -> None:
        message = refused("plan", world.config, "--set", "plan.patch_shape=[9, 8, 8]")
        assert message.startswith("plan.patch_shape: [9, 8, 8] must be divisible by ")
        assert "the nearest are" in message

    def test_a_fold_that_is_none(self, refused: Callable[..., str], trained: World) -> None:
        assert refused("train", trained.config, "--fold", 7) == "fold 7: there are folds 0 to 1 (folds.count)"

    def test_a_device_that_is_none(self, refused: Callable[..., str], trained: World, tmp_path: Path) -> None:
        message = refused("predict", trained.run, trained.image(0), "--out", tmp_path / "o", "--device", "gpu")
        assert message == "--device gpu: expected auto, cpu or cuda"

    def test_an_output_format_that_is_none(self, refused: Callable[..., str], trained: World, tmp_path: Path) -> None:
        message = refused("predict", trained.run, trained.image(0), "--out", tmp_path / "o", "--as", "nifty")
        assert message.startswith("no export format 'nifty': did you mean 'nifti'?")

    def test_a_manifest_that_is_there_already(self, refused: Callable[..., str], world: World) -> None:
        message = refused("manifest", "build", world.folder / "images", "--name", "x", "--channel", "T1:MR",
                          "--out", world.manifest)  # fmt: skip
        assert message == f"{world.manifest} exists already; give --force to replace it, or another --out"


class TestNoRoomToWrite:
    """A file-size limit stands for the full disk: it strikes in the same calls, wherever the tests run."""

    @pytest.mark.parametrize("limit", [400, 4_000, 12_000, 13_000])
    def test_train(self, refused: Callable[..., str], world: World, limit: int) -> None:
        with file_size_limit(limit):
            message = refused("train", world.config, "--fold", 0)
        assert message.startswith(f"cannot write {world.folder}")
        assert message.endswith("file too large")
        assert not (world.run / "fold_0" / "done.json").exists()

    @pytest.mark.parametrize(("limit", "first_missing"), [(100, "labels.json"), (1_500, "case_0.png")])
    def test_predict(
        self, refused: Callable[..., str], trained: World, tmp_path: Path, limit: int, first_missing: str
    ) -> None:
        with file_size_limit(limit):
            message = refused("predict", trained.run, trained.image(0), "--out", tmp_path / "out", "--as", "overlay")
        assert message == f"cannot write {tmp_path / 'out' / first_missing}: file too large"
        assert not (tmp_path / "out" / first_missing).exists()

    def test_check_and_plan(self, refused: Callable[..., str], trained: World, tmp_path: Path) -> None:
        assert refused("check", trained.manifest, "--json", "/dev/full") == (
            "cannot write /dev/full: the disk is full; free some space and run the same command again"
        )
        with file_size_limit(100):
            assert "file too large" in refused("plan", trained.config, "--out", tmp_path / "plan.json")

    def test_a_place_where_nothing_may_be_made(
        self, refused: Callable[..., str], trained: World, tmp_path: Path
    ) -> None:
        """/sys refuses even root, for whom permissions of ordinary folders do not hold."""
        for out in ("/sys/volseg", tmp_path / "file" / "out"):
            (tmp_path / "file").write_text("in the way")
            message = refused("predict", trained.run, trained.image(0), "--out", out)
            assert message.startswith(f"cannot write {out}")
            assert any(
                reason in message
                for reason in ("cannot be written", "is read-only", "a file stands where a folder is needed")
            )
        message = refused("train", trained.config, "--fold", 0, "--out", "/sys/volseg")
        assert message.startswith("cannot write /sys/volseg")
        assert refused("manifest", "build", trained.folder / "images", "--name", "x", "--channel", "T1:MR",
                       "--labels", trained.folder / "labels", "--label", "1:a", "--label", "2:b",
                       "--out", "/sys/volseg.json").startswith("cannot write /sys/volseg.json")  # fmt: skip


@contextmanager
def file_size_limit(limit: int) -> Generator[None]:
    """Python ignores SIGXFSZ, so that a write beyond the limit is an OSError (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestCtrlC:
    """Pressed at a moment that the test chooses; a real training is interrupted in test_resume.py."""

    @pytest.fixture
    def press_at(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
        def choose(what: str, when: int) -> None:
            def progress(_: object, told: str, done: int, total: int, detail: str = "") -> None:
                if told.startswith(what) and done == when:
                    signal.raise_signal(signal.SIGINT)

            monkeypatch.setattr(TerminalConsole, "progress", progress)

        return choose

    def test_check(self, in_process: Call, world: World, press_at: Callable[[str, int], None], tmp_path: Path) -> None:
        press_at("checking", 2)
        done = in_process("check", world.manifest, "--json", tmp_path / "check.json")
        assert (done.code, done.out, done.err) == (130, "", INTERRUPTED)
        assert not (tmp_path / "check.json").exists()

    @pytest.mark.parametrize("what", ["reading cases", "preprocessing", "predicting held-out"])
    def test_train_before_and_after_its_loop(
        self, in_process: Call, world: World, press_at: Callable[[str, int], None], what: str
    ) -> None:
        press_at(what, 1)
        done = in_process("train", world.config, "--fold", 0)
        assert done.code == 130
        assert done.err.endswith(INTERRUPTED)
        assert "Traceback" not in done.err
        assert not left_over(world.folder)
        press_at(what, -1)
        done = in_process("train", world.config, "--fold", 0, "--resume")
        assert done.code == 0, done.err

    def test_predict_keeps_what_is_done(
        self, in_process: Call, trained: World, press_at: Callable[[str, int], None], tmp_path: Path
    ) -> None:
        press_at("segmenting", 2)
        predict = ("predict", trained.run, trained.folder / "images", "--out", tmp_path / "out")
        done = in_process(*predict)
        assert (done.code, done.err) == (130, INTERRUPTED)
        assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["case_0.nii.gz", "case_1.nii.gz"]
        assert not left_over(tmp_path)
        press_at("segmenting", -1)
        done = in_process(*predict)
        assert done.code == 0
        assert [line.split()[0] for line in done.out.splitlines()] == [
            str(tmp_path / "out" / f"case_{n}.nii.gz") for n in (2, 3)
        ]


class TestRealProcess:
    def test_an_error_is_one_line_and_1(self, real_process: Call, tmp_path: Path) -> None:
        done = real_process("info", tmp_path / "missing", cwd=tmp_path)
        assert (done.code, done.out) == (1, "")
        assert done.err == f"error: {tmp_path / 'missing'}: no such file or folder\n"

    def test_debug_shows_the_trace(self, real_process: Call, tmp_path: Path) -> None:
        done = real_process("--debug", "info", tmp_path / "missing", cwd=tmp_path)
        assert done.code == 1
        assert "Traceback" in done.err

    def test_a_reader_that_goes_away_is_no_error(self) -> None:
        """As with `volseg config | head -1`, but closed before anything is read."""
        with subprocess.Popen(
            command("config"), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            err = process.stderr.read()
        assert "Traceback" not in err
        assert err == ""
