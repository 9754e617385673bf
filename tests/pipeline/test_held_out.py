"""Whether mirrored passes are taken, where the config leaves it to the held-out cases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import compare, held_out
from pipeline.bundle import Air, is_mirrored, load_bundle, read_air, set_air
from pipeline.console import Silence
from pipeline.crossval import cross_validate, write_whole_report
from pipeline.device import Hardware
from pipeline.errors import VolumeError
from pipeline.folds import Folds
from pipeline.held_out import MIRRORED_JSON, PLAIN_JSON, agree_on_mirroring, out_of_fold_report, score_fold
from pipeline.manifest import Dataset, save_manifest
from pipeline.plan import Plan
from pipeline.postprocess_run import held_out_cases
from pipeline.report_values import read_report
from pipeline.runs import Run, open_run
from transforms.volume import read_label

from .conftest import SMALL_CASES
from .test_crossval import Listener, config_at

pytestmark = pytest.mark.usefixtures("one_thread")

Figures = list[list[float | None]]
HELD_OUT = (SMALL_CASES[:2], SMALL_CASES[2:3])
ENOUGH = 0.3
"""Of three patients the two-sided test says p = 0.25 at best."""


@pytest.fixture(scope="module")
def world(
    small_dataset: Dataset, small_plan: Plan, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Run]:
    """Two folds with a model each that has learnt nothing, scored both ways: neither is mirrored."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    config = config_at(folder, predict={"mirror": "auto"})
    folds = Folds(count=2, seed=0, fixed=False, fold_of={}, cases=())
    run = Run(folder, config, small_dataset, folds, small_plan, Hardware("cpu", "32-true"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for fold, case_ids in enumerate(HELD_OUT):
        shutil.copytree(small_bundle, run.fold_folder(fold) / "bundle")
        score_fold(run, fold, case_ids, Silence())
    yield run
    torch.set_num_threads(before)


@pytest.fixture
def scored(world: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    shutil.copytree(world.folder, tmp_path / "run")
    return replace(world, folder=tmp_path / "run")


def dices(path: Path) -> Figures:
    return [[score.dice for score in case.labels] for case in read_report(path).cases]


def add(gain: float, path: Path) -> None:
    """Make every Dice of a report better by about this."""
    document = json.loads(path.read_text())
    for number, case in enumerate(document["cases"]):
        for score in case["labels"]:
            score["dice"] = (score["dice"] or 0.0) + gain + number / 1000
    path.write_text(json.dumps(document))


def mirrored_is_better(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as so few cases can be made to say so."""
    for fold in (0, 1):
        add(0.05, run.fold_folder(fold) / MIRRORED_JSON)
    monkeypatch.setattr(compare, "SIGNIFICANT", ENOUGH)


def maps(run: Run, fold: int) -> list[Any]:
    files = sorted((run.fold_folder(fold) / "validation").glob("*.nii.gz"))
    return [read_label(file).voxels for file in files]


def same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all((a == b).all() for a, b in zip(some, others, strict=True))


class TestCutShort:
    """A kill at any point of predicting a fold again, told as an interrupt there."""

    @staticmethod
    def cut_short(run: Run, at: str, call: int) -> None:
        """At a call of one of its functions."""
        done, calls = getattr(held_out, at), []

        def killed(*arguments: Any, **named: Any) -> Any:
            calls.append(at)
            if len(calls) == call:
                raise KeyboardInterrupt
            return done(*arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(held_out, at, killed)
            with pytest.raises(KeyboardInterrupt):
                agree_on_mirroring(run, [0, 1], Silence())

    def test_the_next_call_does_it_again(self, scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = [maps(scored, fold) for fold in (0, 1)]
        mirrored = [dices(scored.fold_folder(fold) / MIRRORED_JSON) for fold in (0, 1)]
        mirrored_is_better(scored, monkeypatch)
        self.cut_short(scored, "_predict_case", 2)
        assert not is_mirrored(scored.fold_folder(0) / "bundle")
        assert same(maps(scored, 0), plain[0])
        self.cut_short(scored, "set_mirror", 2)
        assert [is_mirrored(scored.fold_folder(fold) / "bundle") for fold in (0, 1)] == [True, False]
        agree_on_mirroring(scored, [0, 1], Silence())
        for fold, expected in enumerate(mirrored):
            folder = scored.fold_folder(fold)
            assert is_mirrored(folder / "bundle")
            assert dices(folder / "report.json") == expected
            assert not same(maps(scored, fold), plain[fold])
            assert {path.name for path in folder.glob("validation*")} == {"validation"}
        cases = held_out_cases(scored, out_of_fold_report(scored, [0, 1]))
        assert sum(case.prediction.is_file() for case in cases) == 3

    def test_air_is_asked_about_again(self, scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the passes change, and also if that was cut short before it came to that."""
        bundles = [scored.fold_folder(fold) / "bundle" for fold in (0, 1)]
        for bundle in bundles:
            set_air(bundle, Air(levels=(-99.0,), cases=5, windows=7))
        mirrored_is_better(scored, monkeypatch)
        self.cut_short(scored, "prove_air", 1)
        assert [read_air(bundle) for bundle in bundles] == [
            Air(levels=(-99.0,)),
            Air(levels=(-99.0,), cases=5, windows=7),
        ]
        agree_on_mirroring(scored, [0, 1], Silence())
        assert [read_air(bundle) for bundle in bundles] == [Air(levels=(-99.0,), cases=0)] * 2

    def test_what_is_agreed_on_is_not_done_twice(self, scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        mirrored_is_better(scored, monkeypatch)
        agree_on_mirroring(scored, [0, 1], Silence())
        monkeypatch.setattr(held_out, "_score", lambda *_, **__: pytest.fail("predicted again"))
        agree_on_mirroring(scored, [0, 1], Silence())


def test_a_case_that_could_not_be_predicted_is_named_and_tried_again(
    scored: Run, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, done = SMALL_CASES[0], held_out._predict_case

    def failing(run: Run, model: Any, case: Any, target: Path, *, mirror: bool) -> None:
        if case.case_id == lost:
            raise VolumeError("the file is cut short")
        done(run, model, case, target, mirror=mirror)

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "_predict_case", failing)
        score_fold(scored, 0, HELD_OUT[0], Silence())
    report = out_of_fold_report(scored, [0, 1])
    assert report.missing_predictions == (lost,)
    assert (scored.fold_folder(0) / "set_aside_predictions.json").is_file()
    assert {case.case_id for case in report.cases} == {*SMALL_CASES[1:3]}

    mirrored_is_better(scored, monkeypatch)
    monkeypatch.setattr(compare, "SIGNIFICANT", 2 * ENOUGH)  # of the two cases that are left
    agree_on_mirroring(scored, [0, 1], Silence())
    report = out_of_fold_report(scored, [0, 1])
    assert report.missing_predictions == ()
    assert not (scored.fold_folder(0) / "set_aside_predictions.json").exists()
    assert {case.case_id for case in report.cases} == {*SMALL_CASES[:3]}


def test_report_and_pages_say_what_was_found(scored: Run) -> None:
    report = out_of_fold_report(scored, [0, 1])
    assert report.mirroring is not None
    assert report.mirroring.n_cases == 3
    assert report.mirroring.dice_nested == report.mirroring.dice_plain == pytest.approx(report.overall.mean)
    write_whole_report(scored, report)
    assert read_report(scored.folder / "report.json") == report
    assert "<p>Mirrored passes: Dice 0." in (scored.folder / "report.html").read_text()
    fold = read_report(scored.fold_folder(0) / "report.json").mirroring
    assert fold is not None
    assert (fold.n_cases, fold.dice_nested) == (2, None)


def test_where_the_config_decides_nothing_is_asked(scored: Run, tmp_path: Path) -> None:
    decided = replace(scored, config=config_at(tmp_path, predict={"mirror": True}))
    agree_on_mirroring(decided, [0, 1], Silence())
    assert out_of_fold_report(decided, [0, 1]).mirroring is None


@pytest.fixture(scope="module")
def run(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("held_out")
    save_manifest(small_dataset, home / "cases.json")
    config = config_at(home, predict={"mirror": "auto"}, augment={"mirror_axes": [0]})
    return open_run(config, home / "runs" / "both", Silence())


@pytest.mark.slow
def test_the_cases_of_all_folds_decide_and_the_bundles_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Listener()
    cross_validate(run, [0, 1], told)
    folders = [run.fold_folder(fold) for fold in (0, 1)]
    for folder in folders:
        # Four cases are never evidence.
        index = load_bundle(folder / "bundle").index
        assert (index.mirror, index.provenance["mirroring"]["worth_it"]) == (False, False)
        assert index.provenance["mirroring"]["n_cases"] == 4
        assert dices(folder / "report.json") == dices(folder / PLAIN_JSON) != dices(folder / MIRRORED_JSON)
        assert {path.name for path in folder.glob("validation*")} == {"validation"}
    assert [note.partition(":")[0] for note in told.notes if "mirrored passes" in note] == [
        "fold 0",
        "fold 1",
        "mirrored passes",
    ]

    mirrored = [dices(folder / MIRRORED_JSON) for folder in folders]
    pages = [(folder / "report.html").read_bytes() for folder in folders]
    mirrored_is_better(run, monkeypatch)
    cross_validate(run, [0, 1], told)
    for folder, expected, page in zip(folders, mirrored, pages, strict=True):
        assert load_bundle(folder / "bundle").index.mirror
        # What lies there is what the bundle now predicts, not what was written into the report above.
        assert dices(folder / "report.json") == expected
        assert (folder / "report.html").read_bytes() != page
    assert sorted(dices(run.folder / "report.json")) == sorted(mirrored[0] + mirrored[1])
