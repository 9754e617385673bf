"""A real training that is interrupted ends with the weights that it would have had."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ROOT, Outcome, World, command, environment, make_world

Call = Callable[..., Outcome]
WEIGHTS = Path("fold_0") / "bundle" / "weights.safetensors"
STEPS = ("--set", "train.steps=400")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, in_process: Call) -> World:
    return make_world(tmp_path_factory.mktemp("resume"), in_process)


@pytest.fixture(scope="module")
def straight(world: World, in_process: Call) -> bytes:
    """The weights of a training that nothing disturbed."""
    run = world.folder / "runs" / "straight"
    done = in_process("train", world.config, "--fold", 0, "--out", run, *STEPS)
    assert done.code == 0, done.err
    return (run / WEIGHTS).read_bytes()


def interrupt_when(world: World, run: Path, is_time: Callable[[], bool]) -> Outcome:
    """Start a training in a process of its own, and press Ctrl-C once `is_time`."""
    arguments = command("train", world.config, "--fold", 0, "--out", run, *STEPS)
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not is_time() and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate()
    return Outcome(process.returncode, out, err)


def has_rows(run: Path) -> bool:
    history = run / "fold_0" / "history.jsonl"
    return history.exists() and history.stat().st_size > 0


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(world: World, straight: bytes, in_process: Call) -> None:
    run = world.folder / "runs" / "interrupted"
    done = interrupt_when(world, run, lambda: has_rows(run))
    assert done.code == 130, done.err
    assert done.err.splitlines()[-1] == (
        "interrupted; finished parts are kept, and an unfinished training goes on with --resume"
    )
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not list(world.folder.rglob(".writing-*"))
    assert (run / "fold_0" / "checkpoint.pt").exists()
    assert not (run / "fold_0" / "done.json").exists()

    resume = ("train", world.config, "--fold", 0, "--out", run)
    refused = in_process(*resume, *STEPS)
    assert (refused.code, refused.err) == (
        1,
        f"error: {run / 'fold_0'}: an unfinished training is here; give --resume, or another --out\n",
    )
    changed = in_process(*resume, *STEPS, "--resume", "--set", "train.learning_rate=0.1")
    assert changed.code == 1
    assert "a run with another config is here (train.learning_rate was" in changed.err
    assert changed.err.count("\n") == 1

    resumed = in_process(*resume, *STEPS, "--resume")
    assert resumed.code == 0, resumed.err
    assert "resumed at step" in resumed.err
    assert (run / WEIGHTS).read_bytes() == straight
