"""One process at a time in a folder, as far as the others ask too."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import RunError
from pipeline.files import explain_os_error

LOCK_NAME = ".volseg.lock"


NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that knows no locks."""

OF_ANYONE = 0o666
"""A lock file holds nothing, and who may write in its folder has to be able to open it."""


@contextmanager
def held(folder: Path, *, wait_s: float = 0.0, required: bool = True) -> Iterator[bool]:
    """Keep other processes out of `folder`, which is made; it is let go however this process ends.

    Where the file system knows no locks, what is not `required` goes on without one, and is given False: others may be
    at work there.

    Raises:
        RunError: another holds it for longer than `wait_s`, or it cannot be written.
    """
    # A marker file in the place of a lock would outlive a kill.
    lock = FileLock(folder / LOCK_NAME, thread_local=False, mode=OF_ANYONE, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    try:
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise RunError(
            f"{folder}: another process is at work here; wait for its end, or choose another --out"
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter by filelock, of a call that the system does not have
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise explain_os_error(error, folder / LOCK_NAME) from error
        if required:
            raise RunError(f"{folder}: its file system knows no locks; choose a folder on another one") from error
    try:
        yield lock.is_locked
    finally:
        lock.release()
