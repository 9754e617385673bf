"""A folder is one process's at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.folder_lock import held

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
        with held(folder):
            pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a file stands where a folder is needed"), held(tmp_path / "file" / "fold_0"):
        pytest.fail("it is no folder")
