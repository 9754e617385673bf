"""Hands a journal to a destination, in order, and keeps in `tracking_sent.json` how far it got."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

from pipeline.errors import RunError
from pipeline.files import write_json
from pipeline.tracking.journal import Fact, Journal

SENT_NAME = "tracking_sent.json"
_INTERVAL_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Unreachable(RunError):
    """The destination did not take a fact now; it may later."""


class Refused(RunError):
    """The destination will never take this fact."""


class Waiting(RunError):
    """Another run, which is about to be sent, has to be there first."""


@dataclass(frozen=True)
class Sent:
    """How far a destination has been told of the journal `key`, and under which ids it knows the run."""

    destination: str
    key: str
    number: int = 0
    ids: Mapping[str, str] = field(default_factory=dict)


class Destination(Protocol):
    """Somewhere that facts are sent to."""

    @property
    def name(self) -> str:
        """Shown in warnings and kept in `tracking_sent.json`; holds no password."""

    def send(self, facts: Sequence[Fact], ids: Mapping[str, str]) -> Mapping[str, str]:
        """Tell facts of one kind; gives the ids of the run (none before its start was sent).

        Telling a fact again must change nothing.

        Raises:
            Unreachable: not now.
            Refused: never.
            Waiting: not before another run, which is about to be sent.
        """


def read_sent(run_folder: Path, *, destination: str, key: str) -> Sent:
    """How far `destination` has been told of the journal `key`; nothing if it never was."""
    with suppress(OSError, ValueError, TypeError):
        sent = Sent(**json.loads((run_folder / SENT_NAME).read_text(encoding="utf-8")))
        if (sent.destination, sent.key) == (destination, key):
            return sent
    return Sent(destination, key)


class Deliverer:
    """Sends a journal from a thread of its own, which never holds up the run.

    `on_warning` is called from that thread, once when deliveries begin to fail, and from `close`.
    """

    def __init__(self, journal: Journal, destination: Destination, on_warning: Callable[[str], None]) -> None:
        self._journal = journal
        self._destination = destination
        self._on_warning = on_warning
        self._sent = read_sent(journal.run_folder, destination=destination.name, key=journal.key)
        self._failures = 0
        self.fault = ""
        """Why the last attempt failed; nothing if it did not."""
        self._refused: set[str] = set()
        self._closing = threading.Event()
        self._deadline_s = 0.0
        # A daemon: an upload that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._loop, name="volseg-tracking", daemon=True)

    @property
    def pending(self) -> int:
        """Number of facts that have not been sent."""
        return len(self._journal.facts) - self._sent.number

    def start(self) -> None:
        """Send in the background from now on."""
        self._thread.start()

    def close(self, patience_s: float) -> None:
        """Try once more, wait for it, but no longer than `patience_s` seconds, and say what is left over."""
        self._deadline_s = time.monotonic() + patience_s
        self._closing.set()
        self._thread.join(patience_s)
        if self.pending:
            self._on_warning(
                f"tracking: {self.pending} of {len(self._journal.facts)} entries of {self._journal.path} "
                f"have not reached {self._destination.name}; --resume sends them"
            )

    def attempt(self) -> bool:
        """Send what is pending; False if only another run, which is about to be sent, stands in the way."""
        try:
            for group in _groups(self._journal.facts[self._sent.number :]):
                self._deliver(group)
        except Waiting:
            return False
        except RunError as error:
            self._failures += 1
            self.fault = str(error)
            if self._failures == 1:
                self._on_warning(
                    f"tracking: {self._destination.name} does not take this run's data ({error}); the run "
                    f"goes on, {self._journal.path} keeps the data until they can be sent"
                )
        else:
            self._failures, self.fault = 0, ""
        return True

    def _loop(self) -> None:
        try:
            while not self._closing.wait(self._pause_s()):
                self.attempt()
            while not self.attempt() and time.monotonic() < self._deadline_s:
                time.sleep(_INTERVAL_S / 4)
        finally:
            self._journal.release()

    def _pause_s(self) -> float:
        return float(min(_INTERVAL_S * 2 ** min(self._failures, 10), _LONGEST_PAUSE_S))

    def _deliver(self, facts: Sequence[Fact]) -> None:
        ids = self._sent.ids
        try:
            ids = self._destination.send(facts, ids)
        except Refused as error:
            # Without its start a run has no place that the rest could go to.
            if facts[0].kind == "start":
                raise
            if len(facts) > 1:
                for fact in facts:
                    self._deliver([fact])
                return
            self._tell_refused(facts[0], error)
        self._sent = replace(self._sent, number=facts[-1].number, ids=ids)
        write_json(self._journal.run_folder / SENT_NAME, asdict(self._sent))

    def _tell_refused(self, fact: Fact, error: Refused) -> None:
        if fact.kind not in self._refused:
            self._refused.add(fact.kind)
            self._on_warning(
                f"tracking: {self._destination.name} refuses {fact.kind} ({error}); "
                f"line {fact.number} of {self._journal.path} keeps it"
            )


def _groups(facts: Sequence[Fact]) -> Iterator[list[Fact]]:
    """Neighbouring metrics together, since a request costs more than what it carries; all else alone."""
    for _, group in groupby(facts, lambda fact: 0 if fact.kind == "metrics" else fact.number):
        yield list(group)
