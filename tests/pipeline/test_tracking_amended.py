"""What is told of a run after its end, against MLflow's real store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import sha256_of_folders
from pipeline.tracking import Busy, ModelCard, Tracker, amend_tracker, deliver, embedded_store, open_tracker, tracked_as
from pipeline.tracking.journal import read_facts
from pipeline.tracking.offline import list_folders
from pipeline.tracking.registry import DATASET_TAG, open_registry

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

CARD = ModelCard((40, 56, 40), (1.0, 1.0, 2.5), ("T1 (MR)",), ("front",), {"dice": 0.5}, step=3)
NOWHERE = "http://127.0.0.1:9"


def tell(tracker: Tracker, folder: Path, dice: float) -> None:
    """All that a fold tells in the end."""
    (folder / "report.json").write_text(json.dumps({"dice": dice}), encoding="utf-8")
    (folder / "bundle").mkdir(exist_ok=True)
    (folder / "bundle" / "bundle.json").write_text(str(dice), encoding="utf-8")
    tracker.metrics({"dice": dice}, step=3)
    tracker.artifact(folder / "report.json")
    tracker.note(f"Dice {dice}")
    tracker.model([folder / "bundle"], replace(CARD, metrics={"dice": dice}, result=f"Dice {dice}"))


def tell_again(folder: Path, dice: float, uri: str) -> list[str]:
    """Gives the warnings."""
    warned: list[str] = []
    with amend_tracker(folder, uri=uri, on_warning=warned.append) as tracker:
        tell(tracker, folder, dice)
    return warned


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to create a store."""
    return tmp_path_factory.mktemp("runs")


def finished(runs: Path, name: str, dice: float) -> tuple[Path, Any]:
    """A run that is over, and what MLflow says of it."""
    folder, tags = runs / name, {DATASET_TAG: name, "device": "cuda"}
    with open_tracker(
        folder, uri=embedded_store(runs), experiment="e", run_name=name, tags=tags, on_warning=pytest.fail
    ) as tracker:
        tell(tracker, folder, dice)
    return folder, found(folder)


def client_of(runs: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=embedded_store(runs))


def found(folder: Path) -> Any:
    return client_of(folder.parent).get_run(tracked_as(folder, uri=embedded_store(folder.parent))[1])


def shown(folder: Path) -> tuple[Any, ...]:
    """The figure, the note, the report and the model's sentence that MLflow has last."""
    run, client = found(folder), client_of(folder.parent)
    report = json.loads(Path(client.download_artifacts(run.info.run_id, "report.json")).read_text())
    with open_registry(embedded_store(folder.parent)) as registry:
        model = client.get_logged_model(registry.candidate(run.info.run_id).model_id)
    return run.data.metrics["dice"], run.data.tags["mlflow.note.content"], report["dice"], model.tags["result"]


def all_of(dice: float) -> tuple[Any, ...]:
    return dice, f"Dice {dice}", dice, f"Dice {dice}"


def test_the_last_word_counts_also_where_it_was_said_before(runs: Path) -> None:
    folder, _ = finished(runs, "twice", 0.9)
    assert shown(folder) == all_of(0.9)
    for dice in (0.7, 0.9):
        assert tell_again(folder, dice, embedded_store(runs)) == []
        assert shown(folder) == all_of(dice)
    history = client_of(runs).get_metric_history(found(folder).info.run_id, "dice")
    assert [point.value for point in sorted(history, key=lambda point: point.timestamp)][-1] == 0.9
    # The first model is the run's again; it is not there twice.
    assert len(found(folder).outputs.model_outputs) == 2


def test_what_is_the_same_is_not_told_twice(runs: Path) -> None:
    folder, _ = finished(runs, "same", 0.9)
    tell_again(folder, 0.9, embedded_store(runs))
    kinds = [fact.kind for fact in read_facts(folder)]
    assert [kinds.count(kind) for kind in ("start", "resume", "metrics", "note", "model", "end")] == [1, 0, 1, 1, 1, 1]


def test_the_run_ended_when_it_did(runs: Path) -> None:
    folder, before = finished(runs, "over", 0.9)
    tell_again(folder, 0.7, embedded_store(runs))
    after = found(folder)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    note = "mlflow.note.content"
    assert {k: v for k, v in after.data.tags.items() if k != note} == {
        k: v for k, v in before.data.tags.items() if k != note
    }
    (listed,) = (run for run in list_folders(runs) if run.name == "over")
    assert (listed.status, listed.ended_ms, listed.metrics) == ("finished", before.info.end_time, {"dice": 0.7})


def test_where_the_server_is_away_the_journal_delivers_later(runs: Path) -> None:
    folder, _ = finished(runs, "away", 0.9)
    store, hidden = runs / "mlflow.db", runs / "elsewhere"
    store.rename(hidden)
    store.mkdir()
    warned = tell_again(folder, 0.7, embedded_store(runs))
    assert "have not reached" in warned[-1]
    store.rmdir()
    hidden.rename(store)
    assert deliver(folder, uri=embedded_store(runs), on_warning=pytest.fail) == 0
    assert shown(folder) == all_of(0.7)


def test_a_model_that_arrives_late_goes_by_the_files_it_then_has(runs: Path) -> None:
    folder = runs / "late"
    warned: list[str] = []
    with open_tracker(
        folder, uri=NOWHERE, experiment="e", run_name="late", tags={DATASET_TAG: "late"}, on_warning=warned.append
    ) as tracker:
        tell(tracker, folder, 0.9)
        tell(tracker, folder, 0.7)
    assert deliver(folder, uri=embedded_store(runs), on_warning=pytest.fail) == 0
    assert shown(folder) == all_of(0.7)
    client = client_of(runs)
    (output,) = found(folder).outputs.model_outputs
    files = Path(client.get_logged_model(output.model_id).artifact_location.removeprefix("file://"))
    bundle = files / "model" / "fold_0" / "bundle"
    assert (bundle / "bundle.json").read_text() == "0.7"
    assert client.get_logged_model(output.model_id).tags["volseg.bundle_sha256"] == sha256_of_folders([bundle])


def test_a_run_that_was_cut_off_gets_its_end(runs: Path) -> None:
    folder = runs / "cut_off"
    tracker = open_tracker(
        folder, uri=embedded_store(runs), experiment="e", run_name="cut_off", tags={}, on_warning=pytest.fail
    )
    with pytest.raises(Busy):
        amend_tracker(folder, uri=embedded_store(runs), on_warning=pytest.fail)
    tracker.finish("FINISHED")
    facts = (folder / "tracking.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "tracking.jsonl").write_bytes(b"".join(facts[:-1]))
    (folder / "tracking_sent.json").unlink()
    tell_again(folder, 0.7, embedded_store(runs))
    assert read_facts(folder)[-1].kind == "end"
    assert found(folder).info.status == "FINISHED"


def test_of_a_run_that_was_never_tracked_nothing_is_told(tmp_path: Path) -> None:
    with amend_tracker(tmp_path, uri=NOWHERE, on_warning=pytest.fail) as tracker:
        tracker.metrics({"dice": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []
