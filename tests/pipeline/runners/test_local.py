"""Folds in processes of their own: the same result as one after another, whatever happens to the processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.checkpoint import CHECKPOINT
from pipeline.config import parse_config
from pipeline.console import Silence
from pipeline.crossval import cross_validate
from pipeline.errors import RunError
from pipeline.runners import local
from pipeline.runners.job import FoldJob, Relay, job_document, job_of, retell
from pipeline.runners.local import Share, shares_of, side_by_side
from pipeline.runs import Run, open_run

from .conftest import Listener, config_at, kill, processes, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def own_processes(fold: int) -> list[int]:
    """Those of a fold that this process has started."""
    parents = {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in processes(f"fold {fold}")
    }
    return [pid for pid, parent in parents.items() if parent == os.getpid()]


class Killer(Listener):
    """Kills the process of fold 1 as soon as there is a checkpoint to go on from, once."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.killed = 0

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        checkpoint = self.run.fold_folder(1) / CHECKPOINT
        if what == "training fold 1" and done < total and checkpoint.exists() and not self.killed:
            for pid in own_processes(1):
                kill(pid)
                self.killed += 1


@pytest.mark.slow
def test_a_fold_whose_process_is_killed_ends_as_if_it_had_not_been(home: Path, undisturbed: Run) -> None:
    """And one with a fault of its own is told of, and does not take the others along."""
    run = open_run(config_at(home), home / "runs" / "killed", Silence())
    run.fold_folder(0).mkdir()
    (run.fold_folder(0) / CHECKPOINT).write_text("not a checkpoint")
    console = Killer(run)
    with pytest.raises(
        RunError, match=r"1 of 2 folds failed, the others are done; fold 0: .* not a readable checkpoint"
    ):
        cross_validate(run, [0, 1], console, runner=side_by_side(2, threads=1))
    assert console.killed == 1
    assert (
        "fold 1: its process was ended by SIGKILL, which is also how a system without memory ends processes; "
        "started again, 1 of 3 times"
    ) in console.notes
    assert any(note.startswith("fold 1: resumed at step ") for note in console.notes)
    assert sum(note.startswith("fold 0 failed: ") for note in console.notes) == 1
    # What is of no fold is told once, at the end.
    assert [note for note in console.notes if not note.startswith("fold ")] == console.notes[-1:]
    assert console.notes[-1].startswith("post-processing: nothing chosen")
    assert weights(run, 1) == weights(undisturbed, 1)
    assert processes("fold 0") == processes("fold 1") == []

    (run.fold_folder(0) / CHECKPOINT).unlink()
    cross_validate(run, [0, 1], console, runner=side_by_side(2, threads=1))
    assert "fold 1 is finished already, kept" in console.notes
    for name in ("report.json", "report.csv"):
        assert (run.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()


def test_a_process_that_always_dies_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "START", "import os; os.kill(os.getpid(), 11)")
    run = open_run(config_at(home), home / "runs" / "hopeless", Silence())
    console = Listener()
    with pytest.raises(
        RunError, match=r"^no fold was finished; fold 0: its process was ended by SIGSEGV, for the 4th time$"
    ):
        cross_validate(run, [0, 1], console, runner=side_by_side(2, threads=1))
    assert sum("started again" in note for note in console.notes) == 6


@pytest.mark.slow
def test_a_job_says_the_same_elsewhere(undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative = parse_config({"name": "x", "data": {"manifest": "cases.json"}, "runs": "here"}, source="test")
    run = Run(Path("here/x"), relative, *(getattr(undisturbed, n) for n in ("dataset", "folds", "plan", "hardware")))
    monkeypatch.chdir(tmp_path)
    job = FoldJob(**json.loads(json.dumps(job_document(job_of(run, 3, threads=2, gpu=1)))))
    assert (job.fold, job.threads, job.gpu, job.folder) == (3, 2, 1, str(tmp_path / "here" / "x"))
    config = parse_config(job.config, source="job")
    assert (config.runs, config.data.manifest) == (tmp_path / "here", tmp_path / "cases.json")
    assert config.train == relative.train.model_copy(update={"device": "cpu"})


def test_what_a_fold_tells_names_it_once() -> None:
    told: list[str] = []

    class Lines(Silence):
        def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
            told.append(f"{what} {done}/{total} {detail}")

        def note(self, message: str) -> None:
            told.append(message)

    relay = Relay(lambda message: retell(json.loads(json.dumps(message)), 2, Lines()))
    relay.note("fold 2: 3 cases to train on")
    relay.note("step 10: Dice mean 0.5")
    relay.progress("training fold 2", 1, 9, "loss 1")
    relay.progress("training fold 2", 2, 9, "too soon to be told")
    relay.progress("training fold 2", 9, 9, "loss 0")
    relay.progress("preprocessing", 1, 4)
    assert told == [
        "fold 2: 3 cases to train on",
        "fold 2: step 10: Dice mean 0.5",
        "training fold 2 1/9 loss 1",
        "training fold 2 9/9 loss 0",
        "fold 2: preprocessing 1/4 ",
    ]


@pytest.mark.slow
def test_threads_are_shared_and_cpus_have_no_gpu(undisturbed: Run) -> None:
    assert shares_of(undisturbed.hardware, undisturbed.plan, 3, 2) == [Share(2)] * 3
