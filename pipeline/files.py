"""Files that are either whole or not there: atomic writes, hashes, safe names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline.errors import RunError

_BLOCK_BYTES = 1 << 20
UNFINISHED = ".writing-"
"""What names of files begin with that are being written, or were when a kill came."""

_at_work: set[str] = set()
"""Names of what this process has not finished."""

# Asked once: the only way to read it changes it for a moment, which other threads would see.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target` (same suffixes); on success it is synced and becomes `target`.

    A device or a pipe, as /dev/stdout, is given itself: putting a file in its place would take it away.
    Raises RunError in one line when the folder cannot be written or the disk is full; the target is untouched.
    """
    temporary: Path | None = None
    try:
        if target.exists() and not (target.is_file() or target.is_dir()):
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp keeps two writers of the same target apart; the whole name stays a suffix for format sniffing.
        handle, name = tempfile.mkstemp(prefix=_unfinished(), suffix="-" + target.name, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        _at_work.add(temporary.name)
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        sync_file(temporary)
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise explain_os_error(error, target) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
            _at_work.discard(temporary.name)


@contextmanager
def atomic_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target`; on success it takes `target`'s place as a whole.

    Raises RunError when `target` exists already (unless `force`) or cannot be written.
    """
    if target.exists() and not force:
        raise RunError(f"{target} exists already; give --force to replace it, or another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(target.parent, target.name) as temporary:
            yield temporary
            share_as_new(temporary)
            if target.exists():
                shutil.rmtree(target)
            temporary.replace(target)
            _sync_folder(target.parent)
    except OSError as error:
        raise explain_os_error(error, target) from error


@contextmanager
def unfinished_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give a temporary folder in `parent`, of which nothing stays but what is moved away; `name` is what it is for.

    Raises OSError when it cannot be made.
    """
    temporary = Path(tempfile.mkdtemp(prefix=_unfinished(), suffix="-" + name, dir=parent))
    _at_work.add(temporary.name)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _at_work.discard(temporary.name)


def refuse_foreign(target: Path, ours: Sequence[str], what: str) -> None:
    """Raise RunError where replacing `target` would take away a file whose path in it fits none of the patterns `ours`,
    the files of `what`."""
    if not target.exists():
        return
    # One at a time: it may be a whole disk that was named.
    found = (path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir())
    names = found if target.is_dir() else [target.name]
    foreign = next((name for name in names if not any(fnmatchcase(name, pattern) for pattern in ours)), None)
    if foreign is not None:
        raise RunError(f"{target}: holds {foreign}, so it is not {what} and not to be replaced; give another name")


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write a JSON document atomically; keys keep their order, so equal values give equal bytes."""
    write_text(target, json_text(value, indent=2) + "\n")


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """A JSON value, in letters; only where a file name in it is no UTF-8 are all that are not ASCII escaped."""
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, sort_keys=sort_keys)
    return text


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json_text(value, sort_keys=True).encode()).hexdigest()


def sha256_of_folders(folders: Sequence[Path]) -> str:
    """Hex SHA-256 of all files in folders, whatever these are called; their order counts."""
    return sha256_of_json(
        [
            {
                path.relative_to(folder).as_posix(): sha256_of_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            for folder in folders
        ]
    )


def safe_name(text: str) -> str:
    """A file name made of letters, digits, '.', '_' and '-' that cannot leave its folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")
    return name or "unnamed"


def explain_os_error(error: OSError, target: Path) -> RunError:
    """One line for what the operating system refused."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
        errno.EACCES: "the folder cannot be written; choose another one or change its permissions",
        errno.EPERM: "the folder cannot be written; choose another one or change its permissions",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EEXIST: "a file stands where a folder is needed; choose another folder",
        errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    }
    reason = reasons.get(error.errno or 0, (error.strerror or str(error)).lower())
    return RunError(f"cannot write {target}: {reason}")


def share_as_new(folder: Path) -> None:
    """Give a temporary folder, which only its maker may enter, the permissions of any new one."""
    folder.chmod(0o777 & ~_UMASK)


def sync_file(path: Path) -> None:
    """Have a file's bytes on the disk itself, where a power cut leaves them."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left of files that were being written, as far as it may be removed.

    Only where no one else of this project writes from another machine; a process of this one that still runs keeps its
    own, whichever command it is of.
    """
    for path in folder.glob(f"{UNFINISHED}*"):
        process = path.name.removeprefix(UNFINISHED).partition("-")[0]
        # Numbers of processes come again: in a container each command may have the same.
        if path.name in _at_work or (process not in ("", str(os.getpid())) and _runs(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _unfinished() -> str:
    """What names of files begin with that this process has not finished."""
    return f"{UNFINISHED}{os.getpid()}-"


def _runs(process: str) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
