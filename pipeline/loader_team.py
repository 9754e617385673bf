"""The processes that make batches, as their parent sees them: asked ahead, listened to, replaced when they die."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from pipeline import errors
from pipeline.batch import Batch
from pipeline.errors import RunError, VolsegError
from pipeline.loader_memory import Slot, new_memory

STALLED_S = 120.0
"""A process that has been starting, or making one batch, for this long is taken for hung, and replaced."""

SLOTS = 2
"""Batches that a process is asked for ahead: one is made while the other is fetched."""

TRIES = 3
"""Processes that may die of one batch, or while they start."""

LISTENING_S = 0.1


class Source(Protocol):
    """What batches come from."""

    def batch(self, number: int, /) -> Batch:
        """Batch `number`: a function of the number alone."""

    def case_ids(self, number: int, /) -> tuple[str, ...]:
        """Whose patches are in it, without making it."""

    def recipe(self) -> tuple[str, dict[str, Any]]:
        """What another process makes the same source from: `module:function`, and its keywords.

        Their values are what `torch.load(weights_only=True)` takes: plain ones and tensors.
        """


@dataclass(eq=False)
class _Member:
    """One process, how it is spoken to, and what it has been asked for."""

    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    slots: tuple[Slot, ...]
    asked: set[int] = field(default_factory=set)
    ready: bool = False


class Team:
    """`count` processes that make the batches `numbers`, each every count-th of them.

    `losses` says in one line each which processes had to be replaced.
    """

    def __init__(self, source: Source, numbers: range, *, count: int, stalled_s: float = STALLED_S) -> None:
        self.losses: list[str] = []
        self._source, self._numbers, self._stalled_s = source, numbers, stalled_s
        self._stopped = threading.Event()
        self._died: Counter[int | None] = Counter()
        self._source_memory = new_memory()
        recipe = io.BytesIO()
        torch.save(source.recipe(), recipe)
        with os.fdopen(os.dup(self._source_memory), "wb") as stream:
            stream.write(recipe.getbuffer())
        self._members: list[_Member] = []
        try:
            for _ in range(count):
                self._members.append(self._start(tuple(Slot(new_memory()) for _ in range(SLOTS))))
        except OSError as error:
            self.close()
            raise RunError(
                f"no process could be started to load batches: {error.strerror}; set train.workers=0"
            ) from error

    def batch(self, number: int) -> Batch:
        """Batch `number`; they are asked for in order.

        Raises:
            RunError: it ended several processes, or none can be started.
            VolsegError: what the process that made it raised.
            CancelledError: `stop` was called meanwhile.
        """
        turn, place = divmod(number - self._numbers.start, len(self._members))
        while True:
            member = self._members[place]
            for later in range(SLOTS):
                self._ask(member, number + later * len(self._members), (turn + later) % SLOTS)
            answer = self._listen(member)
            if isinstance(answer, str):
                self._replace(place, number, answer)
            elif "error" in answer:
                raise self._error(number, answer)
            else:
                member.asked.discard(number)
                return member.slots[turn % SLOTS].read(answer)

    def stop(self) -> None:
        """Let a `batch` that another thread waits for end at once."""
        self._stopped.set()

    def close(self) -> None:
        """End all processes; they hold nothing that could be lost."""
        self.stop()
        for member in self._members:
            self._end(member)
            for slot in member.slots:
                os.close(slot.handle)
        os.close(self._source_memory)
        self._members = []

    def _start(self, slots: tuple[Slot, ...]) -> _Member:
        ours, theirs = Pipe()
        handles = [slot.handle for slot in slots]
        # The child's own search path is made ours, as multiprocessing does it; an environment may not be handed on.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\nfrom pipeline.loader_worker import main\n"
            f"main({theirs.fileno()}, {self._source_memory}, {handles})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno(), self._source_memory, *handles],
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C in a terminal is for the parent
        )
        theirs.close()
        return _Member(process, ours, slots)

    def _ask(self, member: _Member, number: int, place: int) -> None:
        if number not in self._numbers or number in member.asked:
            return
        member.asked.add(number)
        try:
            member.connection.send_bytes(json.dumps([number, place]).encode())
        except OSError:
            return  # it is dead, as whoever listens to it will find

    def _listen(self, member: _Member) -> dict[str, Any] | str:
        """The next answer, or how the process came to its end."""
        limit_s = self._stalled_s if member.ready else STALLED_S
        until = time.monotonic() + limit_s
        while True:
            if member.connection.poll(LISTENING_S):
                try:
                    answer: dict[str, Any] = json.loads(member.connection.recv_bytes())
                except (EOFError, OSError):
                    return _ending(member.process)
                if not answer.get("ready"):
                    return answer
                member.ready, limit_s = True, self._stalled_s
                until = time.monotonic() + limit_s
            if self._stopped.is_set():
                raise CancelledError
            if time.monotonic() > until:
                return f"gave no sign for {limit_s:g} s"

    def _replace(self, place: int, number: int, ending: str) -> None:
        member = self._members[place]
        blamed = number if member.ready else None
        self._end(member)
        self._died[blamed] += 1
        if self._died[blamed] >= TRIES:
            if blamed is None:
                raise RunError(
                    f"{TRIES} loading processes could not start ({ending}); set train.workers=0 for a thread"
                )
            cases = ", ".join(dict.fromkeys(self._source.case_ids(number)))
            raise RunError(f"batch {number} ended {TRIES} loading processes (the last {ending}); its cases: {cases}")
        self.losses.append(f"a process that loads batches {ending}")
        self._members[place] = self._start(member.slots)

    def _end(self, member: _Member) -> None:
        member.connection.close()
        member.process.kill()
        member.process.wait()

    def _error(self, number: int, answer: dict[str, Any]) -> VolsegError:
        kind = getattr(errors, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, VolsegError):
            return kind(answer["message"])
        cases = ", ".join(dict.fromkeys(self._source.case_ids(number)))
        told = " ".join(answer["message"].split())
        error = RunError(f"batch {number} could not be made: {answer['error']}: {told}; its cases: {cases}")
        error.add_note("in a process that loads batches:\n" + answer["traceback"])
        return error


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
    return f"was ended by {name}" + (", as when memory runs out" if -code == signal.SIGKILL else "")
