"""Checkpoints are whole, checked, and kept until the next one is; a damaged one gives way to the one before."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import CHECKPOINT, CHECKPOINT_FORMAT, PREVIOUS, Checkpoints, has_checkpoint
from pipeline.config import AugmentConfig
from pipeline.errors import RunError
from pipeline.plan import Plan
from pipeline.task import TrainingTask

from .tiny_training import Listener, press_ctrl_c, run, same, tiny_task, with_settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(small_plan: Plan, tmp_path: Path) -> TrainingTask:
    return tiny_task(small_plan, tmp_path)


@pytest.fixture
def broken(task: TrainingTask) -> TrainingTask:
    """Interrupted at update 10, with the checkpoint of update 9 kept."""
    often = with_settings(task, checkpoint_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        run(often, Listener({10: press_ctrl_c}))
    return task


def document(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, read without the code under test."""
    header, content = path.read_bytes().split(b"\n", 1)
    assert header.decode() == f"{CHECKPOINT_FORMAT} {hashlib.sha256(content).hexdigest()}"
    result: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return result


def seal(path: Path, content: bytes) -> None:
    """Write what a checkpoint never is, with the header of one."""
    path.write_bytes(f"{CHECKPOINT_FORMAT} {hashlib.sha256(content).hexdigest()}\n".encode() + content)


class TestWriting:
    def test_it_holds_tensors_and_plain_values_only(self, broken: TrainingTask) -> None:
        found = document(broken.folder / CHECKPOINT)
        assert (found["step"], found["schedule"]) == (10, [[0, 20]])
        assert found["best"]["step"] == 10
        assert not list(broken.folder.glob(".*"))

    def test_the_one_before_is_kept(self, broken: TrainingTask) -> None:
        assert document(broken.folder / PREVIOUS)["step"] == 9

    def test_it_is_not_overwritten_unasked(self, broken: TrainingTask) -> None:
        for _ in range(2):
            with pytest.raises(RunError, match=r"an unfinished training is here; give --resume, or another --out"):
                run(broken)
            (broken.folder / CHECKPOINT).unlink(missing_ok=True)  # killed between the two renames

    def test_it_is_due_when_its_minutes_are_over(self, task: TrainingTask) -> None:
        assert not Checkpoints(with_settings(task, checkpoint_minutes=5.0), Listener()).due()
        assert Checkpoints(with_settings(task, checkpoint_minutes=1e-9), Listener()).due()


class TestReading:
    @pytest.mark.parametrize("change", ["seed", "plan", "augment", "cases"])
    def test_it_is_not_resumed_with_anything_else(self, broken: TrainingTask, change: str) -> None:
        changed: dict[str, Callable[[], TrainingTask]] = {
            "seed": lambda: with_settings(broken, seed=1),
            "plan": lambda: replace(broken, plan=broken.plan.model_copy(update={"batch_size": 3})),
            "augment": lambda: replace(broken, augment=AugmentConfig(noise_deviation=0.5)),
            "cases": lambda: replace(broken, training=broken.training[:2]),
        }
        with pytest.raises(RunError, match="made with another plan, config or set of cases than this run's"):
            run(changed[change](), resume=True)
        assert has_checkpoint(broken.folder)

    @pytest.mark.parametrize("damage", ["cut short", "one bit", "text", "empty", "gone"])
    def test_the_one_before_takes_the_place_of_a_damaged_one(
        self, task: TrainingTask, broken: TrainingTask, tmp_path: Path, damage: str
    ) -> None:
        spoil(broken.folder / CHECKPOINT, damage)
        listener = Listener()
        resumed = run(broken, listener, resume=True)
        (tmp_path / "whole").mkdir()
        assert same(resumed.weights, run(replace(task, folder=tmp_path / "whole")).weights)
        told = [f"{broken.folder / CHECKPOINT}: "] if damage != "gone" else []
        assert len(listener.notes) == len(told) + 1
        assert all(note.startswith(start) for note, start in zip(listener.notes, told, strict=False))
        assert listener.notes[-1] == "resumed at step 9 of 20"

    @pytest.mark.parametrize("damage", ["cut short", "text"])
    def test_two_damaged_ones_are_named(self, broken: TrainingTask, damage: str) -> None:
        for name in (CHECKPOINT, PREVIOUS):
            spoil(broken.folder / name, damage)
        with pytest.raises(RunError, match=r"checkpoint.previous.pt: .*; delete it to start anew$") as caught:
            run(broken, resume=True)
        assert "\n" not in str(caught.value)

    def test_one_of_another_version_is_left_for_that_version(self, broken: TrainingTask) -> None:
        path = broken.folder / CHECKPOINT
        later = path.read_bytes().replace(CHECKPOINT_FORMAT.encode(), b"volseg-checkpoint-99", 1)
        path.write_bytes(later)
        with pytest.raises(RunError, match=r"made by another version of volseg; resume with that one"):
            run(broken, resume=True)
        assert path.read_bytes() == later

    def test_a_damaged_one_does_not_become_the_one_before(self, broken: TrainingTask) -> None:
        """Killed after the next write's first rename, there would be no good one."""
        spoil(broken.folder / CHECKPOINT, "one bit")
        with pytest.raises(KeyboardInterrupt):
            run(broken, Listener({10: press_ctrl_c}), resume=True)
        assert [document(broken.folder / name)["step"] for name in (CHECKPOINT, PREVIOUS)] == [10, 9]

    def test_one_of_an_attacker_runs_nothing(self, broken: TrainingTask) -> None:
        # Protocol 0 of a call to os.mkdir, under a hash that is right.
        seal(broken.folder / CHECKPOINT, f"cposix\nmkdir\n(V{broken.folder}/made\ntR.".encode())
        run(broken, resume=True)
        assert not (broken.folder / "made").exists()

    def test_a_foreign_one_is_not_taken(self, broken: TrainingTask) -> None:
        buffer = io.BytesIO()
        torch.save({"weights": torch.zeros(3)}, buffer)
        (broken.folder / CHECKPOINT).write_bytes(buffer.getvalue())
        listener = Listener()
        run(broken, listener, resume=True)
        assert "not a readable checkpoint of this version of volseg; going on from the one before" in listener.notes[0]


def test_a_finished_one_is_not_trained_again(task: TrainingTask) -> None:
    first = run(task)
    again = run(task, Listener({n: lambda: pytest.fail("trained again") for n in range(21)}), resume=True)
    assert same(first.weights, again.weights)
    assert (again.dice, again.steps) == (first.dice, first.steps)


def test_minutes_go_on_where_they_stopped(task: TrainingTask) -> None:
    """A resumed run has spent what it had spent."""
    with pytest.raises(KeyboardInterrupt):
        run(task, Listener({10: press_ctrl_c}))
    spent_s = document(task.folder / CHECKPOINT)["elapsed_s"]
    assert run(task, resume=True).elapsed_s > spent_s > 0


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    spoilt = {
        "cut short": content[:-5000],
        "one bit": bytes(itertools.chain(content[:middle], [content[middle] ^ 1], content[middle + 1 :])),
        "text": b"hello",
        "empty": b"",
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(spoilt[damage])
