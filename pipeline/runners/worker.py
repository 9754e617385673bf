"""A process that trains one fold for `pipeline.runners.local`: a job on standard input, messages on standard output.

Standard input stays open as long as its owner lives and wants the fold. When it ends, the process interrupts itself,
as Ctrl-C would: a checkpoint is written and it goes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from pipeline.runners.job import FoldJob, Message, do_job

INTERRUPTED = 130

PATIENCE_S = 300.0
"""Time that an interrupted process has before it ends itself: a whole-volume validation is not cut short."""


def main() -> None:
    """Read a job, do it, tell of it."""
    messages = _take_standard_output()
    job = FoldJob(**json.loads(_read_line()))
    threading.Thread(target=_leave_with_owner, args=(threading.get_ident(),), daemon=True).start()
    try:
        do_job(job, _writer(messages))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _take_standard_output() -> TextIO:
    """Standard output for messages alone: what libraries print goes to standard error."""
    sys.stdout.flush()
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return messages


def _read_line() -> bytes:
    # Unbuffered, since a thread that waits in a buffered stream cannot be left behind at the end.
    with open(0, "rb", buffering=0, closefd=False) as stream:
        return stream.readline()


def _writer(stream: TextIO) -> Callable[[Message], None]:
    writing = threading.Lock()

    def tell(message: Message) -> None:
        # Without a listener there is nothing to tell; that the owner is gone is seen elsewhere.
        with writing, suppress(BrokenPipeError):
            stream.write(json.dumps(message) + "\n")
            stream.flush()

    return tell


def _leave_with_owner(main_thread: int) -> None:
    while os.read(0, 4096):
        pass
    # To that thread, so that it also wakes up from a wait.
    signal.pthread_kill(main_thread, signal.SIGINT)
    time.sleep(PATIENCE_S)
    os.killpg(0, signal.SIGKILL)
