"""Figures on disk: whole rows only, none twice, none lost to a disk that was full for a while."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import RunError
from pipeline.history import HISTORY, History, read_history
from pipeline.plan import Plan
from pipeline.schedule import Schedule
from pipeline.task import TrainingState, TrainingTask

from .tiny_training import Listener, press_ctrl_c, run, tiny_task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(small_plan: Plan, tmp_path: Path) -> TrainingTask:
    return tiny_task(small_plan, tmp_path)


@contextmanager
def no_file_larger_than(size_bytes: int) -> Generator[None]:
    """The system refuses to write on, in the middle of a row, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_beyond_the_checkpoint_and_cut_short_are_dropped(task: TrainingTask) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(task, Listener({10: press_ctrl_c}))
    with (task.folder / HISTORY).open("a") as stream:
        stream.write(json.dumps({"step": 15, "loss": 1.0}) + '\n{"step": 16, "lo')
    run(task, resume=True)
    steps = [row["step"] for row in read_history(task.folder / HISTORY)]
    assert 15 not in steps
    assert steps == sorted(steps)


def test_the_best_validation_is_on_record(task: TrainingTask) -> None:
    run(task)
    first, last = [row for row in read_history(task.folder / HISTORY) if "dice/mean" in row]
    assert first["best/step"] == 10
    assert first["best/dice"] == first["dice/mean"]
    # The last validation takes all cases, which is not to be compared with the first case alone.
    assert (last["best/step"], last["best/dice"]) == (10, first["dice/mean"])


def test_rows_that_a_full_disk_refused_come_later(tmp_path: Path) -> None:
    listener = Listener()
    with History(tmp_path / HISTORY, 0, listener) as history:
        history.add(1, {"loss": 3.0})
        with no_file_larger_than(40):
            history.add(2, {"loss": 2.0})
            history.add(3, {"loss": 1.0})
        history.add(4, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_history(tmp_path / HISTORY)] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
        (4, 0.5),
    ]
    assert listener.notes == [f"the history waits: cannot write {tmp_path / HISTORY}: file too large"]
    assert [step for step, _ in listener.rows] == [1, 2, 3, 4]


def test_the_end_insists(tmp_path: Path) -> None:
    history = History(tmp_path / HISTORY, 0, Listener())
    with pytest.raises(RunError, match=r"cannot write .*history.jsonl"), no_file_larger_than(10), history:
        history.add(1, {"loss": 3.0})


def test_updates_without_a_number_are_counted_and_spoil_no_mean(tmp_path: Path) -> None:
    nothing: Any = None
    state = TrainingState(nothing, nothing, nothing, Schedule(((0, 3),)))
    with History(tmp_path / HISTORY, 0, Listener()) as history:
        for loss, norm in ((1.0, 4.0), (math.nan, math.inf), (3.0, 8.0)):
            state.step += 1
            history.update(state, {"loss": torch.tensor(loss), "norm": torch.tensor(norm)}, 0.1, 2)
    (row,) = read_history(tmp_path / HISTORY)
    assert (row["step"], row["loss"], row["norm"], row["skipped"]) == (3, 2.0, 6.0, 1.0)
