"""Whether mirrored passes are taken, where the config leaves it to the held-out cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import compare
from pipeline.bundle import load_bundle
from pipeline.console import Silence
from pipeline.crossval import cross_validate
from pipeline.held_out import MIRRORED_JSON, PLAIN_JSON
from pipeline.manifest import Dataset, save_manifest
from pipeline.report_values import Report
from pipeline.runs import Run, open_run

from .test_crossval import Listener, config_at

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

Figures = list[list[float | None]]


@pytest.fixture(scope="module")
def run(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("held_out")
    save_manifest(small_dataset, home / "cases.json")
    config = config_at(home, predict={"mirror": "auto"}, augment={"mirror_axes": [0]})
    return open_run(config, home / "runs" / "both", Silence())


def dices(path: Path) -> Figures:
    report = Report.from_json(json.loads(path.read_bytes()))
    return [[score.dice for score in case.labels] for case in report.cases]


def add(gain: float, path: Path) -> None:
    """Make every Dice of a report better by about this."""
    document = json.loads(path.read_text())
    for number, case in enumerate(document["cases"]):
        for score in case["labels"]:
            score["dice"] = (score["dice"] or 0.0) + gain + number / 1000
    path.write_text(json.dumps(document))


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
    for folder in folders:
        add(0.05, folder / MIRRORED_JSON)
    monkeypatch.setattr(compare, "SIGNIFICANT", 0.2)
    cross_validate(run, [0, 1], told)
    for folder, expected, page in zip(folders, mirrored, pages, strict=True):
        assert load_bundle(folder / "bundle").index.mirror
        # What lies there is what the bundle now predicts, not what was written into the report above.
        assert dices(folder / "report.json") == expected
        assert (folder / "report.html").read_bytes() != page
    whole = Report.from_json(json.loads((run.folder / "report.json").read_bytes()))
    found = [[score.dice for score in case.labels] for case in whole.cases]
    assert sorted(found) == sorted(mirrored[0] + mirrored[1])
