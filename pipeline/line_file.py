"""Files that grow line by line: a line that was appended is not lost, and what a kill cut short is none."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import RunError
from pipeline.files import atomic_path, explain_os_error


class LineFile:
    """A file that one writer appends lines to; what a kill left of a last line is cut off at once.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = _drop_torn_line(path)

    def append(self, line: bytes) -> None:
        """Write a line, which is given without its end; once this returns, it is on the disk.

        Raises:
            RunError: the disk is full, or the folder cannot be written.
        """
        line += b"\n"
        try:
            if not self.path.exists():
                # This has the new name in the folder on the disk, too.
                with atomic_path(self.path) as temporary:
                    temporary.write_bytes(line)
            else:
                with self.path.open("ab") as stream:
                    # What a full disk left of an earlier line must not run into this one.
                    stream.truncate(self.size_bytes)
                    stream.write(line)
                    stream.flush()
                    os.fsync(stream.fileno())
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        self.size_bytes += len(line)


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file, without a last one that a kill cut short; none where there is no file.

    Raises:
        RunError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({type(error).__name__}); check its permissions") from error
    return content.split(b"\n")[:-1]


def _drop_torn_line(path: Path) -> int:
    """Cut what a kill left of a last line; gives the length in bytes of what stays."""
    try:
        with path.open("r+b") as stream:
            size_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size_bytes - 1))
            # Whole as a rule, and then nothing but its last byte is read.
            if stream.read(1) in (b"", b"\n"):
                return size_bytes
            whole_bytes = path.read_bytes().rfind(b"\n") + 1
            stream.truncate(whole_bytes)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise explain_os_error(error, path) from error
    return whole_bytes
