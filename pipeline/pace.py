"""How many updates a time budget holds."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace

import torch
from lightning_fabric import Fabric

from pipeline.dataset import Patches
from pipeline.errors import RunError
from pipeline.files import write_json
from pipeline.loader import prefetch
from pipeline.losses import Loss
from pipeline.step import start_training, update
from pipeline.task import Observer, TrainingState, TrainingTask
from pipeline.validation import validate

STEPS = "steps.json"

TIMED_STEPS, WARM_STEPS = 12, 3
"""Updates that are timed to turn minutes into steps, after some that are not."""


def timed_steps(task: TrainingTask, fabric: Fabric, patches: Patches, loss: Loss, observer: Observer) -> int:
    """The updates that `budget_minutes` hold: timed once, recorded at once, and from then on what the record says."""
    if task.settings.budget_minutes is None:
        raise RunError("train.steps and train.budget_minutes are both null; set one of them")
    record = {"key": task.key(), "budget_minutes": task.settings.budget_minutes}
    path = task.folder / STEPS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if {key: before[key] for key in record} == record:
            observer.note(f"{before['steps']} updates, as timed when this training began")
            return int(before["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or one that says nothing
    steps = _count_steps(task, fabric, patches, loss, observer)
    write_json(path, {**record, "steps": steps})
    return steps


def _count_steps(task: TrainingTask, fabric: Fabric, patches: Patches, loss: Loss, observer: Observer) -> int:
    """Timed on a throw-away start, so that the run is unaffected."""
    settings, minutes = task.settings, task.settings.budget_minutes or 0.0
    begin = time.monotonic()
    trial = start_training(task, fabric)
    step_s = _time_updates(task, fabric, trial, patches, loss)
    stamp = time.monotonic()
    first = replace(task, validation=task.validation[:1])
    validate(first, trial.averaged, last=True)
    early = (settings.validations - 1) * min(settings.validation_cases, len(task.validation))
    validation_s = (time.monotonic() - stamp) * (early + len(task.validation))
    # The run itself starts from the seed, as if nothing had been timed.
    torch.manual_seed(settings.seed)
    left_s = 60 * minutes - (time.monotonic() - begin) - validation_s
    steps = max(settings.validations, int(left_s / step_s))
    observer.note(f"{step_s:.3f} s an update: {minutes:g} minutes hold {steps} updates")
    return steps


def _time_updates(task: TrainingTask, fabric: Fabric, trial: TrainingState, patches: Patches, loss: Loss) -> float:
    """Median seconds an update, loading included, after some to warm up; a moment's disturbance does not count."""
    seconds = []
    stamp = time.monotonic()
    for batch in prefetch(patches.batch, 0, WARM_STEPS + TIMED_STEPS):
        update(task, fabric, trial, loss, batch.to(fabric.device), 1e-6)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - stamp)
        stamp = time.monotonic()
    return statistics.median(seconds[WARM_STEPS:])
