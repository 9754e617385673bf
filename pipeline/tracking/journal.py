"""What a run tells about itself, on disk before anyone else hears of it.

`tracking.jsonl` in the run folder: one JSON line a fact, appended and synced.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline.errors import RunError
from pipeline.files import explain_os_error
from pipeline.line_file import LineFile, read_lines

JOURNAL_NAME = "tracking.jsonl"
_LOCK_NAME = ".tracking.lock"

Kind = Literal["start", "resume", "params", "tags", "metrics", "dataset", "artifact", "model", "note", "end"]


class Busy(RunError):
    """Another process, or another part of this one, tracks the run."""


@dataclass(frozen=True)
class Fact:
    """One line of the journal. `number` counts from 1 without gaps; `time_ms` is Unix time."""

    number: int
    time_ms: int
    kind: Kind
    body: dict[str, Any]


class Journal:
    """The facts of one run folder, held by one owner at a time.

    Raises:
        Busy: someone else holds it.
        RunError: the folder cannot be written, or the file is damaged.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self.path = run_folder / JOURNAL_NAME
        self._lock = _acquire(run_folder)
        self._writing, self._released = threading.Lock(), False
        try:
            self.facts = read_facts(run_folder)
            self._lines = LineFile(self.path)
        except BaseException:
            self.release()
            raise

    @property
    def key(self) -> str:
        """The id that the journal got with its first fact."""
        return str(self.facts[0].body["key"])

    def append(self, kind: Kind, body: dict[str, Any]) -> Fact:
        """Write a fact to disk; once this returns, it is not lost.

        Raises:
            RunError: the disk is full, the folder cannot be written, or it was released.
        """
        with self._writing:
            if self._released:  # whoever holds it now has written lines that this one would cut off
                raise RunError(f"{self.path}: was released; what comes now is too late for it")
            fact = Fact(len(self.facts) + 1, time.time_ns() // 1_000_000, kind, body)
            self._lines.append(json.dumps(asdict(fact), ensure_ascii=False, allow_nan=False).encode())
            self.facts.append(fact)
            return fact

    def release(self) -> None:
        """Let others have the folder."""
        with self._writing:
            self._released = True
            self._lock.release()


def read_facts(run_folder: Path) -> list[Fact]:
    """All facts of a run folder, without a last line that a kill cut short; none where there is no journal.

    Raises:
        RunError: the journal is damaged or cannot be read.
    """
    path = run_folder / JOURNAL_NAME
    return [_fact(line, number, path) for number, line in enumerate(read_lines(path), start=1)]


def ended(facts: Sequence[Fact]) -> Fact | None:
    """The end of the run that these are of; None if it was not told, or the run went on. What is told after the end of
    a run belongs to it."""
    last = next((fact for fact in reversed(facts) if fact.kind in {"start", "resume", "end"}), None)
    return last if last is not None and last.kind == "end" else None


def _acquire(run_folder: Path) -> FileLock:
    # Not thread-local: the delivering thread is the one that lets go.
    lock = FileLock(run_folder / _LOCK_NAME, thread_local=False)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Busy(f"{run_folder}: this run is being tracked already; wait for its end or stop it") from error
    except OSError as error:
        raise explain_os_error(error, run_folder) from error
    return lock


def _fact(line: bytes, number: int, path: Path) -> Fact:
    try:
        fact = Fact(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: line {number} is damaged; move the file aside to track anew") from error
    if fact.number != number:
        raise RunError(f"{path}: line {number} is numbered {fact.number}; move the file aside to track anew")
    return fact
