"""Folds side by side on this machine, each in a process of its own with its share of the threads and GPUs."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from pipeline.console import Console
from pipeline.crossval import FoldRunner
from pipeline.device import CUDA_MEMORY_SHARE, Hardware
from pipeline.errors import ConfigError
from pipeline.plan import Plan
from pipeline.runners.job import FoldJob, Message, Outcomes, job_document, job_of, make_cache, retell
from pipeline.runs import Run

START = "import sys; sys.path[:] = sys.argv[2:]; from pipeline.runners.worker import main; main()"
"""What a fold's process runs: modules come from where they come from here."""

ENDED = "ended"

Event = tuple[int, Message]
"""A fold, and what it told; the last is (ENDED, exit code)."""


@dataclass(frozen=True)
class Share:
    """What one of several folds that run at a time may use."""

    threads: int
    gpu: int | None = None


def side_by_side(count: int, *, threads: int | None = None) -> FoldRunner:
    """A runner of `count` folds at a time, with `threads` CPU threads each (default: its part of what torch has)."""

    def run_folds(run: Run, folds: Sequence[int], console: Console) -> dict[int, Exception]:
        if not folds:
            return {}
        shares = shares_of(run.hardware, run.plan, min(count, len(folds)), threads or thread_share(count))
        make_cache(run, folds, console)
        return _Pool(run, console, shares).run(folds)

    return run_folds


def thread_share(count: int) -> int:
    """CPU threads of each of `count` folds."""
    import torch

    return max(1, torch.get_num_threads() // count)


def shares_of(hardware: Hardware, plan: Plan, count: int, threads: int) -> list[Share]:
    """Each fold's share. GPUs go round; folds share one only if the plan's estimate says that they fit.

    Raises:
        ConfigError: too many folds for the GPUs.
    """
    if hardware.device == "cpu":
        return [Share(threads)] * count
    import torch

    gpus = torch.cuda.device_count()
    smallest_gb = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)) / 1e9
    together = -(-count // gpus)
    if together > 1 and together * plan.memory_gb > CUDA_MEMORY_SHARE * smallest_gb:
        raise ConfigError(
            f"--parallel {count}: {together} folds on a GPU take {together * plan.memory_gb:.3g} GB by the plan's "
            f"estimate, and a GPU has {smallest_gb:.3g} GB; use at most {gpus}, or lower plan.memory_gb"
        )
    return [Share(threads, number % gpus) for number in range(count)]


class _Pool:
    """Processes for folds: as many at a time as there are shares."""

    def __init__(self, run: Run, console: Console, shares: Sequence[Share]) -> None:
        self._run, self._console = run, console
        self._free = list(shares)
        self._events: queue.Queue[Event] = queue.Queue()
        self._running: dict[int, _Process] = {}
        self._outcomes = Outcomes(run, console)

    def run(self, folds: Sequence[int]) -> dict[int, Exception]:
        """All the folds; gives what stopped the ones that are not done."""
        waiting = deque(folds)
        with self._ended_in_any_case():
            while waiting or self._running:
                while waiting and self._free:
                    self._start(waiting.popleft())
                fold, message = self._events.get()
                if message[0] != ENDED:
                    self._hear(fold, message)
                else:
                    self._free.append(self._running.pop(fold).share)
                    if self._outcomes.is_to_restart(fold, _how_it_ended(message[1])):
                        waiting.appendleft(fold)
        return self._outcomes.faults()

    def _start(self, fold: int) -> None:
        share = self._free.pop(0)
        job = job_of(self._run, fold, threads=share.threads, gpu=share.gpu)
        self._running[fold] = _Process(job, share, self._events)

    def _hear(self, fold: int, message: Message) -> None:
        if message[0] == "failed":
            self._outcomes.fail(fold, message[1])
        else:
            retell(message, fold, self._console)

    @contextmanager
    def _ended_in_any_case(self) -> Iterator[None]:
        """Whatever happens, no process stays: they are asked to go, waited for, and killed if that is interrupted."""
        try:
            yield
        finally:
            for process in self._running.values():
                process.ask_to_go()
            try:
                if self._running:
                    folds = ", ".join(map(str, sorted(self._running)))
                    self._console.note(f"stopping fold {folds} once a checkpoint is written; Ctrl-C again: at once")
                for process in self._running.values():
                    process.wait()
            finally:
                for process in self._running.values():
                    process.kill()


class _Process:
    """A fold's process; what it tells and its end are put into a queue."""

    def __init__(self, job: FoldJob, share: Share, events: queue.Queue[Event]) -> None:
        self.share = share
        self._fold, self._events = job.fold, events
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, f"fold {job.fold}", *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A Ctrl-C at the terminal is the owner's to hear, who asks each once.
            start_new_session=True,
        )
        with suppress(BrokenPipeError):
            _stream(self._process.stdin).write(json.dumps(job_document(job)).encode() + b"\n")
            _stream(self._process.stdin).flush()
        self._watch = threading.Thread(target=self._watch_it, name=f"fold {job.fold}", daemon=True)
        self._watch.start()

    def ask_to_go(self) -> None:
        """Have it write a checkpoint and end."""
        with suppress(OSError):
            _stream(self._process.stdin).close()

    def wait(self) -> None:
        """Until it and all that it started are gone."""
        self._watch.join()

    def kill(self) -> None:
        """End it and all that it started."""
        if self._process.poll() is None:
            self._kill_group()
        self._watch.join()

    def _watch_it(self) -> None:
        readers = [threading.Thread(target=r, daemon=True) for r in (self._read_messages, self._read_errors)]
        for reader in readers:
            reader.start()
        code = self._process.wait()
        # What it started would hold the streams open.
        self._kill_group()
        for reader in readers:
            reader.join()
        self.ask_to_go()
        self._events.put((self._fold, (ENDED, code)))

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read_messages(self) -> None:
        with _stream(self._process.stdout) as stream:
            for line in stream:
                # A kill may have cut the last line short.
                with suppress(ValueError):
                    self._events.put((self._fold, json.loads(line)))

    def _read_errors(self) -> None:
        with _stream(self._process.stderr) as stream:
            for line in stream:
                if text := line.decode(errors="replace").strip():
                    self._events.put((self._fold, ("note", text)))


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"its process ended by itself with exit code {code}"
    name = signal.Signals(-code).name
    memory = ", which is also how a system without memory ends processes" if -code == signal.SIGKILL else ""
    return f"its process was ended by {name}{memory}"
