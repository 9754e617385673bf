"""Cross-validation, small but whole: four real cases, two folds, three updates each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import crossval
from pipeline.bundle import read_air
from pipeline.checkpoint import CHECKPOINT
from pipeline.config import Config, parse_config
from pipeline.console import Silence
from pipeline.crossval import cross_validate, train_fold
from pipeline.errors import ConfigError, ManifestError, PlanError, RunError
from pipeline.folder_lock import LOCK_NAME, held
from pipeline.held_out import out_of_fold_report
from pipeline.manifest import Dataset, save_manifest
from pipeline.metrics import confusion_counts, dice_from_counts
from pipeline.quality import read_quality
from pipeline.report_values import Report
from pipeline.runs import Run, open_run, plan_dataset, read_done
from pipeline.tracking.journal import read_facts
from transforms.volume import read_label

pytestmark = pytest.mark.usefixtures("one_thread")


class Listener(Silence):
    """Remembers its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def home(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crossval")
    save_manifest(small_dataset, folder / "cases.json")
    return folder


def config_at(home: Path, **sections: dict[str, Any]) -> Config:
    document: dict[str, Any] = {
        "name": "tiny",
        "runs": str(home / "runs"),
        "data": {"manifest": str(home / "cases.json"), "cache": str(home / "cache")},
        "folds": {"count": 2},
        "plan": {"features": [4, 8], "patch_shape": [24, 36, 28]},
        "train": {"steps": 3, "validations": 1, "validation_cases": 1},
        "predict": {"mirror": False},
        "evaluate": {"bootstrap_samples": 100},
        "tracking": {"enabled": False},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return parse_config(document, source="test")


@pytest.fixture(scope="module")
def finished(home: Path) -> tuple[Run, list[str], list[str]]:
    """A cross-validation whose first fold fails at first, run again when its fault is gone; and what it told."""
    run = open_run(config_at(home), home / "runs" / "tiny", Silence())
    run.fold_folder(0).mkdir()
    (run.fold_folder(0) / CHECKPOINT).write_text("not a checkpoint")
    first, second = Listener(), Listener()
    with pytest.raises(
        RunError, match=r"1 of 2 folds failed, the others are done; fold 0: .* not a readable checkpoint"
    ):
        cross_validate(run, [0, 1], first)
    assert [run.is_done(fold) for fold in (0, 1)] == [False, True]
    (run.fold_folder(0) / CHECKPOINT).unlink()
    done = read_done(run.fold_folder(1)), (run.fold_folder(1) / "done.json").stat().st_mtime_ns
    cross_validate(run, [0, 1], second)
    assert done == (read_done(run.fold_folder(1)), (run.fold_folder(1) / "done.json").stat().st_mtime_ns)
    return run, first.notes, second.notes


def test_a_fold_that_fails_does_not_take_the_others_along(finished: tuple[Run, list[str], list[str]]) -> None:
    _, first, _ = finished
    failed = [note for note in first if note.startswith("fold 0 failed: ")]
    assert len(failed) == 1
    assert "\n" not in failed[0]


def test_a_finished_fold_is_not_run_again(finished: tuple[Run, list[str], list[str]]) -> None:
    _, _, second = finished
    assert "fold 1 is finished already, kept" in second
    assert any(note.startswith("fold 0: 2 cases to train on, 2 held out") for note in second)


def test_every_case_is_scored_once_by_the_model_that_never_saw_it(
    finished: tuple[Run, list[str], list[str]], small_dataset: Dataset
) -> None:
    run, _, _ = finished
    report = json.loads((run.folder / "report.json").read_text())
    fold_of = {case["case_id"]: case["fold"] for case in report["cases"]}
    assert fold_of == dict(run.folds.fold_of)
    assert set(fold_of) == {case.case_id for case in small_dataset.manifest.cases}
    for fold in (0, 1):
        names = {p.name.removesuffix(".nii.gz") for p in (run.fold_folder(fold) / "validation").glob("*.nii.gz")}
        assert names == set(run.folds.validation_cases(fold))
        assert not names & set(run.folds.training_cases(fold))


def test_training_cases_say_what_is_air(finished: tuple[Run, list[str], list[str]]) -> None:
    run, _, second = finished
    assert any(note.startswith("fold 0: air: no held-out case has windows as dark") for note in second)
    for fold in (0, 1):
        found = read_air(run.fold_folder(fold) / "bundle")
        assert found is not None
        assert len(found.levels) == 1
        assert found.cases == 0, "one window takes a whole case"


def test_every_case_is_asked_what_it_expects(finished: tuple[Run, list[str], list[str]]) -> None:
    run, _, _ = finished
    report = out_of_fold_report(run, [0, 1])
    for fold in (0, 1):
        expected = read_quality(run.fold_folder(fold) / "validation")
        assert len((run.fold_folder(fold) / "validation" / "quality.csv").read_text().splitlines()) == 1 + len(expected)
        assert set(expected) == set(run.folds.validation_cases(fold))
        for case in (case for case in report.cases if case.fold == fold):
            found = [label.expected_dice for label in expected[case.case_id].labels]
            assert [score.expected_dice for score in case.labels] == found
    assert report.expectations[-1].label == "mean of labels"
    assert report.expectations == Report.from_json(json.loads((run.folder / "report.json").read_text())).expectations


def test_scores_are_those_of_the_files(finished: tuple[Run, list[str], list[str]], small_dataset: Dataset) -> None:
    run, _, _ = finished
    report = out_of_fold_report(run, [0, 1])
    cases = {case.case_id: case for case in small_dataset.manifest.cases}
    for scored in report.cases:
        prediction = read_label(run.fold_folder(scored.fold or 0) / "validation" / f"{scored.case_id}.nii.gz")
        label = small_dataset.label_path(cases[scored.case_id])
        assert label is not None
        counts = confusion_counts(prediction.voxels, read_label(label).voxels, 3)
        assert [score.dice for score in scored.labels] == pytest.approx(list(dice_from_counts(counts))[1:])
    means = [score.dice for case in report.cases for score in case.labels if score.label == "Anterior"]
    assert report.labels[0].mean == pytest.approx(sum(x for x in means if x is not None) / 4)


def test_a_run_folder_holds_what_it_is_made_of(finished: tuple[Run, list[str], list[str]]) -> None:
    run, _, _ = finished
    names = {"config.yaml", "plan.json", "fingerprint.json", "folds.json", "dataset.json", "provenance.json"}
    assert names | {"report.json", "report.csv", "dice.png"} <= {p.name for p in run.folder.iterdir()}
    fold = {p.name for p in run.fold_folder(0).iterdir()}
    assert {"bundle", "validation", "history.jsonl", "report.json", "report.csv", "curves.png", "done.json"} <= fold
    assert CHECKPOINT not in fold
    assert {p.name for p in run.folder.rglob(".*")} == {LOCK_NAME}


@pytest.mark.slow
def test_levels_are_drawn_and_tracked_where_looking_was_asked_for(
    finished: tuple[Run, list[str], list[str]], home: Path
) -> None:
    store = {"enabled": True, "uri": f"sqlite:///{home / 'mlflow.db'}"}
    run = open_run(config_at(home, train={"steps": 2, "inspect_every": 1}, tracking=store), home / "seen", Silence())
    train_fold(run, 0, Silence(), resume=False)
    names = {"overview.png", "encoder_1.png", "bottleneck_2.png", "decoder_1.png"}
    assert {path.name for path in (run.fold_folder(0) / "inspection").iterdir()} == names
    facts = read_facts(run.fold_folder(0))
    assert {f.body["path"] for f in facts if f.kind == "artifact" and f.body["folder"] == "inspection"} == {
        f"inspection/{name}" for name in names
    }
    told = [f.body for f in facts if f.kind == "metrics" and "inspect/encoder_1/energy" in f.body["values"]]
    assert [body["step"] for body in told] == [1, 2]
    assert not (finished[0].fold_folder(0) / "inspection").exists()


def test_a_fold_does_without_pictures_where_memory_does_not_suffice(
    finished: tuple[Run, list[str], list[str]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attention_maps(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("pipeline.inspection.pictures.attention_maps", attention_maps)
    run = open_run(config_at(home, train={"steps": 2, "inspect_every": 2}), home / "unseen", Silence())
    listener = Listener()
    train_fold(run, 0, listener, resume=False)
    assert run.is_done(0)
    assert any("fold 0: no pictures of its levels: memory does not suffice" in note for note in listener.notes)
    assert not (run.fold_folder(0) / "inspection").exists()


class TestOpening:
    def test_a_run_goes_on_with_the_same_config(self, finished: tuple[Run, list[str], list[str]], home: Path) -> None:
        run, _, _ = finished
        again = open_run(config_at(home), run.folder, Silence())
        assert (again.plan, again.folds) == (run.plan, run.folds)
        looked_into = open_run(config_at(home, train={"inspect_every": 2}), run.folder, Silence())
        assert looked_into.config.train.inspect_every == 2

    def test_not_with_another(self, finished: tuple[Run, list[str], list[str]], home: Path) -> None:
        run, _, _ = finished
        with pytest.raises(RunError) as caught:
            open_run(config_at(home, train={"seed": 5}), run.folder, Silence())
        assert str(caught.value) == (
            f"{run.folder}: a run with another config is here (train.seed was 0, is now 5); "
            "choose another --out, or delete that folder"
        )

    def test_nor_on_another_dataset(
        self, finished: tuple[Run, list[str], list[str]], home: Path, small_dataset: Dataset
    ) -> None:
        run, _, _ = finished
        fewer = small_dataset.manifest.model_copy(update={"cases": small_dataset.manifest.cases[:3]})
        save_manifest(small_dataset.model_copy(update={"manifest": fewer}), home / "fewer.json")
        with pytest.raises(RunError, match="a run on another version of the manifest is here"):
            open_run(config_at(home, data={"manifest": str(home / "fewer.json")}), run.folder, Silence())

    def test_a_damaged_record_of_the_end_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "done.json").write_text("{")
        with pytest.raises(RunError, match=r"its done.json cannot be read; delete the fold's folder"):
            read_done(tmp_path)

    def test_too_few_patients_for_the_folds(self, home: Path) -> None:
        with pytest.raises(ManifestError, match=r"cannot be split into 5 folds; set folds.count to 4 or less"):
            open_run(config_at(home, folds={"count": 5}), home / "runs" / "five", Silence())
        assert not (home / "runs" / "five").exists()

    @pytest.mark.parametrize(
        ("section", "values", "says"),
        [
            ("train", {"precision": "fp16", "device": "cpu"}, "train.precision: fp16 is for GPUs"),
            ("network", {"name": "u-net"}, "network 'u-net' is not known: did you mean 'unet'"),
            ("evaluate", {"lesions": ["Hippo"]}, r"evaluate\.lesions: Hippo is no label; the labels are Anterior"),
        ],
    )
    def test_a_choice_that_is_none_is_told_before_any_case_is_read(
        self, home: Path, section: str, values: dict[str, Any], says: str
    ) -> None:
        class Reading(Silence):
            def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
                pytest.fail(f"{what}: {done} of {total}")

        with pytest.raises((ConfigError, PlanError), match=says):
            open_run(config_at(home, **{section: values}), home / "runs" / "wrong", Reading())
        assert not (home / "runs" / "wrong").exists()


def test_a_fault_of_any_kind_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a GPU runs out of memory, which no CPU can be made to do."""

    def run_out(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    run = open_run(config_at(home), home / "runs" / "oom", Silence())
    monkeypatch.setattr(crossval, "train", run_out)
    with pytest.raises(RunError, match=r"^no fold was finished; fold 0: RuntimeError: CUDA out of memory$") as caught:
        cross_validate(run, [0, 1], Silence())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_unfinished_fold_asks_to_be_resumed(home: Path) -> None:
    run = open_run(config_at(home), home / "runs" / "unfinished", Silence())
    run.fold_folder(0).mkdir()
    (run.fold_folder(0) / CHECKPOINT).write_text("anything")
    with pytest.raises(RunError, match="an unfinished training is here; give --resume, or another --out"):
        train_fold(run, 0, Silence(), resume=False)


def test_two_that_begin_at_once_set_up_one_run_and_share_no_fold(home: Path) -> None:
    folder, seen = home / "runs" / "at_once", []

    class Rival(Silence):
        """Another process sets the run up while this one still reads the cases."""

        def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
            if what == "reading cases" and done == total:
                open_run(config_at(home), folder, Silence())
                (folder / ".writing-by-the-rival").touch()
                seen.append(what)

    run = open_run(config_at(home), folder, Rival())
    assert seen
    assert (folder / ".writing-by-the-rival").exists()
    with held(run.fold_folder(0)), pytest.raises(RunError, match="fold_0: another process is at work here"):
        train_fold(run, 0, Silence(), resume=True)
    assert not (run.fold_folder(0) / CHECKPOINT).exists()


def test_keys_that_contradict_each_other_are_told_before_the_data_is_read(home: Path, tmp_path: Path) -> None:
    network = {"preset": "resenc_m", "block": "plain"}
    config = config_at(home, data={"manifest": str(tmp_path / "none.json")}, network=network)
    with pytest.raises(PlanError, match=r"^network\.block: plain, but"):
        plan_dataset(config, Silence())
