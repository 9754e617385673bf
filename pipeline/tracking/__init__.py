"""Runs in MLflow: what was trained, on what, with which result. The only room that knows MLflow.

Every fact goes to a journal in the run folder first and to MLflow from a thread, so that a server that is slow,
away or broken costs a run nothing, and a kill loses nothing.
"""

from __future__ import annotations

import os
import shlex
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.errors import RunError
from pipeline.tracking.delivery import Deliverer, Destination, read_sent
from pipeline.tracking.journal import Busy, Journal, read_facts
from pipeline.tracking.store_uri import checked_uri, is_embedded, sqlite_uri, without_password
from pipeline.tracking.tracker import JournalTracker, ModelCard, Status, Tracker, discreet, discreet_text, null_tracker

__all__ = [
    "Busy",
    "ModelCard",
    "Status",
    "Tracker",
    "amend_tracker",
    "deliver",
    "discreet_text",
    "embedded_store",
    "null_tracker",
    "open_tracker",
    "page_address",
    "page_command",
    "tracked_as",
    "without_password",
]


def open_tracker(
    run_folder: Path,
    *,
    uri: str,
    experiment: str,
    run_name: str,
    tags: Mapping[str, str],
    on_warning: Callable[[str], None],
    parent: Path | None = None,
) -> Tracker:
    """Start to track a run, or go on with the one that `run_folder` began.

    `parent` is the folder of the run that this one is a part of. `on_warning` gets one line when deliveries begin to
    fail (from another thread) and one for what is left over in the end.

    Raises:
        ConfigError: `uri` is neither a server's address nor an SQLite store.
        RunError: the run folder cannot be written, is being tracked already, or has a damaged journal.
    """
    destination = _destination(checked_uri(uri), run_folder)
    journal = Journal(run_folder)
    if journal.facts:
        journal.append("resume", {"tags": discreet(tags)})
    else:
        start = {
            "key": uuid.uuid4().hex,
            "store": destination.name,
            "experiment": experiment,
            "run_name": run_name,
            "parent": parent and Path(os.path.relpath(parent, run_folder)).as_posix(),
            "tags": discreet(tags),
        }
        journal.append("start", start)
    deliverer = Deliverer(journal, destination, on_warning)
    deliverer.start()
    # The folds of a run tell of the machine, each for its own time; their parent would say it all again.
    return JournalTracker(journal, deliverer, samples_machine=parent is not None)


def amend_tracker(run_folder: Path, *, uri: str, on_warning: Callable[[str], None]) -> Tracker:
    """Tell more of a run that is over, whose tags, status and times stay as they are.

    Of one that was never tracked nothing is told. `on_warning` is as in `open_tracker`.

    Raises:
        ConfigError: `uri` is neither a server's address nor an SQLite store.
        RunError: the run folder cannot be written, is being tracked already, or has a damaged journal.
    """
    place = checked_uri(uri)
    if not read_facts(run_folder):
        return null_tracker()
    destination = _destination(place, run_folder)
    journal = Journal(run_folder)
    deliverer = Deliverer(journal, destination, on_warning)
    deliverer.start()
    return JournalTracker(journal, deliverer)


def deliver(run_folder: Path, *, on_warning: Callable[[str], None], uri: str | None = None) -> int:
    """Send what a run that is over left unsent; gives the number of facts that are unsent still.

    Without `uri` it is sent to where the run began, which does not do where the address holds a password. A run that
    is being tracked at the moment sends for itself and is left alone.

    Raises:
        ConfigError: `uri` is neither a server's address nor an SQLite store.
        RunError: the journal is damaged or the run folder cannot be written.
    """
    return _send(run_folder, uri, on_warning)[0]


def _send(run_folder: Path, uri: str | None, on_warning: Callable[[str], None]) -> tuple[int, str]:
    """What is unsent still, and why."""
    facts = read_facts(run_folder)
    if not facts:
        return 0, ""
    uri = checked_uri(uri or facts[0].body["store"])
    sent = read_sent(run_folder, destination=without_password(uri), key=facts[0].body["key"])
    if sent.number == len(facts):
        return 0, ""
    try:
        journal = Journal(run_folder)
    except Busy as error:
        return len(facts) - sent.number, str(error)
    try:
        deliverer = Deliverer(journal, _destination(uri, run_folder), on_warning)
        deliverer.attempt()
        return deliverer.pending, deliverer.fault
    finally:
        journal.release()


def tracked_as(run_folder: Path, *, uri: str | None = None) -> tuple[str, str]:
    """Store and id of the run that a folder holds, after it was sent what it did not have yet.

    Raises:
        ConfigError: `uri` is neither a server's address nor an SQLite store.
        RunError: the run was never tracked, or has not reached the store.
    """
    facts = read_facts(run_folder)
    if not facts:
        raise RunError(f"{run_folder}: was not tracked (tracking.enabled), so MLflow knows nothing of it")
    place = checked_uri(uri or facts[0].body["store"])
    left, fault = _send(run_folder, place, lambda _: None)
    sent = read_sent(run_folder, destination=without_password(place), key=facts[0].body["key"])
    if left or not sent.ids:
        reason = fault or "its parent run is not there yet"
        raise RunError(
            f"{run_folder}: {left} of {len(facts)} entries of its journal have not reached {sent.destination}: {reason}"
        )
    return place, sent.ids["run"]


def embedded_store(runs_folder: Path) -> str:
    """URI of the SQLite store in the folder of the runs; it needs no server."""
    return sqlite_uri(runs_folder / "mlflow.db")


def page_command(uri: str) -> str:
    """What opens MLflow's page: the command that serves an SQLite store at `page_address`, or the server's address."""
    if not is_embedded(uri):
        return page_address(uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", checked_uri(uri)]
    return "MLFLOW_DISABLE_TELEMETRY=true " + shlex.join(command)


def page_address(uri: str) -> str:
    """Where a browser finds the experiments, in the view for training (MLflow's first is for language models)."""
    server = "http://127.0.0.1:5000" if is_embedded(uri) else without_password(checked_uri(uri))
    return f"{server}/#/experiments?workflowType=machine_learning"


def _destination(uri: str, run_folder: Path) -> Destination:
    """Imports MLflow (seconds, the first time), here and not in the thread: a fork during an import is not safe."""
    with warnings.catch_warnings():
        # SQLAlchemy's, about how MLflow's tables are written.
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
        from pipeline.tracking.connection import settle_mlflow
        from pipeline.tracking.mlflow_store import MlflowStore
    settle_mlflow()

    def send_parent(folder: Path) -> None:
        # Whoever tracked the parent has been warned already.
        deliver(folder, uri=uri, on_warning=lambda _: None)

    return MlflowStore(uri, run_folder, send_parent)
