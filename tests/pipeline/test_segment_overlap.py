"""Several studies at a time: the bytes of one at a time, whatever fails, and nothing half done after an interrupt."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.console import Silence
from pipeline.errors import RunError
from pipeline.folder_lock import LOCK_NAME
from pipeline.predict import Model
from pipeline.record import Record
from pipeline.results import find_results
from pipeline.segment import SegmentSettings, explain_studies, segment_studies
from pipeline.studies import Study, Wanted, find_studies

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = SegmentSettings(formats=("nifti",), mirror=False, series=None, force=False)
NAMES = ("hippocampus_001", "hippocampus_015", "hippocampus_035", "hippocampus_041")


@pytest.fixture
def studies(model: Model, data_dir: Path, tmp_path: Path) -> list[Study]:
    """Four files, the second of them cut short, and a DICOM folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(data_dir / "hippocampus" / "images" / f"{name}.nii.gz", folder)
    (folder / "hippocampus_010.nii.gz").write_bytes((folder / "hippocampus_001.nii.gz").read_bytes()[:3000])
    return find_studies([folder, data_dir / "dicom_hippocrop"], Wanted(model.plan.channels), console=Silence())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("is_short_of_memory", [False, True])
def test_the_bytes_are_those_of_one_at_a_time(
    model: Model, studies: list[Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_short_of_memory: bool
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    one_by_one = [segment_studies(model, [s], alone, settings=SETTINGS, console=Silence()) for s in studies]
    if is_short_of_memory:
        monkeypatch.setattr("pipeline.segment.reading_bytes", lambda images: 1 << 60)
    written, failures = segment_studies(model, studies, together, settings=SETTINGS, console=Silence())
    assert contents(together) == contents(alone)
    assert [file.path.name for file in written] == [file.path.name for found, _ in one_by_one for file in found]
    assert failures == [failure for _, found in one_by_one for failure in found]
    assert [failure.case_id for failure in failures] == ["hippocampus_010"]


def test_what_cannot_be_written_is_set_aside(model: Model, studies: list[Study], tmp_path: Path) -> None:
    settings = replace(SETTINGS, formats=("seg",))
    written, failures = segment_studies(model, studies, tmp_path, settings=settings, console=Silence())
    assert [file.path.name for file in written] == ["dicom_hippocrop.seg.dcm"]
    assert [failure.case_id for failure in failures] == [study.name for study in studies[:-1]]
    assert "refers to a DICOM series, and the source is none" in failures[0].reason
    assert list(json.loads((tmp_path / "predictions.json").read_text())["studies"]) == ["dicom_hippocrop"]


class Interrupting(Silence):
    """Ctrl-C while a study of this name passes through the network."""

    def __init__(self, name: str) -> None:
        self.name = name

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        if detail.startswith(f"{self.name}, window"):
            raise KeyboardInterrupt


def test_an_interrupt_leaves_whole_studies_and_the_rest_is_done_later(
    model: Model, studies: list[Study], tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        segment_studies(model, studies, out, settings=SETTINGS, console=Interrupting("hippocampus_035"))
    assert list(json.loads((out / "predictions.json").read_text())["studies"]) == ["hippocampus_001", "hippocampus_015"]
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["hippocampus_001.nii.gz", "hippocampus_015.nii.gz"]
    assert [path.name for path in out.glob(".*")] == [LOCK_NAME]
    segment_studies(model, studies, out, settings=SETTINGS, console=Silence())
    segment_studies(model, studies, whole, settings=SETTINGS, console=Silence())
    assert contents(out) == contents(whole)


def test_a_kill_while_a_study_is_made_again_leaves_nothing_that_vouches_for_it(
    model: Model, studies: list[Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new files are there, or some of them; the other study's are as they were."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    first, two = studies[0], [studies[0], studies[2]]
    segment_studies(model, two, tmp_path, settings=SETTINGS, console=Silence())
    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", killed)
        patch.setattr(Record, "__exit__", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            segment_studies(model, [first], tmp_path, settings=replace(SETTINGS, force=True), console=Silence())
    assert [result.name for result in find_results(tmp_path)] == [two[1].name]
    written, _ = segment_studies(model, two, tmp_path, settings=SETTINGS, console=Silence())
    assert [file.path.name for file in written] == [f"{first.name}.nii.gz"]
    assert {result.name for result in find_results(tmp_path)} == {study.name for study in two}


def test_warnings_are_as_they_were_afterwards(model: Model, studies: list[Study], tmp_path: Path) -> None:
    before = list(warnings.filters)
    segment_studies(model, studies, tmp_path, settings=SETTINGS, console=Silence())
    assert list(warnings.filters) == before


def test_a_limit_that_nothing_fits_into_is_told_for_each(model: Model, studies: list[Study], tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_memory_bytes=1_000_000)
    written, failures = segment_studies(model, studies, tmp_path, settings=settings, console=Silence())
    assert (written, len(failures)) == ([], len(studies))
    assert "the least that does is" in failures[0].reason
    _, unexplained = explain_studies(model, studies, settings=settings)
    assert len(unexplained) == len(studies)


def test_plans_are_told_by_the_headers_alone(model: Model, studies: list[Study], tmp_path: Path) -> None:
    plans, failures = explain_studies(model, studies, settings=replace(SETTINGS, max_memory_bytes=1 << 36))
    assert failures == []  # a header that is whole, of a file that is cut short
    assert [name for name, _ in plans] == [study.name for study in studies]
    assert all(plan.peak_bytes < plan.limit_bytes == 1 << 36 for _, plan in plans)


@pytest.mark.parametrize("setting", [{"tile_step": 0.75}, {"backend": "other"}])
def test_results_of_another_step_or_backend_are_not_mixed_in(
    model: Model, studies: list[Study], tmp_path: Path, setting: dict[str, float | str]
) -> None:
    segment_studies(model, studies[:1], tmp_path, settings=SETTINGS, console=Silence())
    with pytest.raises(RunError, match="holds results of another model or setting"):
        segment_studies(model, studies[:1], tmp_path, settings=replace(SETTINGS, **setting), console=Silence())  # type: ignore[arg-type]


def test_a_record_that_is_older_than_these_settings_is_still_good(
    model: Model, studies: list[Study], tmp_path: Path
) -> None:
    segment_studies(model, studies[:1], tmp_path, settings=SETTINGS, console=Silence())
    record = json.loads((tmp_path / "predictions.json").read_text())
    del record["tile_step"], record["backend"]
    (tmp_path / "predictions.json").write_text(json.dumps(record))
    assert segment_studies(model, studies[:1], tmp_path, settings=SETTINGS, console=Silence()) == ([], [])
