"""What MLflow knows of runs that were tracked: a list of them, and the files of one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError, VolsegError
from pipeline.tracking.store_uri import checked_uri, database_path, is_embedded, without_password

MOST_RUNS = 5000
"""Runs that are asked for at most; MLflow hands out a thousand at a time."""

_PAGE = 1000


@dataclass(frozen=True)
class TrackedRun:
    """One run. Times are milliseconds since 1970; `parent_id` is that of the cross-validation that it is a fold of.

    `models` are its versions in the registry, as `NAME@ALIAS` or `NAME v2`. `unsent` counts what its folder has not
    told MLflow yet, where the folder was asked.
    """

    run_id: str
    name: str
    experiment: str
    status: str
    started_ms: int
    ended_ms: int | None
    parent_id: str | None
    metrics: dict[str, float]
    tags: dict[str, str]
    models: tuple[str, ...] = ()
    unsent: int = 0

    @property
    def minutes(self) -> float | None:
        """How long it took, or None while it is not over."""
        return None if self.ended_ms is None else (self.ended_ms - self.started_ms) / 60_000


def list_runs(uri: str, *, experiment: str | None = None) -> list[TrackedRun]:
    """All runs of a store or server that were not deleted, newest first.

    Raises:
        ConfigError: `uri` is neither a server's address nor an SQLite store.
        RunError: there is no store, it cannot be reached, or it has no such experiment.
    """
    with open_client(uri) as client:
        experiments = {e.experiment_id: e.name for e in client.search_experiments()}
        if experiment is not None:
            experiments = {i: name for i, name in experiments.items() if name == experiment}
            if not experiments:
                raise RunError(f"{without_password(uri)}: has no experiment named '{experiment}'")
        found: list[Any] = []
        token = None
        while len(found) < MOST_RUNS:
            page = client.search_runs(
                list(experiments), order_by=["attributes.start_time DESC"], max_results=_PAGE, page_token=token
            )
            found += page
            token = page.token
            if not token:
                break
        models = _models(client)
    return [_tracked(run, experiments, models.get(run.info.run_id, ())) for run in found]


def read_run_json(uri: str, run_id: str, name: str) -> dict[str, Any]:
    """A JSON file among a run's artifacts.

    Raises:
        ConfigError: see `list_runs`.
        RunError: no such run, it has no such file, or the store cannot be reached.
    """
    with open_client(uri) as client:
        return read_json_of(client, run_id, name)


def read_json_of(client: Any, run_id: str, name: str) -> dict[str, Any]:
    """As `read_run_json`, with a client at hand."""
    files = {file.path for file in client.list_artifacts(run_id)}
    if name not in files:
        raise RunError(f"run {run_id} has no {name}; give a run that was evaluated")
    with tempfile.TemporaryDirectory(prefix="volseg-") as folder:
        value = json.loads(Path(client.download_artifacts(run_id, name, folder)).read_bytes())
    if not isinstance(value, dict):
        raise RunError(f"{name} of run {run_id} is not what volseg writes")
    return value


@contextmanager
def open_client(uri: str) -> Iterator[Any]:
    """A client whose every failure is one line."""
    uri = checked_uri(uri)
    if is_embedded(uri) and not database_path(uri).is_file():
        raise RunError(f"{database_path(uri)}: no runs are tracked there; give --uri, or the folder of the runs")
    from pipeline.tracking.connection import connect, reason_of, settle_mlflow

    settle_mlflow()
    try:
        yield connect(uri)
    except VolsegError:
        raise
    # MLflow lets through whatever its database, HTTP and file layers raise.
    except Exception as error:
        raise RunError(f"{without_password(uri)}: {reason_of(error).replace(uri, without_password(uri))}") from error


def _models(client: Any) -> dict[str, tuple[str, ...]]:
    """Versions in the registry by the id of the run that made them, newest first; aliases name a version."""
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in client.search_registered_models(max_results=_PAGE):
        for alias, number in model.aliases.items():
            aliases.setdefault((model.name, str(number)), []).append(f"{model.name}@{alias}")
    found: dict[str, tuple[str, ...]] = {}
    for version in client.search_model_versions(max_results=_PAGE):
        names = aliases.get((version.name, str(version.version)), [f"{version.name} v{version.version}"])
        found[version.run_id] = (*found.get(version.run_id, ()), *names)
    return found


def _tracked(run: Any, experiments: dict[str, str], models: tuple[str, ...]) -> TrackedRun:
    tags = dict(run.data.tags)
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        experiment=experiments[run.info.experiment_id],
        status=str(run.info.status).lower(),
        started_ms=int(run.info.start_time),
        ended_ms=None if run.info.end_time is None else int(run.info.end_time),
        parent_id=tags.get("mlflow.parentRunId"),
        metrics=dict(run.data.metrics),
        tags={key: value for key, value in tags.items() if not key.startswith("mlflow.")},
        models=models,
    )
