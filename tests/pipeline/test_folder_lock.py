"""A folder is one process's at a time."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.folder_lock import LOCK_NAME, held

HOLD = """
import sys
from pathlib import Path
from pipeline.folder_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_and_a_kill_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "fold_0"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="fold_0: another process is at work here"), held(folder):
            pytest.fail("both hold it")
        other.kill()
    for _ in range(2):
        with held(folder) as alone:
            assert alone


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a file stands where a folder is needed"), held(tmp_path / "file" / "fold_0"):
        pytest.fail("it is no folder")


def test_who_may_write_in_the_folder_may_lock_it(tmp_path: Path) -> None:
    with held(tmp_path):
        pass
    assert (tmp_path / LOCK_NAME).stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_goes_on_what_can_do_without(
    tmp_path: Path, reason: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(reason, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path, required=False) as alone:
        assert not alone
    with pytest.raises(RunError, match="its file system knows no locks; choose a folder"), held(tmp_path):
        pytest.fail("it is not held")


def test_something_else_of_its_name_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(RunError, match=f"cannot write .*{LOCK_NAME}"), held(tmp_path, required=False):
        pytest.fail("it is not held")
