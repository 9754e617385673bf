"""What tracking does without MLflow: the journal on disk, addresses, the tracker that tells nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from pipeline.errors import ConfigError, RunError
from pipeline.tracking import embedded_store, null_tracker, open_tracker, page_address, page_command
from pipeline.tracking.delivery import Deliverer
from pipeline.tracking.journal import JOURNAL_NAME, Journal, read_facts
from pipeline.tracking.tracker import JournalTracker, discreet_text

ROOT = Path(__file__).parents[2]


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("start", {"key": "k"})
    journal.release()
    with (tmp_path / JOURNAL_NAME).open("ab") as stream:
        stream.write(b'{"number": 2, "time_ms": 17')
    journal = Journal(tmp_path)
    journal.append("end", {"status": "FINISHED"})
    journal.release()
    assert [(fact.number, fact.kind) for fact in read_facts(tmp_path)] == [(1, "start"), (2, "end")]


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"number": 7, "time_ms": 1, "kind": "end", "body": {}}\n'])
def test_a_damaged_journal_is_refused(tmp_path: Path, line: bytes) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(line)
    for _ in range(2):
        with pytest.raises(RunError, match=r"line 1 is (damaged|numbered 7)"):
            Journal(tmp_path)


def test_a_disk_that_was_full_leaves_no_half_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("start", {"key": "k"})
    with _longest_file(journal.path.stat().st_size + 20), pytest.raises(RunError, match="cannot write"):
        journal.append("tags", {"tags": {"note": "x" * 100}})
    journal.append("end", {"status": "FINISHED"})
    journal.release()
    assert [(fact.number, fact.kind) for fact in read_facts(tmp_path)] == [(1, "start"), (2, "end")]


def test_one_that_was_released_takes_nothing_and_cuts_nothing_off(tmp_path: Path) -> None:
    late = Journal(tmp_path)
    late.append("start", {"key": "k"})
    late.release()
    owner = Journal(tmp_path)
    owner.append("resume", {"tags": {}})
    with pytest.raises(RunError, match="was released"):
        late.append("metrics", {"step": 1, "values": {}})
    owner.release()
    assert [fact.kind for fact in read_facts(tmp_path)] == ["start", "resume"]


def test_the_home_folder_is_not_told_and_others_stay() -> None:
    home = Path.home()
    told = discreet_text(f"{home}, {home}/scan, file://{home} {home}er/scan /data{home}/scan")
    assert told == f"~, ~/scan, file://~ {home}er/scan /data{home}/scan"


class Nowhere:
    """A destination that is never asked."""

    def close(self, patience_s: float) -> None: ...


def test_metrics_wait_for_a_disk_that_is_full(tmp_path: Path) -> None:
    journal, deliverer = Journal(tmp_path), cast(Deliverer, Nowhere())
    journal.append("start", {"key": "k"})
    with JournalTracker(journal, deliverer) as tracker:
        with _longest_file(journal.path.stat().st_size + 20):
            tracker.metrics({"loss": 2.0}, step=10)
            tracker.metrics({"loss": 1.0}, step=20)
            with pytest.raises(RunError, match="cannot write"):
                tracker.params({"train.seed": "0"})
        tracker.metrics({"loss": 0.5}, step=30)
    journal.release()
    told = [(fact.number, fact.kind, fact.body.get("step")) for fact in read_facts(tmp_path)]
    assert told == [
        (1, "start", None),
        (2, "metrics", 10),
        (3, "metrics", 20),
        (4, "metrics", 30),
        (5, "end", None),
    ]


def test_what_stopped_a_run_is_told_and_not_that_its_end_could_not_be(tmp_path: Path) -> None:
    journal, deliverer = Journal(tmp_path), cast(Deliverer, Nowhere())
    journal.append("start", {"key": "k"})
    with (
        _longest_file(journal.path.stat().st_size),
        pytest.raises(RunError, match=r"^no checkpoint$"),
        JournalTracker(journal, deliverer),
    ):
        raise RunError("no checkpoint")
    journal.release()


def test_the_null_tracker_is_silent(tmp_path: Path) -> None:
    with null_tracker() as tracker:
        tracker.params({"train.seed": "0"})
        tracker.metrics({"dice/mean": 1.0}, step=1)
        tracker.artifact(tmp_path / "no_such_file")
        tracker.finish("FAILED")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["", "sqlite:///", "postgres://host/db", "mlruns", "http://", "http://[1", "file:///x"])
def test_other_places_are_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        open_tracker(tmp_path / "run", uri=uri, experiment="e", run_name="r", tags={}, on_warning=print)
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_named_without_its_password(tmp_path: Path) -> None:
    assert page_command("https://me:secret@server:8080/") == (
        "https://server:8080/#/experiments?workflowType=machine_learning"
    )
    command = page_command(embedded_store(tmp_path))
    assert command.startswith("MLFLOW_DISABLE_TELEMETRY=true ")
    assert command.endswith(f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db")
    assert page_address(embedded_store(tmp_path)).startswith("http://127.0.0.1:5000/#/")


def test_importing_tracking_is_light() -> None:
    source = "import sys, pipeline.tracking, pipeline.provenance; print({'mlflow', 'torch', 'numpy'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@contextmanager
def _longest_file(size_bytes: int) -> Iterator[None]:
    """What a full disk does to a write: a part of it is written, then it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
