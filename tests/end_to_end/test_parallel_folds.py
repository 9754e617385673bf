"""`volseg crossval --parallel` when it is interrupted or killed: no process stays, every fold has its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import CHECKPOINT

from .conftest import ROOT, World, command, environment, make_world

pytestmark = pytest.mark.slow

# An hour without a checkpoint but for the one that is written when a fold is stopped.
STEPS = ("--set", "train.steps=100000", "--set", "train.checkpoint_minutes=60")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, in_process: Any) -> World:
    return make_world(tmp_path_factory.mktemp("parallel"), in_process)


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()


def fold_processes(parent: int) -> list[int]:
    """The processes that train folds for a parent, which may be gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            owner = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if {b"fold 0", b"fold 1"} & set(words) and owner == parent:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_stays_and_each_fold_has_its_checkpoint(world: World, how: signal.Signals) -> None:
    run = world.folder / "runs" / how.name
    words = command("crossval", world.config, "--parallel", "2", "--out", run, *STEPS)
    histories = [run / f"fold_{fold}" / "history.jsonl" for fold in (0, 1)]
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert wait_until(lambda: all(h.exists() and h.stat().st_size > 0 for h in histories), 120)
        folds = fold_processes(process.pid)
        assert len(folds) == 2
        os.kill(process.pid, how)
        out, err = process.communicate(timeout=120)
    assert out == ""
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in folds), 60)
    assert all((run / f"fold_{fold}" / CHECKPOINT).exists() for fold in (0, 1))
    assert all(json.loads(h.read_text().splitlines()[-1]) for h in histories)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-2:] == [
            "stopping fold 0, 1 once a checkpoint is written; Ctrl-C again: at once",
            "interrupted; finished parts are kept, and an unfinished training goes on with --resume",
        ]
