"""MLflow as a destination of a run's facts. Every step may be repeated: what is there already stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from requests import HTTPError

from pipeline.files import safe_name
from pipeline.tracking.connection import connect, reason_of
from pipeline.tracking.delivery import Refused, Unreachable, Waiting, read_sent
from pipeline.tracking.journal import Fact, read_facts
from pipeline.tracking.logged_model import log_model
from pipeline.tracking.store_uri import artifacts_folder, is_embedded, without_password
from pipeline.tracking.texts import as_key, shortened

_RUN_TAG = "volseg.run"

# A little below what MLflow takes (mlflow.utils.validation).
_MOST_PARAM = 6000
_MOST_TAG = 5000
_MOST_DIGEST = 36

Ids = Mapping[str, str]


class MlflowStore:
    """A server or an SQLite store; `send_parent` sends what is left over of another run folder."""

    def __init__(self, uri: str, run_folder: Path, send_parent: Callable[[Path], None]) -> None:
        self.name = without_password(uri)
        self._uri = uri
        self._run_folder = run_folder
        self._send_parent = send_parent
        self._connected: MlflowClient | None = None
        self._steps: dict[str, Callable[[MlflowClient, Ids, Fact], None]] = {
            "resume": _resume,
            "params": _params,
            "tags": _tags,
            "dataset": _dataset,
            "artifact": self._artifact,
            "model": self._model,
            "note": _note,
            "end": _end,
        }

    def send(self, facts: Sequence[Fact], ids: Ids) -> Ids:
        """See `pipeline.tracking.delivery.Destination`."""
        with self._plain_errors():
            client = self._connected = self._connected or connect(self._uri)
            if facts[0].kind == "start":
                return self._start(client, facts[0])
            if facts[0].kind == "metrics":
                _metrics(client, ids, facts)
            else:
                self._steps[facts[0].kind](client, ids, facts[0])
        return ids

    def _start(self, client: MlflowClient, fact: Fact) -> Ids:
        body = fact.body
        experiment_id = _experiment_id(client, body["experiment"], self._uri)
        # A kill may have come between the creation of the run and the note of it.
        for run in client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{body['key']}'", max_results=1):
            return {"experiment": experiment_id, "run": run.info.run_id}
        tags = _run_tags(body["tags"]) | {_RUN_TAG: body["key"]}
        parent_id = self._parent_id(body["parent"]) if body["parent"] else None
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        run = client.create_run(experiment_id, fact.time_ms, tags, body["run_name"])
        return {"experiment": experiment_id, "run": run.info.run_id}

    def _parent_id(self, parent: str) -> str | None:
        """None where the parent was never tracked."""
        folder = (self._run_folder / parent).resolve()
        facts = read_facts(folder)
        if not facts:
            return None
        sent = read_sent(folder, destination=self.name, key=facts[0].body["key"])
        if not sent.ids:
            self._send_parent(folder)
            sent = read_sent(folder, destination=self.name, key=facts[0].body["key"])
        if not sent.ids:
            raise Waiting(f"{folder} has not reached {self.name} yet")
        return sent.ids["run"]

    def _artifact(self, client: MlflowClient, ids: Ids, fact: Fact) -> None:
        path = self._run_folder / fact.body["path"]
        folder = fact.body["folder"] or None
        if not path.exists():
            raise Refused(f"{path} is gone")
        if path.is_dir():
            client.log_artifacts(ids["run"], str(path), folder)
        else:
            client.log_artifact(ids["run"], str(path), folder)

    def _model(self, client: MlflowClient, ids: Ids, fact: Fact) -> None:
        log_model(client, ids, fact, run_folder=self._run_folder)

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except (Refused, Unreachable, Waiting):
            raise
        # MLflow lets through whatever its database, HTTP and file layers raise; none of it may end a training.
        except Exception as error:
            self._connected = None
            reason = reason_of(error).replace(self._uri, self.name)
            raise (Refused if _is_final(error) else Unreachable)(reason) from error


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (artifacts_folder(uri) / safe_name(name)).as_uri() if is_embedded(uri) else None
        # The page then has its views for training in front, not those for language models.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, location, tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment_id(client, name, uri)
    if experiment.lifecycle_stage == "deleted":
        raise Unreachable(f"its experiment '{name}' is deleted; restore it there, or set tracking.experiment")
    return str(experiment.experiment_id)


def _resume(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    client.update_run(ids["run"], status="RUNNING")
    _tags(client, ids, fact)


def _params(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    values = fact.body["values"].items()
    client.log_batch(ids["run"], params=[Param(as_key(key), shortened(value, _MOST_PARAM)) for key, value in values])


def _tags(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    tags = _run_tags(fact.body["tags"]).items()
    client.log_batch(ids["run"], tags=[RunTag(key, value) for key, value in tags])


def _metrics(client: MlflowClient, ids: Ids, facts: Sequence[Fact]) -> None:
    points = [
        Metric(as_key(key), float(value), fact.time_ms, fact.body["step"])
        for fact in facts
        for key, value in fact.body["values"].items()
    ]
    client.log_batch(ids["run"], metrics=points)


def _dataset(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    body = fact.body
    dataset = Dataset(
        name=body["name"],
        digest=body["digest"][:_MOST_DIGEST],
        source_type="manifest",
        source=json.dumps({"source": body["source"]}, ensure_ascii=False),
        profile=json.dumps({"cases": body["cases"], "digest": body["digest"]}),
    )
    context = InputTag("mlflow.data.context", body["context"])
    client.log_inputs(ids["run"], datasets=[DatasetInput(dataset, [context])])


def _note(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    place = f"#/experiments/{ids['experiment']}/runs/{ids['run']}/artifacts/"
    text = fact.body["markdown"].replace("](artifact:", f"]({place}")
    client.set_tag(ids["run"], MLFLOW_RUN_NOTE, shortened(text, _MOST_TAG))


def _end(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    client.set_terminated(ids["run"], fact.body["status"], fact.time_ms)


def _run_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The run's tags, with those that MLflow's page shows as its source."""
    told = {as_key(key): shortened(value, _MOST_TAG) for key, value in tags.items()}
    told |= {"mlflow.source.name": "volseg", "mlflow.source.type": "LOCAL"}
    if "git_commit" in told:
        told["mlflow.source.git.commit"] = told["git_commit"]
    return told


def _is_final(error: Exception) -> bool:
    """Whether the same request would fail every time."""
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in {400, 413, 415, 422}
    return isinstance(error, MlflowException) and error.error_code in {"INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND"}
