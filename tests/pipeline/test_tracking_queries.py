"""What is read back from MLflow: its real SQLite store, with real runs in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.cli_run_rows import in_order
from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError, RunError
from pipeline.report_values import CaseScores, LabelScore
from pipeline.summary import summarise
from pipeline.tracking import embedded_store, open_tracker
from pipeline.tracking.offline import list_folders
from pipeline.tracking.queries import TrackedRun, list_runs, read_run_json

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def report_json(gain: float) -> str:
    cases = [
        CaseScores(
            case_id=f"case_{n}",
            patient_id=f"case_{n}",
            labels=(_score(0.5 + 0.01 * n + gain * (1 + n / 10)),),
        )
        for n in range(8)
    ]
    return json.dumps(summarise(cases, settings=EvaluateConfig(bootstrap_samples=200)).to_json())


def _score(dice: float) -> LabelScore:
    return LabelScore(label="liver", status="scored", dice=dice, prediction_mm3=1.0, reference_mm3=1.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a cross-validation, its fold, and another run."""
    folder = tmp_path_factory.mktemp("runs")
    uri = embedded_store(folder)
    for name, parent, dice in (("first", None, 0.5), ("first/fold_0", "first", 0.6), ("second", None, 0.8)):
        run = folder / name
        run.mkdir(parents=True, exist_ok=True)
        (run / "report.json").write_text(report_json(dice / 10))
        with open_tracker(
            run,
            uri=uri,
            experiment="liver",
            run_name=name,
            tags={"dataset": "liver"},
            on_warning=print,
            parent=folder / parent if parent else None,
        ) as tracker:
            tracker.metrics({"out_of_fold_dice/mean": dice}, step=0)
            tracker.artifact(run / "report.json")
    return folder


def test_runs_are_listed_newest_first_with_parents_and_metrics(runs: Path) -> None:
    found = list_runs(embedded_store(runs))
    assert [run.name for run in found] == ["second", "first/fold_0", "first"]
    assert [run.metrics["out_of_fold_dice/mean"] for run in found] == [0.8, 0.6, 0.5]
    assert found[1].parent_id == found[2].run_id
    assert found[0].tags["dataset"] == "liver"
    assert {run.status for run in found} == {"finished"}
    assert list_runs(embedded_store(runs), experiment="liver") == found


def test_a_file_of_a_run_is_read(runs: Path) -> None:
    run = list_runs(embedded_store(runs))[0]
    assert read_run_json(embedded_store(runs), run.run_id, "report.json") == json.loads(report_json(0.08))
    with pytest.raises(RunError, match=r"has no other\.json"):
        read_run_json(embedded_store(runs), run.run_id, "other.json")


def test_what_is_not_there_is_told_in_one_line(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no runs are tracked there"):
        list_runs(embedded_store(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="no experiment named 'spleen'"):
        list_runs(embedded_store(runs), experiment="spleen")
    with pytest.raises(RunError, match="id=nonsense not found"):
        read_run_json(embedded_store(runs), "nonsense", "report.json")
    with pytest.raises(ConfigError, match="is no place for MLflow"):
        list_runs("ftp://x")


def test_a_server_that_is_away_is_told_without_its_password() -> None:
    with pytest.raises(RunError) as caught:
        list_runs("http://user:secret@127.0.0.1:9")
    assert str(caught.value) == "http://127.0.0.1:9: no connection"


def test_what_was_not_sent_is_counted(tmp_path: Path) -> None:
    """Two facts of a fold, and its parent, whose server is away."""
    for name, parent in (("run", None), ("run/fold_0", "run")):
        with open_tracker(
            tmp_path / name,
            uri="http://127.0.0.1:9",
            experiment="e",
            run_name=name,
            tags={},
            on_warning=lambda _: None,
            parent=tmp_path / parent if parent else None,
        ) as tracker:
            tracker.metrics({"dice/mean": 0.25}, step=1)
            tracker.metrics({"dice/mean": 0.5, "loss": 2.0}, step=2)
    fold, run = list_folders(tmp_path)
    assert (fold.name, fold.unsent, fold.status, fold.metrics) == (
        "run/fold_0", 4, "finished", {"dice/mean": 0.5, "loss": 2.0}
    )  # fmt: skip
    assert (run.name, run.parent_id, fold.parent_id) == ("run", None, run.run_id)
    assert in_order([fold, run], "loss") == [run, fold]


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ("dice", ["b", "b fold 1", "b fold 0", "a", "c"]),  # a run without the value goes by its best fold
        ("minutes", ["c", "a", "b", "b fold 0", "b fold 1"]),
        ("name", ["a", "b", "b fold 0", "b fold 1", "c"]),
    ],
)
def test_folds_follow_their_run_in_every_order(sort: str, names: list[str]) -> None:
    def run(name: str, minutes: int, parent: str | None = None, **metrics: float) -> TrackedRun:
        return TrackedRun(name, name, "e", "finished", 0, 60_000 * minutes, parent, metrics, {})

    given = [
        run("c", 9, dice=math.nan),
        run("b fold 1", 1, "b", dice=0.9),
        run("a", 5, dice=0.7),
        run("b fold 0", 2, "b", dice=0.6),
        run("b", 3),
    ]
    assert [found.name for found in in_order(given, sort)] == names


class TestCommands:
    def test_runs_sorts_by_a_metric_with_folds_below_their_run(self, runs: Path) -> None:
        done = CliRunner().invoke(app, ["runs", "--runs", str(runs), "--sort", "out_of_fold_dice/mean"])
        assert done.exit_code == 0
        lines = done.output.splitlines()[2:5]
        assert [line.split()[0] for line in lines] == ["second", "first", "first/fold_0"]
        assert lines[2].startswith("  first/fold_0")

    def test_a_metric_that_nobody_has_is_told(self, runs: Path) -> None:
        done = CliRunner().invoke(app, ["runs", "--runs", str(runs), "--sort", "dise"])
        assert isinstance(done.exception, ConfigError)
        assert str(done.exception) == (
            "--sort dise: no run has that metric; there are minutes, name, started, out_of_fold_dice/mean"
        )

    def test_a_column_that_would_be_empty_is_refused(self, runs: Path) -> None:
        command = ["runs", "--runs", str(runs), "--metric", "out_of_fold_dice/mean"]
        assert CliRunner().invoke(app, command).exit_code == 0
        done = CliRunner().invoke(app, [*command, "--metric", "dise"])
        assert isinstance(done.exception, ConfigError)
        assert str(done.exception) == "--metric dise: no run has that metric; there are out_of_fold_dice/mean"

    @pytest.mark.parametrize("words", [["runs"], ["compare", "FIRST", "FIRST"]])
    def test_a_folder_of_runs_that_was_named_is_there(self, runs: Path, tmp_path: Path, words: list[str]) -> None:
        given = [str(runs / "first") if word == "FIRST" else word for word in words]
        done = CliRunner().invoke(app, [*given, "--runs", str(tmp_path / "gone")])
        assert isinstance(done.exception, RunError)
        assert str(done.exception).startswith(f"--runs {tmp_path / 'gone'}: no such folder; expected the folder")

    def test_run_folders_know_the_same_without_mlflow(self, runs: Path, tmp_path: Path) -> None:
        told = {}
        for folder, options in ((runs, []), (runs, ["--offline"])):
            arguments = ["runs", "--runs", str(folder), "--experiment", "liver", *options]
            done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
            assert done.exit_code == 0
            told[bool(options)] = [line.split() for line in done.output.splitlines()[2:]]
        assert told[True] == told[False]
        assert len(told[True]) == 3
        done = CliRunner().invoke(app, ["runs", "--runs", str(tmp_path), "--offline"])
        assert "no run folder with a tracking.jsonl" in str(done.exception)

    def test_compare_takes_folders_and_runs_of_mlflow(self, runs: Path, tmp_path: Path) -> None:
        first = next(run for run in list_runs(embedded_store(runs)) if run.name == "first")
        target = tmp_path / "comparison.json"
        arguments = ["compare", f"runs:/{first.run_id}", str(runs / "second"), "--runs", str(runs), "--json"]
        done = CliRunner().invoke(app, [*arguments, str(target)])
        assert done.exit_code == 0
        assert done.output.splitlines()[-1].startswith("mean of labels: B is better by 0.04")
        assert json.loads(target.read_text())["overall"]["wins"] == 8

    def test_report_writes_the_page_of_a_run(self, runs: Path) -> None:
        done = CliRunner().invoke(app, ["report", str(runs / "second")])
        assert done.exit_code == 0
        assert "<h1>second</h1>" in (runs / "second" / "report.html").read_text()

    def test_a_folder_without_a_report_is_told(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["compare", str(tmp_path), str(tmp_path)])
        assert isinstance(done.exception, RunError)
        assert "no report of an evaluation there" in str(done.exception)
