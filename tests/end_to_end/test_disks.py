"""A disk that is full or read-only costs a training nothing but its checkpoints, and the end says so in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Outcome, environment, make_world

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("disks.py")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, in_process: Callable[..., Outcome]) -> dict[str, Any]:
    world = make_world(tmp_path_factory.mktemp("disks"), in_process)
    command = [sys.executable, str(SCRIPT), str(world.folder / "disk"), str(world.config)]
    # In a mount namespace of its own, where that is allowed: nothing stays mounted, whatever happens.
    apart = ["unshare", "--mount", "--map-root-user"]
    allowed = subprocess.run([*apart, "true"], capture_output=True, check=False).returncode == 0
    done = subprocess.run(
        [*(apart if allowed else []), *command], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def reason(told: dict[str, Any]) -> str:
    full = "the disk is full; free some space and run the same command again"
    return full if told["is_real"] else "file too large"


def test_a_training_goes_on_and_is_told_once(told: dict[str, Any]) -> None:
    assert told["for a while"] == told["weights"]
    *refused, again = told["notes for a while"]
    # The history may still fit into the last block that it has.
    kinds = [note.split(":")[0] for note in refused]
    assert sorted(kinds) in (["no checkpoint"], ["no checkpoint", "the history waits"])
    assert all(reason(told) in note and "\n" not in note for note in refused)
    assert again.startswith("checkpoints are written again, at update ")


def test_no_row_of_the_history_is_lost(told: dict[str, Any]) -> None:
    assert told["steps for a while"] == sorted(told["steps for a while"])
    assert {10, 20, 30, 40, 50, 60} <= set(told["steps for a while"])


def test_the_end_fails_in_one_line_and_goes_on_once_there_is_space(told: dict[str, Any]) -> None:
    assert told["to the end"] != "it was done"
    assert reason(told) in told["to the end"]
    assert "\n" not in told["to the end"]
    assert told["checkpoint is kept"]
    assert told["leftovers"] == []
    assert told["after space was made"] == told["weights"]


@pytest.mark.parametrize("what", ["bundle", "new run", "cache"])
def test_what_else_is_written_is_refused_in_one_line(told: dict[str, Any], what: str) -> None:
    assert told[what].startswith("cannot write ")
    assert told[what].endswith(reason(told))


def test_a_read_only_disk_is_named(told: dict[str, Any]) -> None:
    """Where nothing can be mounted, test_files.py has the message, and the rest is as on a full disk."""
    if told["is_real"]:
        assert all("the file system is read-only; choose another folder" in line for line in told["read-only"])
        assert told["read-only for a while"] == told["weights"]
        assert any("read-only" in note for note in told["notes read-only"])
