"""What an output folder says of itself: after each study, after a kill at any point, and at what cost."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunError
from pipeline.growing_json import change_object, fold_object, read_object
from pipeline.line_file import read_lines
from pipeline.quality import LabelEstimate, QualityEstimate, record_quality
from pipeline.record import Beside, Origin, Record, open_record, origin_of, recorded_quality
from pipeline.results import RECORD, SOURCES, find_results, forget_sources, record_sources
from pipeline.studies import Study

JOURNAL = "predictions.jsonl"
MODEL = ["a"]
NIFTI = ("nifti",)


def opened(out: Path, *, model: list[str] = MODEL, force: bool = False) -> Record:
    return open_record(out, model, {"mirror": False}, usual={"mirror": False}, force=force)


def study(name: str) -> Study:
    return Study(name, (Path(f"images/{name}.nii.gz"),))


def origin(digest: str) -> Origin:
    return Origin(digest, digest)


def make(record: Record, name: str, beside: Beside | None = None) -> None:
    """All that is written of a study."""
    labels = record.out / f"{name}.nii.gz"
    record.begin(study(name), [labels, *(beside or Beside()).files])
    labels.write_bytes(b"labels")
    record.add(study(name), NIFTI, origin(f"origin of {name}"), beside or Beside())
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


def test_a_study_costs_the_same_however_many_there_are(tmp_path: Path) -> None:
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
    assert again.is_of_another(study("x"), origin("another"))
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
    with pytest.raises(RunError, match=rf"{JOURNAL}: line 6 is no JSON object"):
        find_results(out)
    with pytest.raises(RunError, match="holds results of another model or setting"):
        opened(out)
    with opened(out, force=True) as record:
        make(record, "x")
    assert names(out) == ["x"]


def test_lines_that_are_in_the_file_already_change_nothing(out: Path) -> None:
    """A kill after the file was written and before its journal was taken away."""
    record = opened(out, force=True)
    record.begin(study("x"), [])
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
        record.begin(study("x"), [])
        assert names(out) == ["y"]
        assert list(read_object(out / SOURCES)) == ["y"]
        later = opened(out)
        assert not later.vouches_for(study("x"))
        assert not later.is_of_another(study("x"), origin("another"))
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
        opened(out, model=["b"], force=True).begin(study("x"), [])
        assert read_object(out / RECORD)["studies"] == {}
        assert not opened(out, model=["b"]).vouches_for(study("y"))
        assert list(read_object(out / SOURCES)) == ["y"], "what lies there of x may be of another image now"

    def test_without_force_what_is_there_stays(self, out: Path) -> None:
        record = opened(out)
        record.begin(study("y"), [out / "y.seg.nrrd"])
        assert names(out) == ["x", "y"]
        assert opened(out).holds(study("y"), NIFTI, Beside())
        record.add(study("y"), ("nrrd",), origin("origin of y"), Beside((out / "y_entropy.nii.gz",)))
        again = opened(out)
        assert again.value["studies"]["y"] == ["nifti", "nrrd"]
        assert again.value["begun"] == {}
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


class TestOurs:
    """Which of the files that lie in a folder are volseg's: of those alone is anything replaced or taken away."""

    def test_what_was_begun_is_known_before_it_is_there(self, out: Path) -> None:
        opened(out).begin(study("z"), [out / "z.nii.gz", out / "uncertainty" / "z_entropy.nii.gz"])
        (out / "z.nii.gz").write_bytes(b"lab")
        again = opened(out)
        assert names(out) == ["x", "y"]
        assert not again.vouches_for(study("z"))
        assert again.ours(study("z")) == {"z.nii.gz", "z_entropy.nii.gz"}
        assert again.in_the_way(study("z"), [out / "z.nii.gz"]) is None
        make(again, "z")
        assert again.ours(study("z")) == opened(out).ours(study("z")) == {"z.nii.gz"}

    def test_what_is_not_recorded_is_not(self, out: Path) -> None:
        own = {"z.nii.gz": "z", "x.seg.nrrd": "x", "z_entropy.nii.gz": "z"}
        for file, name in own.items():
            (out / file).write_bytes(b"drawn by hand")
            assert str(opened(out).in_the_way(study(name), [out / file])).startswith(
                f"{out / file} exists already and is no result of volseg; choose another --out"
            )
            assert opened(out, force=True).in_the_way(study(name), [out / file]) is None
        assert opened(out).in_the_way(study("x"), [out / "x.nii.gz"]) is None

    def test_what_another_model_made_is(self, out: Path) -> None:
        opened(out, model=["b"], force=True).begin(study("x"), [out / "x.seg.nrrd"])
        later = opened(out, model=["b"])
        assert later.ours(study("x")) == {"x.nii.gz", "x.seg.nrrd"}
        assert later.ours(study("y")) == {"y.nii.gz", "y.quality.json"}
        make(later, "y")
        assert later.ours(study("y")) == {"y.nii.gz"}

    @pytest.mark.parametrize("is_told", [True, False])
    def test_the_table_is_where_there_were_estimates(self, out: Path, *, is_told: bool) -> None:
        (out / "quality.csv").write_text("x")
        with opened(out):
            pass
        if not is_told:  # by an older version
            value = json.loads((out / RECORD).read_text())
            del value["table"], value["begun"]
            (out / RECORD).write_text(json.dumps(value))
        estimate = out / "quality" / "z.quality.json"
        assert opened(out).in_the_way(study("z"), [estimate]) is None
        assert opened(out).owns_table

    def test_elsewhere_it_is_the_users(self, tmp_path: Path) -> None:
        make(opened(tmp_path), "x")
        (tmp_path / "quality.csv").write_text("x")
        again = opened(tmp_path)
        assert not again.owns_table
        assert again.in_the_way(study("z"), [tmp_path / "z.nii.gz"]) is None
        assert str(again.in_the_way(study("z"), [tmp_path / "quality" / "z.quality.json"])).startswith(
            f"{tmp_path / 'quality.csv'} exists already and is no result of volseg"
        )


class TestOrigin:
    """Of a folder it is what lies there, at any depth, and nothing that volseg writes."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "series" / "below").mkdir(parents=True)
        for name in ("1.dcm", "2.dcm", "below/3.dcm"):
            (tmp_path / "series" / name).write_bytes(b"slice")
        return tmp_path / "series"

    def origin(self, folder: Path, out: Path) -> Origin:
        return origin_of(Study("series", (folder,)), out, series=None, resample_uneven=False)

    def test_every_change_of_a_file_tells(self, folder: Path) -> None:
        out = folder.parent / "out"
        found = [self.origin(folder, out)]
        (folder / "below" / "3.dcm").write_bytes(b"other")
        os.utime(folder / "below" / "3.dcm", ns=(1, 1))
        found.append(self.origin(folder, out))
        (folder / "below" / "3.dcm").write_bytes(b"longer")
        os.utime(folder / "below" / "3.dcm", ns=(1, 1))
        found.append(self.origin(folder, out))
        (folder / "below" / "3.dcm").rename(folder / "below" / "4.dcm")
        found.append(self.origin(folder, out))
        (folder / "below" / "4.dcm").rename(folder / "3.dcm")
        found.append(self.origin(folder, out))
        (folder / "3.dcm").unlink()
        found.append(self.origin(folder, out))
        assert len({origin.digest for origin in found}) == len(found)
        assert len({origin.by_paths for origin in found}) == 1
        assert self.origin(folder, out) == found[-1]

    @pytest.mark.parametrize("below", [".", "below", "below/results"])
    def test_results_are_no_part_of_it(self, folder: Path, below: str) -> None:
        out = folder / below
        before = self.origin(folder, out)
        (out / "quality").mkdir(parents=True)
        (out / "series.capture").mkdir()
        for name in (
            *("series.seg.dcm", "series.verification.json", "predictions.json", "sources.jsonl", "quality.csv"),
            *("quality/series.quality.json", "series.capture/1.dcm", ".volseg.lock", ".writing-1-series.seg.dcm"),
        ):
            (out / name).write_bytes(b"result")
        assert self.origin(folder, out) == before
        assert self.origin(folder, folder.parent / "elsewhere") != before
        (out / "5.dcm").write_bytes(b"slice")
        assert self.origin(folder, out) != before

    def test_what_a_desktop_leaves_is_no_part_of_it_but_a_hidden_slice_is(self, folder: Path) -> None:
        before = self.origin(folder, folder.parent)
        (folder / ".DS_Store").write_bytes(b"where its window was")
        (folder / ".writing-1-4.dcm").write_bytes(bytes(128) + b"DICM")
        assert self.origin(folder, folder.parent) == before
        (folder / ".4.dcm").write_bytes(bytes(128) + b"DICM")
        assert self.origin(folder, folder.parent) != before

    def test_a_file_alone_is_what_it_always_was(self, tmp_path: Path) -> None:
        for name, content in (("x.nii", b"no volume"), ("x.nhdr", b"NRRD0004\n")):
            (tmp_path / name).write_bytes(content)
            found = origin_of(Study("x", (tmp_path / name,)), tmp_path, series=None, resample_uneven=False)
            assert found.digest == found.by_paths

    def test_a_folder_is_walked_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        walked, scandir = [], os.scandir

        def counted(path: Path) -> Any:
            walked.append(path)
            return scandir(path)

        monkeypatch.setattr("os.scandir", counted)
        self.origin(folder, folder.parent / "out")
        assert walked == [folder, folder / "below"]

    def test_only_a_record_without_content_is_doubted(self, out: Path) -> None:
        record, known = opened(out), Origin("with content", "origin of x")
        assert record.is_of_another(study("x"), known)
        record.doubt(study("x"), Origin("origin of x", "origin of x"))
        assert record.holds(study("x"), NIFTI, Beside())
        record.doubt(study("x"), known)
        assert not record.is_of_another(study("x"), known)
        assert not record.holds(study("x"), NIFTI, Beside())
        record.begin(study("x"), [out / "x.nii.gz"])
        assert names(out) == ["y"]
        record.add(study("x"), NIFTI, known, Beside())
        assert opened(out).holds(study("x"), NIFTI, Beside())
        assert not opened(out).is_of_another(study("x"), known)
