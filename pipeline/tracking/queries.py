"""What MLflow knows of runs that were tracked: a list of them, and the files of one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.tracking.store_uri import checked_uri, database_path, is_embedded, without_password

MOST_RUNS = 5000
"""Runs that are asked for at most; MLflow hands out a thousand at a time."""

_PAGE = 1000


@dataclass(frozen=True)
class TrackedRun:
    """One run. Times are milliseconds since 1970; `parent_id` is that of the cross-validation that it is a fold of."""

    run_id: str
    name: str
    experiment: str
    status: str
    started_ms: int
    ended_ms: int | None
    parent_id: str | None
    metrics: dict[str, float]
    tags: dict[str, str]

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
    with _client(uri) as client:
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
    return [_tracked(run, experiments) for run in found]


def read_run_json(uri: str, run_id: str, name: str) -> dict[str, Any]:
    """A JSON file among a run's artifacts.

    Raises:
        ConfigError: see `list_runs`.
        RunError: no such run, it has no such file, or the store cannot be reached.
    """
    with _client(uri) as client, tempfile.TemporaryDirectory(prefix="volseg-") as folder:
        files = {file.path for file in client.list_artifacts(run_id)}
        if name not in files:
            raise RunError(f"run {run_id} has no {name}; give a run that was evaluated")
        value = json.loads(Path(client.download_artifacts(run_id, name, folder)).read_bytes())
    if not isinstance(value, dict):
        raise RunError(f"{name} of run {run_id} is not what volseg writes")
    return value


@contextmanager
def _client(uri: str) -> Iterator[Any]:
    """A client whose every failure is one line."""
    uri = checked_uri(uri)
    if is_embedded(uri) and not database_path(uri).is_file():
        raise RunError(f"{database_path(uri)}: no runs are tracked there; give --uri, or the folder of the runs")
    from pipeline.tracking.connection import connect, reason_of, settle_mlflow

    settle_mlflow()
    try:
        yield connect(uri)
    except RunError:
        raise
    # MLflow lets through whatever its database, HTTP and file layers raise.
    except Exception as error:
        raise RunError(f"{without_password(uri)}: {reason_of(error).replace(uri, without_password(uri))}") from error


def _tracked(run: Any, experiments: dict[str, str]) -> TrackedRun:
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
    )
