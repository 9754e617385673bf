"""`volseg train` in two processes on the CPU: torchrun's, or its own; and a process that is lost."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import CHECKPOINT
from pipeline.history import HISTORY, read_history

from .conftest import ROOT, Outcome, World, command, environment, make_world

# Without bfloat16 the order of a sum is all that differs between one process and two.
STEPS = ("--set", "train.steps=40", "--set", "plan.batch_size=2", "--set", "train.precision=float32")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline.cli")

OFTEN = ("--set", "train.steps=600", "--set", "train.checkpoint_minutes=0.001")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, in_process: Any) -> World:
    return make_world(tmp_path_factory.mktemp("several"), in_process)


def arguments(world: World, name: str, *more: str) -> list[str]:
    return ["train", str(world.config), "--fold", "0", "--out", str(world.folder / "runs" / name), *STEPS, *more]


def call(words: list[str]) -> Outcome:
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def alone(world: World, in_process: Any) -> Outcome:
    done: Outcome = in_process(*arguments(world, "alone"))
    assert done.code == 0, done.err
    return done


def dice(world: World, name: str) -> list[float]:
    with (world.folder / "runs" / name / "fold_0" / "report.csv").open() as stream:
        return [float(row["dice"]) for row in csv.DictReader(stream)]


def steps_told(world: World, name: str) -> list[int]:
    return [int(row["step"]) for row in read_history(world.folder / "runs" / name / "fold_0" / HISTORY)]


def notes(outcome: Outcome) -> list[str]:
    return [line.partition(":")[0] for line in outcome.err.splitlines() if line.startswith(("fold ", "step "))]


@pytest.mark.parametrize("launcher", ["torchrun", "own"])
def test_two_processes_train_what_one_does(world: World, alone: Outcome, launcher: str) -> None:
    words = arguments(world, launcher, "--devices", "2")
    done = call([*TORCHRUN, *words] if launcher == "torchrun" else command(*words))
    assert done.code == 0, done.err
    assert dice(world, launcher) == pytest.approx(dice(world, "alone"), abs=0.02)
    assert len(dice(world, launcher)) == 4
    # The second process says and writes nothing.
    assert notes(done) == notes(alone)
    assert done.out.count("Dice, fold 0") == done.out.count("model: ") == 1
    assert steps_told(world, launcher) == steps_told(world, "alone")


def started_by(parent: int) -> list[int]:
    """The processes that a process has started and that have `volseg train`'s arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            owner = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_training = b"--devices" in (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if owner == parent and is_training:
            found.append(int(folder.name))
    return found


def lose_one(world: World, name: str, *more: str) -> None:
    """Kill the second process once there is a checkpoint; the first one says so in one line."""
    words = command(*arguments(world, name, "--devices", "2", *OFTEN, *more))
    checkpoint = world.folder / "runs" / name / "fold_0" / CHECKPOINT
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.05)
        (other,) = started_by(process.pid)
        os.kill(other, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == (
        "error: another process of this training was lost; --resume goes on from the last checkpoint"
    )
    assert err.count("error") == 1
    assert "Traceback" not in err


def test_a_lost_process_ends_the_others_with_one_line(world: World, in_process: Any) -> None:
    """And the training goes on afterwards, on one device if need be."""
    lose_one(world, "lost")
    resumed = in_process(*arguments(world, "lost", "--resume", *OFTEN))
    assert resumed.code == 0, resumed.err
    assert "resumed at step" in resumed.err


def test_one_that_is_lost_in_a_validation_ends_the_others_too(world: World) -> None:
    """Each update is followed by a validation that takes a hundred times as long."""
    lose_one(world, "validating", "--set", "train.validations=600", "--set", "predict.tile_step=0.1")
