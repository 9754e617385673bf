"""Commands in processes of their own that can be killed at a chosen moment, without the seconds that a start takes.

A server imports what the commands need and forks for each. The child runs the command line's `main`. It dies by
SIGKILL where it is about to touch a file for the n-th time, or in the middle of writing one. Run as a script this is
the server; imported it is its client.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "tempfile.mkstemp", "tempfile.mkdtemp")
"""Audit events of what changes a folder; each comes before the change is made."""


@dataclass(frozen=True)
class Death:
    """Where a command dies: before the `nth` touch whose words hold all of `words`, or in a write past a size."""

    words: tuple[str, ...] = ()
    nth: int = 1
    size_bytes: int | None = None


@dataclass(frozen=True)
class Life:
    """How a command ended: its exit code, or minus the signal, and what it told."""

    code: int
    out: str
    err: str


class Lives:
    """The client: runs commands, and says how they ended."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server, self._folder = server, folder

    def start(self, *arguments: Any, death: Death | None = None) -> int:
        """Fork a command; gives its process id. `end` is to follow."""
        order = {"arguments": [str(a) for a in arguments], "folder": str(self._folder)}
        self._say(order | {"death": vars(death) if death else None})
        return int(self._hear())

    def end(self) -> Life:
        """Wait for the command that was started."""
        code = int(self._hear())
        return Life(code, *((self._folder / name).read_text() for name in ("out", "err")))

    def run(self, *arguments: Any, death: Death | None = None) -> Life:
        self.start(*arguments, death=death)
        return self.end()

    def _say(self, order: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()

    def _hear(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


@contextmanager
def open_lives(folder: Path, environment: dict[str, str]) -> Generator[Lives]:
    """A server, until the end of the block."""
    arguments = [sys.executable, __file__]
    with subprocess.Popen(
        arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield Lives(server, folder)
        assert server.stdin is not None
        server.stdin.close()


def serve() -> None:
    """Read orders, fork for each, say its process id and then how it ended."""
    import pipeline.cli
    import pipeline.crossval
    import pipeline.export.overlay
    import pipeline.train  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            obey(order)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def obey(order: dict[str, Any]) -> None:
    """In the child: the command, with its output in files. Does not return."""
    from pipeline.cli import main

    folder = Path(order["folder"])
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if order["death"]:
        prepare(Death(**order["death"]))
    sys.argv = ["volseg", *order["arguments"]]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare(death: Death) -> None:
    """Have this process die as told."""
    if death.size_bytes is not None:
        # The system itself ends a process that writes beyond its limit, and the file stays cut short.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (death.size_bytes, resource.RLIM_INFINITY))
        return
    seen = 0

    def touch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in TOUCHES or (event == "open" and not writes(arguments)):
            return
        words = " ".join([event, *map(str, arguments)])
        if all(word in words for word in death.words):
            seen += 1
            if seen == death.nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touch)


def writes(arguments: tuple[Any, ...]) -> bool:
    """True of an `open` that may change the file."""
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC))


if __name__ == "__main__":
    serve()
