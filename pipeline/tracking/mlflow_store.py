"""MLflow as a destination of a run's facts. Every step may be repeated: what is there already stays as it is."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow import environment_variables as settings
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.models import Model, ModelSignature
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.telemetry import set_telemetry_client
from mlflow.types import Schema, TensorSpec
from requests import ConnectionError as NoConnection
from requests import HTTPError, Timeout

from pipeline.files import safe_name
from pipeline.tracking.delivery import Refused, Unreachable, Waiting, read_sent
from pipeline.tracking.journal import Fact, read_facts
from pipeline.tracking.store_uri import artifacts_folder, database_path, is_embedded, without_password

_REQUEST_SECONDS = 10
_RUN_TAG = "volseg.run"
_BUNDLE_TAG = "volseg.bundle_sha256"

# A little below what MLflow takes (mlflow.utils.validation).
_MOST_KEY = 250
_MOST_PARAM = 6000
_MOST_TAG = 5000
_MOST_DIGEST = 36

Ids = Mapping[str, str]


def settle_mlflow() -> None:
    """Keep MLflow quiet, quick to give up, and silent towards its makers, in this process."""
    # The telemetry client is made by the import, and has had nothing to send yet.
    settings.MLFLOW_DISABLE_TELEMETRY.set(True)
    set_telemetry_client()
    wishes = (
        (settings.MLFLOW_HTTP_REQUEST_TIMEOUT, _REQUEST_SECONDS),
        (settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0),
        (settings.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR, False),
        (settings.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
    )
    for setting, value in wishes:
        # What the user set in the environment goes first.
        if not setting.defined:
            setting.set(value)
    # It reports the creation of its tables, and each error in full before it raises it.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


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
        bundle = self._run_folder / fact.body["path"]
        if not bundle.is_dir():
            raise Refused(f"{bundle} is gone")
        model_id = _model_id(client, ids, fact)
        with tempfile.TemporaryDirectory(prefix="volseg-model-") as name:
            folder = Path(name)
            shutil.copytree(bundle, folder / "bundle")
            (folder / "requirements.txt").write_text(f"volseg=={version('volseg')}\n", encoding="utf-8")
            _mlmodel(model_id, ids, fact).save(str(folder / "MLmodel"))
            client.log_model_artifacts(model_id, str(folder))
        client.finalize_logged_model(model_id, "READY")
        # MLflow fails where the two are tied together already.
        outputs = client.get_run(ids["run"]).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            client.log_outputs(ids["run"], [LoggedModelOutput(model_id, step=0)])

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


def connect(uri: str) -> MlflowClient:
    """A client of a server or an SQLite store, whose tables are made where they are missing."""
    if is_embedded(uri):
        _create_tables(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_tables(uri: str) -> None:
    """Create an SQLite store (seconds) where there is none yet."""
    database = database_path(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create the tables at once would trip over each other.
    with FileLock(database.with_name(f".{database.name}.lock")):
        # MLflow itself goes on trying for minutes where a database cannot be opened.
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA schema_version")
        SqlAlchemyStore(uri, artifacts_folder(uri).as_uri())


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
    client.log_batch(ids["run"], params=[Param(_name(key), _cut(value, _MOST_PARAM)) for key, value in values])


def _tags(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    tags = _run_tags(fact.body["tags"]).items()
    client.log_batch(ids["run"], tags=[RunTag(key, value) for key, value in tags])


def _metrics(client: MlflowClient, ids: Ids, facts: Sequence[Fact]) -> None:
    points = [
        Metric(_name(key), float(value), fact.time_ms, fact.body["step"])
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


def _end(client: MlflowClient, ids: Ids, fact: Fact) -> None:
    client.set_terminated(ids["run"], fact.body["status"], fact.time_ms)


def _model_id(client: MlflowClient, ids: Ids, fact: Fact) -> str:
    for model in client.search_logged_models([ids["experiment"]], f"source_run_id = '{ids['run']}'"):
        if model.tags.get(_BUNDLE_TAG) == fact.body["sha256"]:
            return str(model.model_id)
    model = client.create_logged_model(
        ids["experiment"],
        re.sub(r"[^\w -]", "_", fact.body["name"]),
        source_run_id=ids["run"],
        tags={_BUNDLE_TAG: fact.body["sha256"]},
        params={key: str(fact.body[key]) for key in ("patch_shape", "channel_count", "class_count")},
        model_type="segmentation",
    )
    return str(model.model_id)


def _mlmodel(model_id: str, ids: Ids, fact: Fact) -> Model:
    """Voxels (B, C, I, J, K) on the plan's grid in, label ids (B, I, J, K) out; nothing is pickled."""
    body = fact.body
    voxels = TensorSpec(np.dtype(np.float32), (-1, body["channel_count"], -1, -1, -1))
    label_map = TensorSpec(np.dtype(np.int32), (-1, -1, -1, -1))
    model = Model(
        run_id=ids["run"],
        signature=ModelSignature(Schema([voxels]), Schema([label_map])),
        metadata={key: body[key] for key in ("patch_shape", "channel_count", "class_count", "sha256")},
        model_id=model_id,
        model_uuid=model_id,
    )
    python = ".".join(str(part) for part in sys.version_info[:3])
    flavour = {"loader_module": "pipeline.mlflow_model", "data": "bundle", "python_version": python}
    return model.add_flavor("python_function", **flavour)


def _run_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The run's tags, with those that MLflow's page shows as its source."""
    told = {_name(key): _cut(value, _MOST_TAG) for key, value in tags.items()}
    told |= {"mlflow.source.name": "volseg", "mlflow.source.type": "LOCAL"}
    if "git_commit" in told:
        told["mlflow.source.git.commit"] = told["git_commit"]
    return told


def _name(text: str) -> str:
    """A key as MLflow takes it: letters, digits, space and `_-.`, in groups parted by slashes."""
    words = [re.sub(r"[^\w\-. ]", "_", word).strip(". ") for word in text.split("/")]
    return _cut("/".join(word for word in words if word) or "_", _MOST_KEY)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    note = f"... ({len(text)} characters)"
    return text[: most - len(note)] + note


def _is_final(error: Exception) -> bool:
    """Whether the same request would fail every time."""
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in {400, 413, 415, 422}
    return isinstance(error, MlflowException) and error.error_code in {"INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND"}


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Timeout):
            return f"no answer within {_REQUEST_SECONDS} s"
        if isinstance(cause, NoConnection):
            return "no connection"
        cause = cause.__cause__ or cause.__context__
    return _cut(" ".join(str(error).split()) or type(error).__name__, 200)
