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

from pipeline.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from pipeline.dataset import Patches
from pipeline.device import Hardware, peak_memory_gb
from pipeline.errors import RunError
from pipeline.history import HISTORY, History
from pipeline.loader import prefetch
from pipeline.losses import Targets, build_loss
from pipeline.pace import timed_steps
from pipeline.step import learning_rate, start_training, update
from pipeline.task import Observer, TrainingResult, TrainingTask
from pipeline.validation import validate


def train(task: TrainingTask, hardware: Hardware, observer: Observer, *, resume: bool) -> TrainingResult:
    """Train until the budget's steps are done; a checkpoint in `task.folder` lets it be resumed at any time.

    Raises:
        RunError: a checkpoint is there and `resume` is off, or it belongs to another plan or config.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    fabric = Fabric(accelerator=hardware.device, devices=1, precision=hardware.precision)
    patches = _patches(task)
    loss = build_loss(task.loss, _targets(task))
    state = start_training(task, fabric)
    checkpoint = task.folder / CHECKPOINT
    if checkpoint.exists():
        if not resume:
            raise RunError(f"{task.folder}: an unfinished training is here; give --resume, or another --out")
        load_checkpoint(checkpoint, state, task)
        observer.note(f"resumed at step {state.step} of {state.steps}")
    else:
        state.steps = task.settings.steps or timed_steps(task, fabric, patches, loss, observer)
    validate_at = {round(state.steps * (n + 1) / task.settings.validations) for n in range(task.settings.validations)}
    dice: dict[str, float] = {}
    started, saved = time.monotonic() - state.elapsed_s, time.monotonic()
    with _interruptible() as interrupted, History(task.folder / HISTORY, state.step, observer) as history:
        for batch in prefetch(patches.batch, state.step, state.steps):
            rate = learning_rate(task.settings, state.step, state.steps)
            values = update(task, fabric, state, loss, batch.to(fabric.device), rate)
            state.step += 1
            state.elapsed_s = time.monotonic() - started
            history.update(state, values, rate, len(batch))
            if state.step in validate_at:
                dice = validate(task, state.averaged, last=state.step == state.steps)
                history.add(state.step, {f"dice/{k}": v for k, v in dice.items()})
            if interrupted() or time.monotonic() - saved > 60 * task.settings.checkpoint_minutes:
                save_checkpoint(checkpoint, state, task)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
        history.add(state.step, {"memory_gb": peak_memory_gb(hardware)})
    save_checkpoint(checkpoint, state, task)
    weights = {k: v.detach().cpu().clone() for k, v in state.averaged.state_dict().items()}
    return TrainingResult(weights, state.steps, state.elapsed_s, dice)


def _targets(task: TrainingTask) -> Targets:
    return Targets(task.schema.class_count, task.schema.region_classes, task.schema.ignored_class)


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
    """Turn the first Ctrl-C into a flag that the loop asks for between updates; a second one ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
