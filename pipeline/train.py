"""The training loop: one readable function.

Step n of a run depends on the seed, n and the weights alone: patches are drawn from (seed, n), so a resumed run
goes on exactly as the interrupted one would have.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_fabric import Fabric

from pipeline.checkpoint import Checkpoints, has_checkpoint
from pipeline.dataset import Patches
from pipeline.device import Hardware, peak_memory_gb
from pipeline.errors import RunError
from pipeline.files import remove_leftovers
from pipeline.history import HISTORY, History
from pipeline.loader import prefetch
from pipeline.losses import build_loss
from pipeline.outputs import targets_of
from pipeline.pace import Pace, first_schedule, resumed_schedule
from pipeline.step import learning_rate, start_training, update
from pipeline.task import Observer, TrainingResult, TrainingState, TrainingTask
from pipeline.validation import validate


def train(task: TrainingTask, hardware: Hardware, observer: Observer, *, resume: bool) -> TrainingResult:
    """Train until the budget's steps are done; a checkpoint in `task.folder` lets it be resumed at any time.

    Raises:
        RunError: a checkpoint is there and `resume` is off, or it belongs to another plan or config.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    started = time.monotonic()
    fabric = Fabric(accelerator=hardware.device, devices=1, precision=hardware.precision)
    patches = _patches(task)
    loss = build_loss(task.loss, targets_of(task.schema))
    state = start_training(task, fabric)
    if fabric.is_global_zero:
        remove_leftovers(task.folder)
    checkpoints = Checkpoints(task, observer)
    if has_checkpoint(task.folder):
        if not resume:
            raise RunError(f"{task.folder}: an unfinished training is here; give --resume, or another --out")
        checkpoints.restore(state)
        started -= state.elapsed_s
        state.schedule = resumed_schedule(task, state.schedule)
        observer.note(f"resumed at step {state.step} of {state.steps}")
    else:
        state.schedule = first_schedule(task, fabric, patches, loss, observer)
    pace = Pace(task, fabric, state)
    with _interruptible() as interrupted, History(task.folder / HISTORY, state.step, observer) as history:
        for batch in prefetch(patches.batch, state.step, pace.end(state)):
            rate = learning_rate(task.settings, *state.schedule.position(state.step))
            values = update(task, fabric, state, loss, batch.to(fabric.device), rate)
            state.step += 1
            state.elapsed_s = time.monotonic() - started
            pace.after_update(state)
            history.update(state, values, rate, len(batch))
            if state.schedule.validation_due(state.step, task.settings.validations):
                _validate(task, state, history, pace)
            if state.step == state.steps:
                break
            if interrupted():
                checkpoints.save_last(state)
                raise KeyboardInterrupt
            if checkpoints.due():
                checkpoints.save(state)
        history.add(state.step, {"memory_gb": peak_memory_gb(hardware)})
        checkpoints.save_last(state)
    weights = {k: v.detach().cpu().clone() for k, v in state.averaged.state_dict().items()}
    return TrainingResult(weights, state.steps, state.elapsed_s, state.dice)


def _validate(task: TrainingTask, state: TrainingState, history: History, pace: Pace) -> None:
    """Dice of the averaged weights. The best is for the record: the result is the weights of the end."""
    begin, last = time.monotonic(), state.step == state.steps
    state.dice = validate(task, state.averaged, last=last)
    cases = len(task.validation) if last else min(len(task.validation), task.settings.validation_cases)
    pace.validated(time.monotonic() - begin, cases)
    # All cases and the first few are not to be compared.
    mean = state.dice.get("mean") if cases <= task.settings.validation_cases else None
    if mean is not None and mean > state.best.get("dice", -1.0):
        state.best = {"step": state.step, "dice": mean}
    rows = {f"dice/{k}": v for k, v in state.dice.items()} | {f"best/{k}": v for k, v in state.best.items()}
    history.add(state.step, rows)


def _patches(task: TrainingTask) -> Patches:
    return Patches(
        task.training,
        task.plan,
        augment=task.augment,
        twin_classes=task.schema.twin_classes,
        foreground_share=task.settings.foreground_share,
        seed=task.settings.seed,
    )


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
