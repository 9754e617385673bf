"""What an output folder says of itself: after each study, after a kill at any point, and at what cost."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.growing_json import change_object, fold_object, read_object
from pipeline.line_file import read_lines
from pipeline.quality import LabelEstimate, QualityEstimate, record_quality
from pipeline.record import Beside, Record, open_record, recorded_quality
from pipeline.results import RECORD, SOURCES, find_results, forget_sources, record_sources
from pipeline.studies import Study

JOURNAL = "predictions.jsonl"
MODEL = ["a"]
NIFTI = ("nifti",)


def opened(out: Path, *, model: list[str] = MODEL, force: bool = False) -> Record:
    return open_record(out, model, {"mirror": False}, usual={"mirror": False}, force=force)


def study(name: str) -> Study:
    return Study(name, (Path(f"images/{name}.nii.gz"),))


def make(record: Record, name: str, beside: Beside | None = None) -> None:
    """All that is written of a study."""
    record.begin(study(name))
    (record.out / f"{name}.nii.gz").write_bytes(b"labels")
    record.add(study(name), NIFTI, f"origin of {name}", beside or Beside())
    record_sources(record.out, name, [record.out.parent / f"{name}.nii.gz"])


def names(out: Path) -> list[str]:
    return [result.name for result in find_results(out)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder in which two studies were made, and then a kill came."""
    folder = tmp_path / "out"
    folder.mkdir()
    record = opened(folder)
    make(record, "x")
    make(record, "y", Beside((folder / "quality" / "y.quality.json",), 2))
    return folder


def test_a_study_costs_a_line_however_many_there_are(tmp_path: Path) -> None:
    record, sizes, written, whole_sources = opened(tmp_path), [], set(), set()
    for number in range(100):
        make(record, f"case_{number:02}")
        sizes.append((tmp_path / JOURNAL).stat().st_size)
        written.add((tmp_path / RECORD).stat().st_ino)
        whole_sources.add((tmp_path / SOURCES).stat().st_size)
    assert {after - before for before, after in pairwise(sizes)} == {sizes[0]}
    assert len(written) == 1
    assert len(whole_sources) <= 8  # each is twice the one before
    assert len(names(tmp_path)) == 100
    with record:
        pass
    assert not list(tmp_path.glob("*.jsonl"))
    assert list(json.loads((tmp_path / RECORD).read_text())["studies"]) == [f"case_{n:02}" for n in range(100)]
    assert len(json.loads((tmp_path / SOURCES).read_text())) == 100


def test_a_kill_loses_no_study_that_was_made(out: Path) -> None:
    assert json.loads((out / RECORD).read_text())["studies"] == {}
    estimate = QualityEstimate(
        labels=(LabelEstimate(label="a", expected_dice=0.5, decided_mm3=1, expected_mm3=1),), models=("a",)
    )
    record_quality(out, "x", estimate)
    assert names(out) == ["x", "y"]
    assert [result.images for result in find_results(out)] == [(out / "../x.nii.gz",), (out / "../y.nii.gz",)]
    assert recorded_quality(out) == {"x": estimate}
    again = opened(out)
    assert again.holds(study("x"), NIFTI, Beside())
    assert again.is_of_another(study("x"), "another origin")
    assert again.value["beside"] == {"y": ["y.quality.json"]}
    assert again.value["kept_scores"] == {"y": 2}
    with again:
        make(again, "z")
    assert sorted(path.name for path in out.glob("*.json*")) == [RECORD, SOURCES]
    assert list(json.loads((out / RECORD).read_text())["studies"]) == ["x", "y", "z"]


def test_a_line_that_was_cut_short_is_none(out: Path) -> None:
    with (out / JOURNAL).open("ab") as stream:
        stream.write(b'{"studies": {"z": ["nif')
    assert names(out) == ["x", "y"]
    make(opened(out), "v")
    assert names(out) == ["x", "y", "v"]


def test_a_damaged_line_is_not_believed(out: Path) -> None:
    with (out / JOURNAL).open("ab") as stream:
        stream.write(b"nonsense\n")
    with pytest.raises(RunError, match=rf"{JOURNAL}: line 3 is no JSON object"):
        find_results(out)
    with pytest.raises(RunError, match="holds results of another model or setting"):
        opened(out)
    with opened(out, force=True) as record:
        make(record, "x")
    assert names(out) == ["x"]


def test_lines_that_are_in_the_file_already_change_nothing(out: Path) -> None:
    """A kill after the file was written and before its journal was taken away."""
    record = opened(out, force=True)
    record.begin(study("x"))
    told, lines = read_object(out / RECORD), (out / JOURNAL).read_bytes()
    fold_object(out / RECORD)
    (out / JOURNAL).write_bytes(lines)
    assert read_object(out / RECORD) == told
    assert names(out) == ["y"]


def test_whoever_reads_while_the_work_ends_misses_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(path: Path) -> list[bytes]:
        monkeypatch.undo()
        fold_object(out / RECORD)
        return read_lines(path)

    monkeypatch.setattr("pipeline.growing_json.read_lines", ending)
    assert list(read_object(out / RECORD)["studies"]) == ["x", "y"]


class TestMadeAgain:
    """From its first file on nothing is said of a study, until its last is there."""

    def test_by_the_same_model(self, out: Path) -> None:
        record = opened(out, force=True)
        record.begin(study("x"))
        assert names(out) == ["y"]
        assert list(read_object(out / SOURCES)) == ["y"]
        later = opened(out)
        assert not later.vouches_for(study("x"))
        assert not later.is_of_another(study("x"), "another origin")
        assert later.vouches_for(study("y"))
        make(record, "x")
        assert sorted(names(out)) == ["x", "y"]

    @pytest.mark.parametrize("is_folded", [True, False])
    def test_by_another(self, out: Path, *, is_folded: bool) -> None:
        if is_folded:
            with opened(out):
                pass
        with pytest.raises(RunError, match="holds results of another model"):
            opened(out, model=["b"])
        opened(out, model=["b"], force=True).begin(study("x"))
        assert read_object(out / RECORD)["studies"] == {}
        assert not opened(out, model=["b"]).vouches_for(study("y"))
        assert list(read_object(out / SOURCES)) == ["y"], "what lies there of x may be of another image now"

    def test_without_force_what_is_there_stays(self, out: Path) -> None:
        record = opened(out)
        record.begin(study("y"))
        assert names(out) == ["x", "y"]
        record.add(study("y"), NIFTI, "origin of y", Beside((out / "y_entropy.nii.gz",)))
        again = opened(out)
        assert again.value["beside"] == {"y": ["y.quality.json", "y_entropy.nii.gz"]}
        assert again.value["kept_scores"] == {"y": 2}

    def test_no_file_of_sources_comes_of_forgetting_them(self, tmp_path: Path) -> None:
        forget_sources(tmp_path, "x")
        assert not list(tmp_path.iterdir())


def test_a_record_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Whole in one file, without settings that came later."""
    (tmp_path / RECORD).write_text(json.dumps({"model": MODEL, "studies": {"x": ["nifti"]}, "origins": {"x": "o"}}))
    (tmp_path / "x.nii.gz").write_bytes(b"labels")
    with opened(tmp_path) as record:
        assert record.holds(study("x"), NIFTI, Beside())
        make(record, "y")
        assert names(tmp_path) == ["x", "y"]
    assert json.loads((tmp_path / RECORD).read_text())["mirror"] is False


def test_a_folder_without_results_stays_without_a_record(tmp_path: Path) -> None:
    change_object(tmp_path / RECORD, {"studies": {"x": ["nifti"]}})  # its file was taken away
    with opened(tmp_path):
        pass
    assert not (tmp_path / RECORD).exists()


def test_what_ended_the_work_is_told_and_not_that_the_journal_stays(out: Path) -> None:
    (out / SOURCES).write_text("[")
    with pytest.raises(KeyboardInterrupt), opened(out):
        raise KeyboardInterrupt
    with pytest.raises(RunError, match=f"{SOURCES}: not a JSON object"), opened(out) as record:
        make(record, "z")
