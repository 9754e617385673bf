"""Settings of the whole process that several threads change for a while, as those of warnings: counted, so that one
thread's leaving never undoes what another still needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock


def shared(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """`change` as one that any number of threads may be in: the first to come makes it, the last to go undoes it."""
    lock = Lock()
    made: list[AbstractContextManager[None]] = []
    inside = 0

    @contextmanager
    def entered() -> Iterator[None]:
        nonlocal inside
        with lock:
            if inside == 0:
                made.append(change())
                made[0].__enter__()
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if inside == 0:
                    made.pop().__exit__(None, None, None)

    return entered
