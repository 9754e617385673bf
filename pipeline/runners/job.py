"""One fold as work for another process: plain values there, messages back.

All else is in the run folder, so a job may be begun again anywhere that sees it: a fold that is done stays as it is,
and one that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import parse_config
from pipeline.console import Console
from pipeline.errors import RunError, VolsegError, describe_fault
from pipeline.tracking.store_uri import checked_uri

if TYPE_CHECKING:
    from pipeline.runs import Run

RESTARTS = 3
"""How often a fold whose process or node was lost is started again."""

PROGRESS_EVERY_S = 0.25
"""Progress is told no more often than a reader can see."""

Message = Sequence[Any]
"""A kind (`note`, `progress` or `failed`), and what `Console` takes; JSON can hold it."""


@dataclass(frozen=True)
class FoldJob:
    """What a process needs to train one fold of a run that is set up.

    `gpu` is the number of its GPU among those that the process sees; None: the only one, or none.
    """

    config: dict[str, Any]
    folder: str
    fold: int
    threads: int
    gpu: int | None = None


def job_of(run: Run, fold: int, *, threads: int, gpu: int | None = None) -> FoldJob:
    """The job of a fold; it means the same in any working directory."""
    config, uri = run.config, run.config.tracking.uri
    paths = {key: value and value.absolute() for key, value in config.data}
    changes = {
        "runs": config.runs.absolute(),
        "data": config.data.model_copy(update=paths),
        # What `auto` was here it shall be there.
        "train": config.train.model_copy(update={"device": run.hardware.device}),
        "tracking": config.tracking.model_copy(update={"uri": uri and checked_uri(uri)}),
    }
    document = config.model_copy(update=changes).model_dump(mode="json")
    return FoldJob(document, str(run.folder.absolute()), fold, threads, gpu)


def do_job(job: FoldJob, tell: Callable[[Message], None]) -> None:
    """Train, predict and score a fold; a fault is told as `failed`.

    Raises:
        KeyboardInterrupt: after a checkpoint was written.
    """
    try:
        _train(job, Relay(tell))
    except Exception as error:  # whatever stopped the fold, whoever waits for it shall know
        tell(("failed", describe_fault(error)))


def _train(job: FoldJob, console: Console) -> None:
    import torch

    from pipeline.crossval import train_fold
    from pipeline.runs import open_run

    torch.set_num_threads(job.threads)
    if job.gpu is not None:
        torch.cuda.set_device(job.gpu)
    run = open_run(parse_config(job.config, source=job.folder), Path(job.folder), console, wanted=[job.fold])
    if not run.is_done(job.fold):
        train_fold(run, job.fold, console, resume=True)


def make_cache(run: Run, folds: Sequence[int], console: Console) -> None:
    """Preprocess all cases once, before folds that run at the same time would each do it."""
    from pipeline.runs import run_fold_cases

    # Every fold takes all the cases; what is wrong with some, each fold says for itself.
    with suppress(VolsegError):
        run_fold_cases(run, folds[0], console)


def job_document(job: FoldJob) -> dict[str, Any]:
    """A job as JSON can hold it; `FoldJob(**document)` is the job again."""
    return asdict(job)


class Outcomes:
    """What became of the folds that run somewhere: which were lost how often, and what stopped those that failed."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._faults: dict[int, Exception] = {}
        self._losses: Counter[int] = Counter()

    def faults(self) -> dict[int, Exception]:
        """What stopped those that failed, in the order of the folds, whichever failed first."""
        return dict(sorted(self._faults.items()))

    def fail(self, fold: int, reason: str) -> None:
        """The fold cannot be finished."""
        self._faults[fold] = RunError(reason)
        self._console.note(f"fold {fold} failed: {reason}")

    def is_to_restart(self, fold: int, how: str) -> bool:
        """Whether a fold whose process or node ended is begun again: not if it was through, nor time after time."""
        if self._run.is_done(fold) or fold in self._faults:
            return False
        self._losses[fold] += 1
        if self._losses[fold] > RESTARTS:
            self.fail(fold, f"{how}, for the {self._losses[fold]}th time")
            return False
        self._console.note(f"fold {fold}: {how}; started again, {self._losses[fold]} of {RESTARTS} times")
        return True


class Relay:
    """A console whose messages are told to another process."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell
        self._told: dict[str, float] = {}

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if done == total or now - self._told.get(what, 0.0) >= PROGRESS_EVERY_S:
            self._told[what] = now
            self._tell(("progress", what, done, total, detail))

    def note(self, message: str) -> None:
        self._tell(("note", message))


def retell(message: Message, fold: int, console: Console) -> None:
    """Say on a console what a fold told, with the fold's number where it is not in it already."""
    kind, text, *rest = message
    named = text if f"fold {fold}" in text else f"fold {fold}: {text}"
    if kind == "progress":
        console.progress(named, *rest)
    elif kind == "note":
        console.note(named)
