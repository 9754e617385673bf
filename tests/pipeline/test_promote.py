"""`volseg promote` in MLflow's real registry: an SQLite store with runs whose Dice is known case by case."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.config import EvaluateConfig
from pipeline.errors import RunError
from pipeline.promote import Promotion, promote
from pipeline.report_values import CaseScores, LabelScore
from pipeline.summary import summarise
from pipeline.tracking import ModelCard, embedded_store, open_tracker
from pipeline.tracking.registry import open_registry

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

CARD = ModelCard((8, 8, 8), (1.0, 1.0, 1.0), ("T1 (MR)",), ("liver",), register_as="liver")
CASES = 10


@dataclass(frozen=True)
class World:
    """A folder of runs; `ids` are those in MLflow by name."""

    runs: Path
    ids: dict[str, str]

    @property
    def uri(self) -> str:
        return embedded_store(self.runs)

    def promote(self, name: str, *, if_better: bool = True, alias: str = "champion") -> Promotion:
        with open_registry(self.uri) as registry:
            return promote(registry, self.ids[name], alias=alias, model=None, if_better=if_better)

    def champion(self) -> str | None:
        with open_registry(self.uri) as registry:
            found = registry.aliased("liver", "champion")
        return None if found is None else found.run_name


def report(gain: float, *, spread: float = 0.0, cases: int = CASES) -> dict[str, Any]:
    """Dice 0.50, 0.51, ... plus `gain`, with `spread` added to and taken from every other case."""
    scores = [
        CaseScores(case_id=f"case_{n}", patient_id=f"case_{n}", labels=(_score(0.5 + 0.01 * n + gain + sign * spread),))
        for n in range(cases)
        for sign in [1 if n % 2 else -1]
    ]
    return summarise(scores, settings=EvaluateConfig(bootstrap_samples=200)).to_json()


def _score(dice: float) -> LabelScore:
    return LabelScore(label="liver", status="scored", dice=dice, prediction_mm3=1.0, reference_mm3=1.0)


RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": (report(0.0), "same"),
    "better": (report(0.05, spread=0.01), "same"),
    "worse": (report(-0.05, spread=0.01), "same"),
    "alike": (report(0.001, spread=0.02), "same"),
    "fewer cases": (report(0.1, cases=8), "same"),
    "other references": (report(0.1), "redrawn"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    runs = tmp_path_factory.mktemp("runs")
    ids = {}
    for name, (scores, dataset) in RUNS.items():
        folder = runs / name
        (folder / "bundle").mkdir(parents=True)
        (folder / "bundle" / "bundle.json").write_text(name)
        (folder / "report.json").write_text(json.dumps(scores))
        warned: list[str] = []
        tags = {"dataset": "liver", "dataset_sha256": dataset}
        with open_tracker(
            folder, uri=embedded_store(runs), experiment="e", run_name=name, tags=tags, on_warning=warned.append
        ) as tracker:
            tracker.artifact(folder / "report.json")
            if name in ("plain", "better", "alike"):  # the others are registered when they are promoted
                tracker.model([folder / "bundle"], CARD)
            else:
                tracker.model([folder / "bundle"], ModelCard(*([()] * 4)))
        assert warned == []
        ids[name] = json.loads((folder / "tracking_sent.json").read_text())["ids"]["run"]
    return World(runs, ids)


@pytest.fixture
def world(made: World) -> World:
    """The champion is `plain`, moved there by nobody's leave."""
    made.promote("plain", if_better=False)
    return made


def numbers(world: World) -> set[int]:
    from mlflow import MlflowClient

    return {int(found.version) for found in MlflowClient(world.uri, world.uri).search_model_versions("name = 'liver'")}


def command(world: World, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["promote", *arguments, "--runs", str(world.runs)])


def test_the_first_champion_has_nothing_to_beat(made: World) -> None:
    outcome = made.promote("plain", alias="first")
    assert outcome.moved
    assert outcome.told == (
        "first of liver is version 1 (run plain); there was none before, so nothing to compare with"
    )


def test_a_better_one_takes_over_and_says_by_how_much(world: World) -> None:
    outcome = world.promote("better")
    assert outcome.moved
    assert world.champion() == "better"
    start = (
        "champion of liver is version 2 (run better), moved from version 1 (run plain): Dice 0.5950 against 0.5450, "
    )
    assert outcome.told.startswith(f"{start}+0.0500 (95 % +0.0")
    # Ten gains, all above 0: 2 of the 2**10 equally likely sign patterns are as extreme.
    assert outcome.told.endswith(f"p = {2 / 2**10:.2g}), over 10 cases")


@pytest.mark.parametrize(("name", "word"), [("worse", "is worse"), ("alike", "is not shown to be better")])
def test_one_that_is_not_better_does_not(world: World, name: str, word: str) -> None:
    outcome = world.promote(name)
    assert not outcome.moved
    assert world.champion() == "plain"
    assert outcome.told.startswith("champion of liver stays version 1 (run plain): version ")
    assert f"(run {name}) {word}: Dice 0." in outcome.told


def test_the_champion_stays_champion(world: World) -> None:
    outcome = world.promote("plain")
    assert outcome.told == "champion of liver is version 1 (run plain) already"
    assert not outcome.moved


def test_without_if_better_it_moves_and_names_the_one_before(world: World) -> None:
    outcome = world.promote("worse", if_better=False)
    assert world.champion() == "worse"
    assert outcome.told.endswith("(run worse), moved from version 1 (run plain) without a comparison")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fewer cases", "not scored on the cases of version 1 .run plain.: 8 are in both, 2 only there, 0 only here"),
        ("other references", "not scored on the cases and references of version 1 .*manifest redrawn against same"),
    ],
)
def test_other_cases_and_references_are_no_match(world: World, name: str, reason: str) -> None:
    before = numbers(world)
    with pytest.raises(RunError, match=reason):
        world.promote(name)
    assert world.champion() == "plain"
    assert numbers(world) == before


def test_the_reason_stays_with_the_version(world: World) -> None:
    from mlflow import MlflowClient

    told = world.promote("better").told
    client = MlflowClient(tracking_uri=world.uri, registry_uri=world.uri)
    assert client.get_model_version_by_alias("liver", "champion").tags["champion_because"] == told


class TestCommand:
    def test_a_folder_and_an_id_are_the_same(self, world: World) -> None:
        done = command(world, str(world.runs / "better"), "--if-better")
        assert done.exit_code == 0
        first, place, second = done.output.splitlines()
        assert place == f"in Python: mlflow.set_tracking_uri('{world.uri}')"
        assert first.startswith("champion of liver is version 2 (run better), moved from version 1")
        assert "mlflow.pyfunc.load_model('models:/liver@champion')" in second
        again = command(world, f"runs:/{world.ids['better']}", "--if-better")
        assert again.output.splitlines()[0] == "champion of liver is version 2 (run better) already"
        assert again.exit_code == 0

    def test_exit_code_1_when_it_stays(self, world: World) -> None:
        done = command(world, str(world.runs / "alike"), "--if-better")
        assert done.exit_code == 1
        assert done.output.startswith("champion of liver stays version 1")

    def test_runs_names_the_champion(self, world: World) -> None:
        done = CliRunner().invoke(app, ["runs", "--runs", str(world.runs)], env={"COLUMNS": "200"})
        assert done.exit_code == 0
        line = next(line for line in done.output.splitlines() if line.startswith("plain"))
        assert "liver@champion" in line

    def test_what_cannot_be_promoted_is_told(self, world: World, tmp_path: Path) -> None:
        for run, reason in (
            (str(tmp_path), "was not tracked"),
            ("nowhere", "neither a folder nor the id of a run"),
            ("0" * 32, "not found"),
        ):
            done = command(world, run)
            assert isinstance(done.exception, RunError)
            assert reason in str(done.exception)
            assert "\n" not in str(done.exception)

    def test_a_folder_of_runs_that_is_not_there_is_told_whatever_run_is(self, world: World, tmp_path: Path) -> None:
        for run in (str(world.runs / "better"), world.ids["better"], "nowhere"):
            done = CliRunner().invoke(app, ["promote", run, "--runs", str(tmp_path / "gone")])
            assert isinstance(done.exception, RunError)
            assert str(done.exception).startswith(f"--runs {tmp_path / 'gone'}: no such folder")
        assert world.champion() == "plain"

    def test_a_server_that_is_away_is_told_in_one_line(self, world: World) -> None:
        for run in (str(world.runs / "better"), world.ids["better"]):
            done = command(world, run, "--uri", "http://me:secret@127.0.0.1:9")
            assert isinstance(done.exception, RunError)
            assert "no connection" in str(done.exception)
            assert "secret" not in str(done.exception) + done.output
        assert world.champion() == "plain"

    def test_a_run_without_a_model_says_what_to_do(self, world: World) -> None:
        folder = world.runs / "bare"
        with open_tracker(
            folder, uri=world.uri, experiment="e", run_name="bare", tags={"dataset": "liver"}, on_warning=print
        ):
            pass
        done = command(world, str(folder))
        assert "run bare has no model" in str(done.exception)
