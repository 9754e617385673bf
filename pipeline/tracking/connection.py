"""MLflow's client, made quiet and quick to give up, and its errors in one line."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing

from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow import environment_variables as settings
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.telemetry import set_telemetry_client
from requests import ConnectionError as NoConnection
from requests import HTTPError, Timeout

from pipeline.tracking.store_uri import artifacts_folder, database_path, is_embedded
from pipeline.tracking.texts import shortened

_REQUEST_SECONDS = 10
_MOST_REASON = 200
_STATUS = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}
_ADVICE = {
    401: "the server does not take the user name and password, or was given none; set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, or write them into ~/.mlflow/credentials",
    403: "the server knows this user and does not allow it; ask whoever runs it",
}


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


def connect(uri: str) -> MlflowClient:
    """A client of a server or an SQLite store, whose tables are made where they are missing."""
    if is_embedded(uri):
        _create_tables(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Timeout):
            return f"no answer within {_REQUEST_SECONDS} s"
        if isinstance(cause, NoConnection):
            return "no connection"
        refused = _refused_as(cause)
        if refused is not None:
            return refused
        cause = cause.__cause__ or cause.__context__
    return shortened(" ".join(str(error).split()) or type(error).__name__, _MOST_REASON)


def _refused_as(error: BaseException) -> str | None:
    """Of a server that wants to know who asks: what to do about it. None for any other error."""
    status: int | None = None
    if isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    elif isinstance(error, MlflowException):
        status = _STATUS.get(error.error_code)
    return _ADVICE.get(status or 0)


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
