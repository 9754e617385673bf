"""The training loop: one readable function.

Step n of a run depends on the seed, n and the weights alone: patches are drawn from (seed, n), so a resumed run
goes on exactly as the interrupted one would have.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

from lightning_fabric import Fabric

from pipeline.checkpoint import Checkpoints, has_checkpoint
from pipeline.dataset import Patches
from pipeline.device import Hardware, arithmetic, peak_memory_gb
from pipeline.errors import RunError
from pipeline.files import remove_leftovers
from pipeline.history import HISTORY, History, NoHistory
from pipeline.inspection.live import inspecting
from pipeline.loader import load
from pipeline.losses import Loss, build_loss
from pipeline.outputs import targets_of
from pipeline.pace import Pace, first_schedule, resumed_schedule
from pipeline.processes import (
    any_of,
    first_process_first,
    held_by_all,
    open_fabric,
    require_sharable,
    share_of_batch,
)
from pipeline.step import learning_rate, start_training, update
from pipeline.task import Observer, TrainingResult, TrainingState, TrainingTask
from pipeline.validation import validate_together, validation_cases


def train(task: TrainingTask, hardware: Hardware, observer: Observer, *, resume: bool) -> TrainingResult:
    """Train until the budget's steps are done; a checkpoint in `task.folder` lets it be resumed at any time.

    With several processes (`hardware.processes`) every one of them comes here and returns the same; the first alone
    writes and tells.

    Raises:
        RunError: a checkpoint is there and `resume` is off, or it belongs to another plan or config; memory does not
            suffice for one patch; ten updates in a row were not finite; the processes have different cases.
        PlanError: the batch cannot be shared out to the processes, or the network cannot be looked into.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    started = time.monotonic()
    with arithmetic(hardware, deterministic=task.settings.deterministic):
        fabric = open_fabric(hardware)
        teller = observer if fabric.is_global_zero else Silence()
        _require_same_cases(task, fabric)
        patches = _patches(task, fabric)
        loss = build_loss(task.loss, targets_of(task.schema))
        state = start_training(task, fabric)
        checkpoints = Checkpoints(task, teller)
        with first_process_first(fabric):
            if has_checkpoint(task.folder):
                _go_on(task, state, checkpoints, teller, resume=resume)
            if fabric.is_global_zero:
                remove_leftovers(task.folder)
        if state.step == 0:
            state.schedule = first_schedule(task, fabric, patches, loss, teller)
        else:
            started -= state.elapsed_s
        opened = History(task.folder / HISTORY, state.step, teller) if fabric.is_global_zero else NoHistory()
        with opened as history:
            _learn(Training(task, hardware, fabric, state, patches, loss, teller), history, checkpoints, started)
            history.add(state.step, {"memory_gb": peak_memory_gb(hardware)})
            if fabric.is_global_zero:
                checkpoints.save_last(state)
    weights = {k: v.detach().cpu().clone() for k, v in state.averaged.state_dict().items()}
    return TrainingResult(weights, state.steps, state.elapsed_s, state.dice)


@dataclass(frozen=True, eq=False)
class Training:
    """One training in this process."""

    task: TrainingTask
    hardware: Hardware
    fabric: Fabric
    state: TrainingState
    patches: Patches
    loss: Loss
    observer: Observer


class Silence:
    """An observer of the processes that are not to tell."""

    def progress(self, step: int, steps: int, loss: float) -> None:
        """Nothing."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""


def _learn(on: Training, history: History | NoHistory, checkpoints: Checkpoints, started: float) -> None:
    """Update after update, to the last."""
    task, fabric, state = on.task, on.fabric, on.state
    pace = Pace(task, fabric, state)
    loading = load(
        on.patches,
        state.step,
        pace.end(state),
        wanted=task.settings.workers,
        device=fabric.device,
        processes_here=on.hardware.devices,
        note=on.observer.note,
    )
    looking = inspecting(task, fabric, state, on.observer.note)
    with _interruptible() as interrupted, closing(loading), looking as look:
        for batch in loading:
            parts, rate = state.parts, learning_rate(task.settings, *state.schedule.position(state.step))
            values = update(task, fabric, state, on.loss, batch, rate)
            state.step += 1
            state.elapsed_s = time.monotonic() - started
            pace.after_update(state)
            history.update(state, values, rate, len(batch) * fabric.world_size, loading.wait_share)
            if rows := look(values):
                history.add(state.step, rows)
            if state.schedule.validation_due(state.step, task.settings.validations):
                _validate(on, history, pace)
            if state.step == state.steps:
                return
            stopping = any_of(fabric, interrupted())
            if fabric.is_global_zero:
                _save(on, checkpoints, parts, stopping=stopping)
            if stopping:
                raise KeyboardInterrupt


def _save(on: Training, checkpoints: Checkpoints, parts: int, *, stopping: bool) -> None:
    """A checkpoint where one is due: also when the batch has been split, so that a resumed run splits it likewise."""
    state = on.state
    if state.parts != parts:
        on.observer.note(
            f"memory ran out at update {state.step}: batches are computed in {state.parts} parts from now on, which "
            "takes longer and learns the same"
        )
    if stopping:
        checkpoints.save_last(state)
    elif checkpoints.due() or state.parts != parts:
        checkpoints.save(state)


def _go_on(
    task: TrainingTask, state: TrainingState, checkpoints: Checkpoints, observer: Observer, *, resume: bool
) -> None:
    if not resume:
        raise RunError(f"{task.folder}: an unfinished training is here; give --resume, or another --out")
    checkpoints.restore(state)
    state.schedule = resumed_schedule(task, state.schedule)
    observer.note(f"resumed at step {state.step} of {state.steps}")


def _validate(on: Training, history: History | NoHistory, pace: Pace) -> None:
    """Dice of the averaged weights. The best is for the record: the result is the weights of the end."""
    task, state = on.task, on.state
    begin, last = time.monotonic(), state.step == state.steps
    with on.fabric.autocast():
        state.dice = validate_together(task, state.averaged, on.fabric, last=last)
    cases = len(validation_cases(task, last=last))
    pace.validated(time.monotonic() - begin, cases)
    # All cases and the first few are not to be compared.
    mean = state.dice.get("mean") if cases <= task.settings.validation_cases else None
    if mean is not None and mean > state.best.get("dice", -1.0):
        state.best = {"step": state.step, "dice": mean}
    rows = {f"dice/{k}": v for k, v in state.dice.items()} | {f"best/{k}": v for k, v in state.best.items()}
    history.add(state.step, rows)


def _require_same_cases(task: TrainingTask, fabric: Fabric) -> None:
    """What one machine set aside and another did not would be learnt from, and validated, by a part of them only."""
    held = held_by_all(fabric, [case.case_id for case in (*task.training, *task.validation)])
    odd = sorted(set().union(*held) - set(held[0]).intersection(*held))
    if odd:
        raise RunError(
            f"case {odd[0]} could be prepared in some of the {fabric.world_size} processes only; every machine has to "
            "read all files of the data"
        )


def _patches(task: TrainingTask, fabric: Fabric) -> Patches:
    """Those that this process makes."""
    require_sharable(fabric, task.plan, task.loss)
    rows = share_of_batch(fabric, task.plan.batch_size)
    patches = Patches(
        task.training,
        task.plan,
        augment=task.augment,
        twin_classes=task.schema.twin_classes,
        foreground_share=task.settings.foreground_share,
        seed=task.settings.seed,
    )
    patches.rows = rows
    return patches


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that the loop asks for between updates; a second ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: object) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
