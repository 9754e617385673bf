"""Trainings that take a moment: a tiny network on phantoms, and who listens to them."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import AugmentConfig, TrainConfig
from pipeline.dataset import PreparedCase
from pipeline.device import Hardware
from pipeline.plan import Plan
from pipeline.task import TrainingResult, TrainingTask
from pipeline.train import train
from transforms.geometry import Geometry
from transforms.labels import schema_from_names
from transforms.patches import class_positions

CPU = Hardware("cpu", "32-true")
SHAPE = (12, 14, 10)


class Listener:
    """Remembers what it is told; `at` has something happen at a step."""

    def __init__(self, at: Mapping[int, Callable[[], Any]] | None = None) -> None:
        self.at = at or {}
        self.notes: list[str] = []
        self.rows: list[tuple[int, dict[str, float]]] = []

    def progress(self, step: int, steps: int, loss: float) -> None:
        assert 0 < step <= steps
        assert math.isfinite(loss)
        self.at.get(step, lambda: None)()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def note(self, message: str) -> None:
        self.notes.append(message)


def phantom(number: int) -> PreparedCase:
    """A bright box and a dark one in noise, elsewhere in each case."""
    random = np.random.default_rng(number)
    image = random.normal(0, 0.1, (1, *SHAPE)).astype(np.float32)
    classes = np.zeros((1, *SHAPE), np.uint8)
    for label, value in ((1, 2.0), (2, -2.0)):
        i, j = random.integers(0, 8, 2)
        box = (0, slice(i, i + 4), slice(j, j + 6), slice(5 * (label - 1), 5 * (label - 1) + 5))
        image[box] += value
        classes[box] = label
    return PreparedCase(
        f"case_{number}",
        Geometry(SHAPE, np.eye(4)),
        torch.from_numpy(image),
        torch.from_numpy(classes),
        class_positions(classes[0], class_count=3),
    )


def tiny_task(plan: Plan, folder: Path) -> TrainingTask:
    """Twenty updates of a tiny network on three phantoms."""
    return TrainingTask(
        plan=plan.model_copy(update={"patch_shape": (8, 8, 8), "batch_size": 2}),
        schema=schema_from_names({1: "bright", 2: "dark"}),
        training=[phantom(n) for n in range(3)],
        validation=[phantom(n) for n in range(3, 5)],
        settings=TrainConfig(steps=20, validations=2, validation_cases=1, learning_rate=0.02, weight_average=0.9),
        augment=AugmentConfig(),
        tile_step=0.5,
        folder=folder,
    )


def another(task: TrainingTask, folder: str, **settings: Any) -> TrainingTask:
    """The same in a folder of its own, with some settings changed."""
    (task.folder / folder).mkdir()
    return replace(with_settings(task, **settings), folder=task.folder / folder)


def with_settings(task: TrainingTask, **settings: Any) -> TrainingTask:
    return replace(task, settings=task.settings.model_copy(update=settings))


def run(task: TrainingTask, listener: Listener | None = None, *, resume: bool = False) -> TrainingResult:
    return train(task, CPU, listener or Listener(), resume=resume)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)
