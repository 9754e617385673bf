"""What each of two gloo processes does for test_processes.py: `python -m tests.pipeline.two_processes FOLDER`.

Fabric starts the second one, which runs this module from its beginning too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pipeline.batch import Batch
from pipeline.device import Hardware
from pipeline.gradients import gradients_that_fit
from pipeline.losses import Targets, build_loss
from pipeline.plan import Plan
from pipeline.processes import open_fabric, require_shared, share_of_batch
from pipeline.step import start_training, update
from pipeline.task import TrainingTask, bare
from pipeline.train import train
from pipeline.validation import validate, validate_together
from tests.pipeline.tiny_training import Listener, phantom, tiny_task

TWO = Hardware("cpu", "32-true", devices=2)


def task_of_four(folder: Path, name: str = "") -> TrainingTask:
    """Twenty updates of four patches; the plan lies in `folder`."""
    task = tiny_task(Plan.model_validate_json((folder / "plan.json").read_text()), folder / name)
    settings = task.settings.model_copy(update={"optimiser": "sgd", "learning_rate": 0.01})
    plan = task.plan.model_copy(update={"batch_size": 4})
    return replace(task, plan=plan, settings=settings, training=[phantom(n) for n in range(5)])


def whole_batch() -> Batch:
    """The same in every process."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 8, 8, 8, generator=random)
    classes = torch.randint(0, 3, (4, 1, 8, 8, 8), generator=random, dtype=torch.uint8)
    return Batch(images, classes, torch.ones(4, 3, dtype=torch.bool), ("a", "b", "c", "d"))


def gradients(task: TrainingTask, fabric: Fabric, rows: range, *, most: int = 9) -> dict[str, Tensor]:
    """Of one batch; memory runs out for more than `most` patches at a time."""
    state = start_training(task, fabric)

    def ask_for_too_much(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > most:
            torch.empty(2**50)

    bare(state.network).register_forward_pre_hook(ask_for_too_much)
    loss = build_loss(task.loss, Targets(3))
    gradients_that_fit(task, fabric, state, loss, whole_batch().rows(rows.start, rows.stop))
    found = {name: p.grad.clone() for name, p in bare(state.network).named_parameters() if p.grad is not None}
    return {**found, "parts": torch.tensor(state.parts)}


def skipped(task: TrainingTask, fabric: Fabric, rows: range) -> tuple[int, list[list[str]]]:
    """After a voxel that is not finite in the last row."""
    state, batch = start_training(task, fabric), whole_batch()
    batch.images[3, 0, 2, 2, 2] = float("nan")
    update(task, fabric, state, build_loss(task.loss, Targets(3)), batch.rows(rows.start, rows.stop), 0.01)
    return state.skipped, state.suspects


def validated(task: TrainingTask, fabric: Fabric) -> tuple[dict[str, float], int]:
    """Dice of five cases before the first update, and how often this process asked the network for it."""
    task = replace(task, validation=[phantom(n) for n in range(5, 10)])
    network, asked = start_training(task, fabric).averaged, []
    network.register_forward_pre_hook(lambda *_: asked.append(1))
    together = fabric.world_size > 1
    dice = validate_together(task, network, fabric, last=True) if together else validate(task, network, last=True)
    return dice, len(asked)


def fault_of(work: Callable[[], object]) -> str:
    """What is raised, with its type; nothing if nothing is."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failed_validation(task: TrainingTask, fabric: Fabric) -> str:
    """What each process raises when a case of the second one does not fit."""
    second = replace(phantom(4), image=torch.zeros(2, 12, 14, 10)) if fabric.global_rank else phantom(4)
    task = replace(task, validation=[phantom(3), second])
    network = start_training(task, fabric).averaged
    return fault_of(lambda: validate_together(task, network, fabric, last=True))


def interrupted_and_resumed(folder: Path, rank: int) -> dict[str, Tensor]:
    """The second process is interrupted on the way, and both stop."""
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    first = Listener({10: lambda: os.kill(int((folder / "pid_1").read_text()), signal.SIGINT)})
    task = task_of_four(folder, "resumed")
    try:
        train(task, TWO, first, resume=False)
    except KeyboardInterrupt:
        return train(task, TWO, Listener(), resume=True).weights
    raise AssertionError("nobody stopped")


def refused(fabric: Fabric, folder: Path) -> str:
    """What is said of the folder; nothing if it will do."""
    folder.mkdir(exist_ok=True)
    return fault_of(lambda: require_shared(fabric, folder, within_s=0.5))


def other_cases(task: TrainingTask, rank: int) -> str:
    """What is said when the second process could not prepare all."""
    task = replace(task, validation=[phantom(n) for n in range(8, 10 - rank)])
    return fault_of(lambda: train(task, TWO, Listener(), resume=False))


def main(folder: Path) -> None:
    """Everything in one go, since the start takes longest."""
    torch.set_num_threads(1)
    fabric = open_fabric(TWO)
    rank, rows, task = fabric.global_rank, share_of_batch(fabric, 4), task_of_four(folder)
    straight = train(task_of_four(folder, "straight"), TWO, Listener(), resume=False)
    results = {
        "gradients": gradients(task, fabric, rows),
        "short of memory": gradients(task, fabric, rows, most=9 - 8 * rank),
        "skipped": skipped(task, fabric, rows),
        "straight": straight.weights,
        "dice": straight.dice,
        "validated": validated(task, fabric),
        "failed validation": failed_validation(task, fabric),
        "other cases": other_cases(task, rank),
        "resumed": interrupted_and_resumed(folder, rank),
        "shared": refused(fabric, folder / "shared"),
        "not shared": refused(fabric, folder / f"of_{rank}"),
    }
    torch.save(results, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
