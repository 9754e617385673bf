"""One process at a time in a folder, as far as the others ask too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import RunError
from pipeline.files import explain_os_error

LOCK_NAME = ".volseg.lock"


@contextmanager
def held(folder: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made; it is let go however this process ends.

    Raises:
        RunError: another holds it for longer than `wait_s`, or it cannot be written.
    """
    lock = FileLock(folder / LOCK_NAME, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise RunError(
            f"{folder}: another process is at work here; wait for its end, or choose another --out"
        ) from error
    except OSError as error:
        raise explain_os_error(error, folder) from error
    try:
        yield
    finally:
        lock.release()
