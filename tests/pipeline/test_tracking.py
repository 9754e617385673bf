"""Tracking against the real MLflow: its SQLite store, its server process, and places where neither can be reached."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunError
from pipeline.tracking import ModelCard, Tracker, deliver, embedded_store, open_tracker
from pipeline.tracking.journal import read_facts

from .mlflow_server import free_port, serving, until

# SQLAlchemy's, about how MLflow's tables are written, wherever a test is the first to import them.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

ROOT = Path(__file__).parents[2]
EXPERIMENT = "hippocampus"
DIGEST = "0123456789abcdef" * 4
CARD = ModelCard((40, 56, 40), (1.0, 1.0, 2.5), ("T1 (MR)", "T2 (MR)"), ("front", "back"), {"held_out/dice": 0.9})

# A process of its own, since pytest's variables alone would keep MLflow from reporting to its makers.
TRACK_ALONE = """
import sys
from pathlib import Path

spoken = []
sys.addaudithook(lambda event, found: event in {"socket.connect", "socket.getaddrinfo"} and spoken.append(found))

from pipeline.tracking import embedded_store, open_tracker

runs, name = Path(sys.argv[1]), sys.argv[2]
uri = embedded_store(runs)
with open_tracker(
    runs / name, uri=uri, experiment="alone", run_name=name, tags={}, on_warning=print
) as tracker:
    tracker.metrics({"dice/mean": 0.5}, step=1)

from mlflow.telemetry import get_telemetry_client

assert get_telemetry_client() is None
assert spoken == [], spoken
"""

TELL_AND_DIE = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking import open_tracker

tracker = open_tracker(
    Path(sys.argv[1]), uri=sys.argv[2], experiment="hippocampus", run_name="killed", tags={}, on_warning=print
)
tracker.params({"train.seed": "0"})
for step in (1, 2, 3):
    tracker.metrics({"dice/Anterior": step / 10}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def outside_pytest(script: str, *arguments: str) -> subprocess.Popen[str]:
    markers = {"CI", "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY"}
    environment = {key: value for key, value in os.environ.items() if key not in markers}
    command = [sys.executable, "-c", script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def made_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[int]]:
    """A store that two processes created at once, what they printed and how they ended."""
    runs = tmp_path_factory.mktemp("two")
    both = [outside_pytest(TRACK_ALONE, str(runs), name) for name in ("one", "two")]
    printed = [process.communicate(timeout=120)[0] for process in both]
    return runs, printed, [process.returncode for process in both]


@pytest.fixture
def runs(made_by_two: tuple[Path, list[str], list[int]], tmp_path: Path) -> Path:
    """A folder of runs whose store has its tables already, which takes MLflow seconds."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(made_by_two[0] / "mlflow.db", folder)
    return folder


class Warnings(list[str]):
    """What a user would have been told."""

    def __call__(self, line: str) -> None:
        self.append(line)


def track(folder: Path, warned: Warnings, **changes: Any) -> Tracker:
    settings = {"uri": embedded_store(folder.parent), "experiment": EXPERIMENT, "run_name": folder.name, "tags": {}}
    return open_tracker(folder, on_warning=warned, **(settings | changes))


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_in(uri: str) -> dict[str, Any]:
    client = client_of(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    names = [run.info.run_name for run in found]
    assert len(names) == len(set(names))
    return dict(zip(names, found, strict=True))


def history(uri: str, run: Any, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(uri).get_metric_history(run.info.run_id, key)]


def write_bundle(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    (folder / "inner" / "weights.bin").write_bytes(b"1234")
    return folder


def test_two_processes_may_create_the_store_at_once(made_by_two: tuple[Path, list[str], list[int]]) -> None:
    """And they print nothing, reach for no network, and leave nothing beside the folder of the runs."""
    runs, printed, codes = made_by_two
    assert printed == ["", ""]
    assert codes == [0, 0]
    client = client_of(embedded_store(runs))
    experiment = client.get_experiment_by_name("alone")
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"one", "two"}
    assert experiment.artifact_location == (runs / "mlartifacts" / "alone").as_uri()
    assert not (ROOT / "mlruns").exists()


def test_all_that_is_told_arrives(runs: Path) -> None:
    folder, warned = runs / "fold_0", Warnings()
    params = {f"augment.key_{number}": str(number) for number in range(230)} | {"long": "x" * 7000}
    with track(folder, warned, tags={"git_commit": "abc", "device": "cpu"}) as tracker:
        (folder / "plots").mkdir()
        (folder / "plots" / "curves.png").write_bytes(b"png")
        (folder / "plan.json").write_text("{}", encoding="utf-8")
        tracker.params(params)
        for step in range(1, 42):
            tracker.metrics({f"loss/term_{term}": term / step for term in range(30)}, step=step)
        tracker.metrics({"dice/Hippocampus (L+R)": 0.75, "loss/term_7": math.nan, "odd//../name": math.inf}, step=50)
        tracker.dataset("hippocampus", DIGEST, "training", source="MSD Task04", case_count=26)
        tracker.dataset("hippocampus", DIGEST[::-1], "validation", source="MSD Task04", case_count=6)
        tracker.artifact(folder / "plan.json")
        tracker.artifact(folder / "plots", "pictures")
    assert warned == []

    run = runs_in(embedded_store(runs))["fold_0"]
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 231
    assert run.data.params["augment.key_229"] == "229"
    assert run.data.params["long"].endswith("x... (7000 characters)")
    assert run.data.metrics["dice/Hippocampus _L_R_"] == 0.75
    assert run.data.metrics["odd/name"] > 1e300
    losses = history(embedded_store(runs), run, "loss/term_7")
    assert sorted(losses)[:41] == [(step, 7 / step) for step in range(1, 42)]
    assert len(losses) == 42
    assert math.isnan(run.data.metrics["loss/term_7"])
    inputs = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert inputs["training"].digest == DIGEST[:36]
    assert json.loads(inputs["validation"].profile) == {"cases": 6, "digest": DIGEST[::-1]}
    client = client_of(embedded_store(runs))
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["pictures", "plan.json"]
    assert [item.path for item in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/curves.png"]
    assert run.data.tags["mlflow.source.git.commit"] == run.data.tags["git_commit"] == "abc"
    assert "mlflow.user" not in run.data.tags
    assert run.info.user_id == "unknown"


def test_a_model_is_shown_with_its_signature(runs: Path) -> None:
    from mlflow.models import Model

    folder, warned = runs / "fold_0", Warnings()
    with track(folder, warned) as tracker:
        bundle = write_bundle(folder / "bundle")
        for _ in range(2):
            tracker.model([bundle], CARD)
    assert warned == []
    run = runs_in(embedded_store(runs))["fold_0"]
    client = client_of(embedded_store(runs))
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert (str(logged.status), logged.name) == ("READY", "fold_0")
    assert (logged.params["patch_shape"], logged.params["spacing_mm"]) == ("40, 56, 40", "1, 1, 2.5")
    assert (logged.params["channels"], logged.params["labels"]) == ("T1 (MR), T2 (MR)", "front, back")
    assert [(metric.key, metric.value) for metric in logged.metrics] == [("held_out/dice", 0.9)]
    location = Path(logged.artifact_location.removeprefix("file://"))
    assert (location / "model" / "fold_0" / "bundle" / "inner" / "weights.bin").read_bytes() == b"1234"
    assert not list(location.rglob("*.pkl"))
    model = Model.load(str(location))
    assert [str(column.type) for column in model.signature.inputs.inputs] == ["DataType.string"]
    assert model.signature.params.params[0].name == "out"
    assert model.signature.outputs.inputs[0].shape == (-1, -1, -1, -1)
    assert model.load_input_example(str(location)).to_dict("records") == [{"path": "study.nii.gz"}]
    assert client.search_registered_models() == []


def test_a_model_of_several_bundles_is_registered_once(runs: Path) -> None:
    from pipeline.tracking.logged_model import register

    folder, warned, uri = runs / "crossval", Warnings(), embedded_store(runs)
    for name in ("liver: a/b", "liver_ a_b"):
        with track(folder, warned) as tracker:
            bundles = [folder / f"fold_{fold}" / "bundle" for fold in (0, 1)]
            card = replace(CARD, register_as=name)
            tracker.model([b if b.is_dir() else write_bundle(b) for b in bundles], card)
    assert warned == []
    client = client_of(uri)
    (registered,) = client.search_registered_models()
    assert registered.name == "liver_ a_b"
    (version,) = client.search_model_versions(f"name = '{registered.name}'")
    assert version.run_id == runs_in(uri)["crossval"].info.run_id
    location = Path(version.source.removeprefix("file://"))
    assert sorted(path.parent.name for path in location.glob("model/*/bundle")) == ["fold_0", "fold_1"]
    (model,) = client.search_logged_models([runs_in(uri)["crossval"].info.experiment_id])
    noted = model.tags["mlflow.modelVersions"]
    assert json.loads(noted) == [{"name": "liver_ a_b", "version": 1}]
    # A kill between the creation of a version and the tag by which the run's page finds it.
    client.delete_logged_model_tag(model.model_id, "mlflow.modelVersions")
    for _ in range(2):
        assert register(client, "liver: a/b", model.model_id, run_id=version.run_id) == 1
        assert client.get_logged_model(model.model_id).tags["mlflow.modelVersions"] == noted


def test_a_note_links_to_the_artifacts_of_its_run(runs: Path) -> None:
    for text in ("[report](artifact:report.html)", "[page](artifact:overlays/worst.png)"):
        with track(runs / "fold_0", Warnings()) as tracker:
            tracker.note(text)
    run = runs_in(embedded_store(runs))["fold_0"]
    place = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/overlays/worst.png"
    assert run.data.tags["mlflow.note.content"] == f"[page]({place})"


def test_children_wait_for_their_parent(runs: Path) -> None:
    warned = Warnings()
    with track(runs / "crossval", warned):
        for fold in (0, 1):
            with track(runs / f"fold_{fold}", warned, parent=runs / "crossval") as child:
                child.metrics({"dice/mean": 0.8}, step=1)
    assert warned == []
    found = runs_in(embedded_store(runs))
    parent_id = found["crossval"].info.run_id
    assert {found[f"fold_{fold}"].data.tags["mlflow.parentRunId"] for fold in (0, 1)} == {parent_id}
    assert "mlflow.parentRunId" not in found["crossval"].data.tags


def test_a_child_takes_its_undelivered_parent_along(runs: Path) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    with track(runs / "crossval", Warnings(), uri=away):
        pass
    warned = Warnings()
    with track(runs / "fold_0", warned, parent=runs / "crossval"):
        pass
    assert warned == []
    found = runs_in(embedded_store(runs))
    assert found["fold_0"].data.tags["mlflow.parentRunId"] == found["crossval"].info.run_id
    assert found["crossval"].info.status == "FINISHED"


def test_a_parent_that_was_never_tracked_is_left_out(runs: Path) -> None:
    warned = Warnings()
    with track(runs / "fold_0", warned, parent=runs / "no_such_run"):
        pass
    assert warned == []
    assert "mlflow.parentRunId" not in runs_in(embedded_store(runs))["fold_0"].data.tags


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RunError, "FAILED")])
def test_an_exception_ends_the_run(runs: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), track(runs / "fold_0", Warnings()):
        raise error
    assert runs_in(embedded_store(runs))["fold_0"].info.status == status


def test_a_kill_before_delivery_loses_nothing(runs: Path) -> None:
    """Killed, delivered by hand, then resumed from an earlier step, as a training does."""
    folder, uri = runs / "killed", embedded_store(runs)
    process = outside_pytest(TELL_AND_DIE, str(folder), uri)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == -signal.SIGKILL
    assert runs_in(uri) == {}

    warned = Warnings()
    assert deliver(folder, on_warning=warned) == 0
    run = runs_in(uri)["killed"]
    assert run.info.status == "RUNNING"
    assert run.data.params == {"train.seed": "0"}
    assert history(uri, run, "dice/Anterior") == [(1, 0.1), (2, 0.2), (3, 0.3)]

    with track(folder, warned, tags={"volseg": "9.9"}) as tracker:
        tracker.params({"train.seed": "0", "train.device": "cpu"})
        tracker.params({"train.device": "cuda"})
        for step in (2, 3, 4):
            tracker.metrics({"dice/Anterior": step / 10}, step=step)
    assert warned == []
    again = runs_in(uri)["killed"]
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    assert again.data.params == {"train.seed": "0", "train.device": "cpu"}
    assert (again.data.tags["resumed.train.device"], again.data.tags["volseg"]) == ("cuda", "9.9")
    assert history(uri, again, "dice/Anterior") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


@pytest.mark.parametrize("number", [0, 1, 4])
def test_telling_twice_changes_nothing(runs: Path, number: int) -> None:
    """A kill between the delivery of a fact and the note of it: `number` facts are noted, all were delivered."""
    folder, uri, warned = runs / "fold_0", embedded_store(runs), Warnings()
    with track(folder, warned) as tracker:
        tracker.params({"train.seed": "0"})
        tracker.metrics({"dice/mean": 0.5, "loss/total": math.nan}, step=1)
        tracker.dataset("hippocampus", DIGEST, "training", source="MSD", case_count=26)
        tracker.model([write_bundle(folder / "bundle")], CARD)
    note = folder / "tracking_sent.json"
    noted = json.loads(note.read_text(encoding="utf-8"))
    note.write_text(json.dumps(noted | {"number": number} | ({} if number else {"ids": {}})), encoding="utf-8")

    assert deliver(folder, on_warning=warned) == 0
    assert warned == []
    run = runs_in(uri)["fold_0"]
    assert history(uri, run, "dice/mean") == [(1, 0.5)]
    assert len(history(uri, run, "loss/total")) == 1
    assert len(run.inputs.dataset_inputs) == 1
    assert len(run.outputs.model_outputs) == 1
    assert len(client_of(uri).search_logged_models([run.info.experiment_id])) == 1
    assert json.loads(note.read_text(encoding="utf-8")) == noted


def test_a_changed_value_of_a_step_is_told(runs: Path) -> None:
    """A resumed cross-validation with one more fold has another mean, at the same step."""
    for value in (0.7, 0.8, 0.8):
        with track(runs / "crossval", Warnings()) as tracker:
            tracker.metrics({"dice/mean": value}, step=0)
    run = runs_in(embedded_store(runs))["crossval"]
    assert run.data.metrics == {"dice/mean": 0.8}
    assert sorted(history(embedded_store(runs), run, "dice/mean")) == [(0, 0.7), (0, 0.8)]


def test_an_unreachable_server_costs_a_training_nothing(runs: Path) -> None:
    folder, warned = runs / "fold_0", Warnings()
    uri = f"http://somebody:secret@127.0.0.1:{free_port()}"
    with track(folder, warned, uri=uri) as tracker:
        started_s = time.monotonic()
        for step in range(300):
            tracker.metrics({"loss/total": float(step)}, step=step)
        told_s = time.monotonic() - started_s
    finished_s = time.monotonic() - started_s
    # Lenient on purpose: one request that waits for its time limit would take ten seconds alone.
    assert told_s < 8
    assert finished_s < 30
    assert len(warned) == 2
    assert "no connection" in warned[0]
    assert "302 of 302 entries" in warned[1]
    written = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file())
    assert "secret" not in written + "".join(warned)

    assert deliver(folder, uri=embedded_store(runs), on_warning=warned) == 0
    run = runs_in(embedded_store(runs))["fold_0"]
    assert sorted(history(embedded_store(runs), run, "loss/total")) == [(step, float(step)) for step in range(300)]
    assert run.info.end_time - run.info.start_time < finished_s * 1000 + 1000


def folder_in_the_way(database: Path) -> str:
    """As a wrongly mounted disk has it."""
    database.mkdir()
    return "unable to open database file"


def other_file_in_the_way(database: Path) -> str:
    database.write_text("no database" * 100, encoding="utf-8")
    return "file is not a database"


@pytest.mark.parametrize("obstruct", [folder_in_the_way, other_file_in_the_way])
def test_deliveries_go_on_when_the_store_comes_back(runs: Path, obstruct: Callable[[Path], str]) -> None:
    folder, warned = runs / "fold_0", Warnings()
    database = runs / "mlflow.db"
    database.rename(runs / "kept.db")
    reason = obstruct(database)
    with track(folder, warned) as tracker:
        tracker.metrics({"dice/mean": 0.5}, step=1)
        until(lambda: bool(warned))
        database.rename(runs / "obstacle")
        (runs / "kept.db").rename(database)
        tracker.metrics({"dice/mean": 0.6}, step=2)
    assert len(warned) == 1
    assert reason in warned[0]
    run = runs_in(embedded_store(runs))["fold_0"]
    assert history(embedded_store(runs), run, "dice/mean") == [(1, 0.5), (2, 0.6)]


def test_a_deleted_experiment_is_named(runs: Path) -> None:
    with track(runs / "fold_0", Warnings()):
        pass
    client = client_of(embedded_store(runs))
    client.delete_experiment(client.get_experiment_by_name(EXPERIMENT).experiment_id)
    warned = Warnings()
    with track(runs / "fold_1", warned):
        pass
    assert f"experiment '{EXPERIMENT}' is deleted" in warned[0]


def test_what_can_never_be_sent_does_not_hold_up_the_rest(runs: Path) -> None:
    folder, warned = runs / "fold_0", Warnings()
    with track(folder, warned) as tracker:
        (folder / "gone.png").touch()
        tracker.artifact(folder / "gone.png")
        tracker.artifact(folder / "gone.png", "again")
        (folder / "gone.png").unlink()
        tracker.metrics({"dice/mean": 0.5}, step=1)
    assert len(warned) == 1
    assert "gone.png is gone" in warned[0]
    assert runs_in(embedded_store(runs))["fold_0"].data.metrics == {"dice/mean": 0.5}


def test_only_the_run_folder_is_shown(runs: Path) -> None:
    (runs / "elsewhere.png").touch()
    home = Path.home()
    with track(runs / "fold_0", Warnings(), tags={"log": f"{home}/log.txt"}) as tracker:
        with pytest.raises(ValueError, match="not inside the run folder"):
            tracker.artifact(runs / "elsewhere.png")
        tracker.params({"data.root": f"{home}/study", "tracking.uri": "https://me:secret@server/x@y"})
    run = runs_in(embedded_store(runs))["fold_0"]
    assert run.data.params == {"data.root": "~/study", "tracking.uri": "https://server/x@y"}
    assert run.data.tags["log"] == "~/log.txt"


def test_a_run_is_tracked_by_one_at_a_time(runs: Path) -> None:
    folder = runs / "fold_0"
    with track(folder, Warnings(), uri=f"http://127.0.0.1:{free_port()}"):
        with pytest.raises(RunError, match="tracked already"):
            track(folder, Warnings())
        assert deliver(folder, uri=embedded_store(runs), on_warning=Warnings()) == 1
    assert deliver(folder, uri=embedded_store(runs), on_warning=Warnings()) == 0


def test_nothing_is_told_after_the_end(runs: Path) -> None:
    with track(runs / "fold_0", Warnings()) as tracker:
        tracker.finish("FINISHED")
        with pytest.raises(ValueError, match="too late"):
            tracker.metrics({"dice/mean": 1.0}, step=1)
    assert [fact.kind for fact in read_facts(runs / "fold_0")] == ["start", "end"]


def test_any_folder_name_will_do(runs: Path) -> None:
    odd = runs / "50%20 ü #1? runs"
    odd.mkdir()
    shutil.copy(runs / "mlflow.db", odd)
    warned = Warnings()
    with track(odd / "fold_0", warned) as tracker:
        (odd / "fold_0" / "plan.json").touch()
        tracker.artifact(odd / "fold_0" / "plan.json")
    assert warned == []
    run = runs_in(embedded_store(odd))["fold_0"]
    assert (odd / "mlartifacts" / EXPERIMENT / run.info.run_id / "artifacts" / "plan.json").is_file()


@pytest.mark.slow  # the server needs several seconds for each of its two starts
def test_a_server_that_is_killed_and_comes_back(tmp_path: Path, runs: Path) -> None:
    port, warned = free_port(), Warnings()
    uri = f"http://127.0.0.1:{port}"
    folder = tmp_path / "fold_0"
    with serving(runs, port):
        tracker = track(folder, warned, uri=uri)
        bundle = write_bundle(folder / "bundle")
        tracker.artifact(bundle / "plan.json", "plan")
        tracker.metrics({"dice/mean": 0.1}, step=1)
        until(lambda: "fold_0" in runs_in(uri) and bool(runs_in(uri)["fold_0"].data.metrics))
    for step in (2, 3):
        tracker.metrics({"dice/mean": step / 10}, step=step)
    until(lambda: bool(warned))
    with serving(runs, port):
        tracker.metrics({"dice/mean": 0.4}, step=4)
        tracker.model([bundle], CARD)
        tracker.finish("FINISHED")
        run = runs_in(uri)["fold_0"]
        assert history(uri, run, "dice/mean") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
        assert run.info.status == "FINISHED"
        assert len(run.outputs.model_outputs) == 1
        assert [item.path for item in client_of(uri).list_artifacts(run.info.run_id, "plan")] == ["plan/plan.json"]
    assert len(warned) == 1
    assert "no connection" in warned[0]
