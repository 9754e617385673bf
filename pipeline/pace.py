"""How many updates a time budget holds: timed before the first, and put right on the way.

Fifty times over the budget the updates that are left are counted anew, from the speed of the last stretch. Every
decision is on disk before it is used, so that a resumed run takes the same ones at the same updates. A run that is
given them as `train.schedule` learns the same to the last bit.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric

from pipeline.dataset import Patches
from pipeline.errors import RunError
from pipeline.files import write_json
from pipeline.loader import prefetch
from pipeline.losses import Loss
from pipeline.processes import done_by_all, largest_share
from pipeline.schedule import Schedule
from pipeline.step import start_training, update
from pipeline.task import Observer, TrainingState, TrainingTask
from pipeline.validation import validate, validation_cases

STEPS = "steps.json"

TIMED_STEPS, WARM_STEPS = 12, 3
"""Updates that are timed to turn minutes into steps, after some that are not."""

CHECKS = 50
"""How often, over the budget, what is left is counted anew."""

TOLERANCE = 0.05
"""A count of what is left that differs by less changes nothing."""


@dataclass(frozen=True)
class Timing:
    """What the beginning of a training took; `spent_s` is the wall time of finding out.

    `case_s` is of a validation case while every other process computes one too, as in a validation.
    """

    update_s: float
    case_s: float
    spent_s: float


def first_schedule(task: TrainingTask, fabric: Fabric, patches: Patches, loss: Loss, observer: Observer) -> Schedule:
    """What the config says; else what an earlier beginning of this training decided; else what is timed now.

    Raises:
        RunError: the config gives neither minutes nor steps, or the folder cannot be written.
    """
    if fixed := fixed_schedule(task):
        return fixed
    if task.settings.budget_minutes is None:
        raise RunError("train.steps and train.budget_minutes are both null; set one of them")
    if recorded := _recorded(task):
        observer.note(f"{recorded.steps} updates, as timed when this training began")
        return recorded
    timing = _time(task, fabric, patches, loss)
    # The first process decides for all.
    left_s = 60 * task.settings.budget_minutes - timing.spent_s - _cases_to_come(task, fabric) * timing.case_s
    steps = fabric.broadcast(max(task.settings.validations, int(left_s / timing.update_s)))
    schedule = Schedule(((0, steps),))
    if fabric.is_global_zero:
        _record(task, schedule, timing)
    observer.note(f"{timing.update_s:.3f} s an update: {task.settings.budget_minutes:g} minutes hold {steps} updates")
    return schedule


def resumed_schedule(task: TrainingTask, saved: Schedule) -> Schedule:
    """Decisions outlive the checkpoint that they were made after: the record goes before what was `saved` with it."""
    return fixed_schedule(task) or _recorded(task) or saved


def fixed_schedule(task: TrainingTask) -> Schedule | None:
    """The schedule that the config itself gives."""
    if task.settings.schedule:
        return Schedule(task.settings.schedule)
    return Schedule(((0, task.settings.steps),)) if task.settings.steps else None


class Pace:
    """Keeps a training inside its minutes, which a machine that others use would make too many or too few."""

    def __init__(self, task: TrainingTask, fabric: Fabric, state: TrainingState) -> None:
        self._task, self._fabric = task, fabric
        self._budget_s = 0.0 if fixed_schedule(task) else 60 * (task.settings.budget_minutes or 0)
        timing = _read_record(task).get("timing", {})
        self._case_s = float(timing.get("case_s", 0.0))
        # Decisions that outlived the checkpoint are taken again before new ones are made, and the first update
        # after that does not count: it waits for the first batch.
        self._since = max(state.step, state.schedule.decisions[-1][0]) + 1
        self._since_s, self._validated_s = 0.0, 0.0
        self._next = self._since + fabric.broadcast(self._stretch(float(timing.get("update_s", 0.0))))

    def end(self, state: TrainingState) -> int:
        """The update that the training will not go beyond."""
        return state.steps if not self._budget_s or state.step == state.steps else sys.maxsize

    def validated(self, seconds: float, cases: int) -> None:
        """So many cases took this long: it is none of the updates' time, and says what the coming ones take."""
        self._validated_s += seconds
        self._case_s = seconds / max(1, largest_share(self._fabric, cases))

    def after_update(self, state: TrainingState) -> None:
        """Count anew where it is time to; the decision is on disk before it is in `state`."""
        if state.step == self._since:
            self._since_s, self._validated_s = state.elapsed_s, 0.0
        if not self._budget_s or state.step < self._next or state.step >= state.schedule.steps:
            return
        update_s = (state.elapsed_s - self._since_s - self._validated_s) / (state.step - self._since)
        self._since, self._since_s, self._validated_s = state.step, state.elapsed_s, 0.0
        steps, stretch = self._fabric.broadcast((self._count(state, update_s), self._stretch(update_s)))
        self._next = state.step + stretch
        left = state.schedule.steps - state.step
        if abs(steps - state.step - left) > TOLERANCE * left:
            self._decide(state, steps)

    def _count(self, state: TrainingState, update_s: float) -> int:
        """Updates in all, of which those to come fit into the time that is left beside the validations."""
        validations_s = self._case_s * _cases_to_come(self._task, self._fabric, state)
        left_s = self._budget_s - state.elapsed_s - validations_s
        return state.step + max(1, int(left_s / max(1e-9, update_s)))

    def _stretch(self, update_s: float) -> int:
        """Updates until the next count."""
        return max(1, round(self._budget_s / CHECKS / update_s)) if update_s > 0 else 1

    def _decide(self, state: TrainingState, steps: int) -> None:
        schedule = state.schedule.decide(state.step, steps)
        recorded = True
        if self._fabric.is_global_zero:
            try:
                _record(self._task, schedule)
            except RunError:  # a full disk: what cannot be kept is not decided
                recorded = False
        if self._fabric.broadcast(recorded):
            state.schedule = schedule


def _cases_to_come(task: TrainingTask, fabric: Fabric, state: TrainingState | None = None) -> int:
    """Cases one after another in the validations to come: those that the first process has of each."""
    settings = task.settings
    few, every = (largest_share(fabric, len(validation_cases(task, last=last))) for last in (False, True))
    # One that follows on this very update is still to come.
    done = 0 if state is None else state.schedule.validations(state.step - 1, settings.validations)
    early = max(0, settings.validations - 1 - done)
    return early * few + every


def _record(task: TrainingTask, schedule: Schedule, timing: Timing | None = None) -> None:
    timed = vars(timing) if timing else _read_record(task).get("timing", {})
    record = {
        **_identity(task),
        "timing": {key: round(value, 6) for key, value in timed.items()},
        "steps": schedule.steps,
        "schedule": [list(decision) for decision in schedule.decisions],
    }
    write_json(task.folder / STEPS, record)


def _identity(task: TrainingTask) -> dict[str, Any]:
    return {"key": task.key(), "budget_minutes": task.settings.budget_minutes}


def _read_record(task: TrainingTask) -> dict[str, Any]:
    """The record of this very training; empty if there is none or it says nothing."""
    try:
        record = json.loads((task.folder / STEPS).read_text(encoding="utf-8"))
        return dict(record) if _identity(task).items() <= record.items() else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _recorded(task: TrainingTask) -> Schedule | None:
    try:
        return Schedule.of(_read_record(task)["schedule"])
    except (KeyError, ValueError, TypeError):
        return None


def _time(task: TrainingTask, fabric: Fabric, patches: Patches, loss: Loss) -> Timing:
    """On a throw-away start, so that the run is unaffected."""
    begin = time.monotonic()
    trial = start_training(task, fabric)
    update_s = _time_updates(task, fabric, trial, patches, loss)
    stamp = time.monotonic()
    with fabric.autocast():
        done_by_all(fabric, lambda: validate(replace(task, validation=task.validation[:1]), trial.averaged, last=True))
    now = time.monotonic()
    # The run itself starts from the seed, as if nothing had been timed.
    torch.manual_seed(task.settings.seed)
    return Timing(update_s, now - stamp, now - begin)


def _time_updates(task: TrainingTask, fabric: Fabric, trial: TrainingState, patches: Patches, loss: Loss) -> float:
    """Median seconds an update, loading included, after some to warm up; a moment's disturbance does not count."""
    seconds = []
    stamp = time.monotonic()
    for batch in prefetch(patches.batch, 0, WARM_STEPS + TIMED_STEPS):
        update(task, fabric, trial, loss, batch, 1e-6)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - stamp)
        stamp = time.monotonic()
    return statistics.median(seconds[WARM_STEPS:])
