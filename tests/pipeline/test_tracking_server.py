"""Runs, their models and `volseg promote` on a real MLflow server that asks for a user name and a password."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.errors import RunError
from pipeline.tracking import ModelCard, deliver, open_tracker

from .mlflow_server import free_port, gate, serving
from .test_promote import report

pytestmark = [
    pytest.mark.slow,  # the server needs several seconds to start
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow.*"),
]

USER, PASSWORD = "reader", "open sesame"
RIGHT = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
WRONG = RIGHT | {"MLFLOW_TRACKING_PASSWORD": "let me in"}
TOLD = (
    "the server does not take the user name and password, or was given none; set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, or write them into ~/.mlflow/credentials"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with two runs that nobody has been told of, and the address of a guarded server."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "server").mkdir()
    port = free_port()
    for name, gain in (("first", 0.0), ("second", 0.05)):
        run = folder / "runs" / name
        (run / "bundle").mkdir(parents=True)
        (run / "bundle" / "bundle.json").write_text(name)
        (run / "report.json").write_text(json.dumps(report(gain, spread=0.01)))
        with open_tracker(
            run,
            uri="http://127.0.0.1:9",
            experiment="e",
            run_name=name,
            tags={"dataset": "liver", "dataset_sha256": "same"},
            on_warning=lambda _: None,
        ) as tracker:
            tracker.metrics({"out_of_fold_dice/mean": 0.5 + gain}, step=0)
            tracker.artifact(run / "report.json")
            tracker.model([run / "bundle"], ModelCard((8,) * 3, (1.0,) * 3, ("CT",), ("liver",), register_as="liver"))
    with serving(folder / "server", port), gate(port, USER, PASSWORD) as guarded:
        yield folder / "runs", f"127.0.0.1:{guarded}"


def command(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200", **environment})


def test_right_and_wrong_passwords_and_none(place: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs, host = place
    uri = f"http://{host}"
    for environment in ({}, WRONG):
        done = command("runs", "--uri", uri, **environment)
        assert isinstance(done.exception, RunError)
        assert str(done.exception) == f"{uri}: {TOLD}"
    done = command("runs", "--uri", f"http://{USER}:guessed@{host}")
    assert str(done.exception) == f"{uri}: {TOLD}"
    for variable, value in WRONG.items():
        monkeypatch.setenv(variable, value)
    warned: list[str] = []
    assert deliver(runs / "first", uri=uri, on_warning=warned.append) > 0
    assert f"({TOLD})" in warned[0]

    for variable, value in RIGHT.items():
        monkeypatch.setenv(variable, value)
    assert deliver(runs / "first", uri=uri, on_warning=warned.append) == 0
    assert len(warned) == 1
    done = command("runs", "--uri", uri)
    assert done.exit_code == 0
    assert "liver v1" in done.output
    written = "".join(path.read_text() for path in (runs / "first").iterdir() if path.is_file())
    assert not any(secret in written + done.output for secret in (PASSWORD, "let me in"))


def test_promote_and_the_address_with_a_password(place: tuple[Path, str]) -> None:
    """What has not been sent yet is sent first; `test_right_and_wrong_passwords_and_none` need not come before."""
    runs, host = place
    uri = f"http://{USER}:{PASSWORD.replace(' ', '%20')}@{host}"
    done = command("promote", str(runs / "first"), "--uri", uri)
    assert done.exit_code == 0, done.exception
    assert done.output.startswith("champion of liver is version 1 (run first)")
    done = command("promote", str(runs / "second"), "--if-better", "--uri", uri)
    assert done.exit_code == 0, done.exception
    assert "is version 2 (run second), moved from version 1 (run first): Dice 0.5950 against 0.5450" in done.output
    done = command("runs", "--uri", uri, "--sort", "out_of_fold_dice/mean")
    assert [line.split()[0] for line in done.output.splitlines()[2:4]] == ["second", "first"]
    assert "liver@champion" in done.output
    assert PASSWORD not in done.output
    written = "".join(path.read_text() for path in (runs / "second").iterdir() if path.is_file())
    assert PASSWORD not in written
    assert "%20" not in written


def test_the_model_is_fetched_from_the_server(place: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    for variable, value in RIGHT.items():
        monkeypatch.setenv(variable, value)
    runs, host = place
    uri = f"http://{host}"
    assert command("promote", str(runs / "second"), "--uri", uri).exit_code == 0
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_model_version_by_alias("liver", "champion")
    files = client.list_logged_model_artifacts(found.source.removeprefix("models:/"))
    assert {file.path for file in files} >= {"MLmodel", "model", "input_example.json", "requirements.txt"}
