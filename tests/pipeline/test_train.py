"""The training loop on phantoms: the same seed gives the same bytes, however often it is interrupted."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import AugmentConfig, TrainConfig
from pipeline.dataset import PreparedCase
from pipeline.history import HISTORY, read_history
from pipeline.plan import Plan
from pipeline.step import average_decay, learning_rate
from pipeline.task import TrainingTask
from pipeline.validation import validate
from transforms.geometry import Geometry

from .tiny_training import Listener, another, press_ctrl_c, run, same, tiny_task

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = {"patches_per_s", "seconds_per_update", "wait_share", "memory_gb"}
"""Figures of a history that no two runs share."""


@pytest.fixture
def task(small_plan: Plan, tmp_path: Path) -> TrainingTask:
    return tiny_task(small_plan, tmp_path)


class TestRepeatability:
    def test_the_same_seed_gives_the_same_weights(self, task: TrainingTask) -> None:
        first = run(another(task, "first"))
        torch.manual_seed(12345)  # what others did to the global state does not matter
        np.random.seed(7)
        second = run(another(task, "second"))
        assert same(first.weights, second.weights)
        assert not same(first.weights, run(another(task, "third", seed=1)).weights)

    @pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
    def test_an_interrupted_run_ends_as_one_that_was_not(self, task: TrainingTask, optimiser: str) -> None:
        straight = another(task, "straight", optimiser=optimiser, learning_rate=0.01)
        whole = run(straight)
        broken = another(task, "broken", optimiser=optimiser, learning_rate=0.01)
        with pytest.raises(KeyboardInterrupt):
            run(broken, Listener({10: press_ctrl_c}))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        listener = Listener()
        resumed = run(broken, listener, resume=True)
        assert listener.notes == ["resumed at step 10 of 20"]
        assert same(resumed.weights, whole.weights)
        assert (resumed.steps, resumed.dice) == (whole.steps, whole.dice)
        figures = [
            [{k: v for k, v in row.items() if k not in TIMES} for row in read_history(path)]
            for path in (straight.folder / HISTORY, broken.folder / HISTORY)
        ]
        assert figures[0] == figures[1]

    def test_looking_more_often_changes_nothing(self, task: TrainingTask) -> None:
        seldom = run(another(task, "seldom", validations=1))
        often = run(another(task, "often", validations=5, validation_cases=2, checkpoint_minutes=1e-6))
        assert same(seldom.weights, often.weights)

    def test_batch_statistics_are_resumed_too(self, task: TrainingTask) -> None:
        unet = task.plan.unet.model_copy(update={"normalisation": "batch"})
        task = replace(task, plan=task.plan.model_copy(update={"unet": unet}))
        whole = run(another(task, "straight"))
        broken = another(task, "broken")
        with pytest.raises(KeyboardInterrupt):
            run(broken, Listener({10: press_ctrl_c}))
        assert same(run(broken, resume=True).weights, whole.weights)


class TestLearning:
    def test_a_phantom_is_learnt(self, task: TrainingTask) -> None:
        settings = task.settings.model_copy(update={"steps": 120, "validation_cases": 2})
        result = run(replace(task, settings=settings, augment=AugmentConfig(gamma_probability=0)))
        assert result.dice["mean"] > 0.85
        losses = [row["loss"] for row in read_history(task.folder / HISTORY) if "loss" in row]
        assert losses[-1] < 0.5 * losses[0]

    def test_two_dimensions_and_deep_supervision(self, task: TrainingTask) -> None:
        unet = task.plan.unet.model_copy(
            update={
                "dimensions": 2,
                "strides": ((1, 1), (2, 2)),
                "kernel_shapes": ((3, 3), (3, 3)),
                "deep_supervision": True,
            }
        )
        plan = task.plan.model_copy(update={"unet": unet, "slice_axis": 2, "patch_shape": (8, 8, 1), "batch_size": 4})
        result = run(replace(task, plan=plan, settings=task.settings.model_copy(update={"steps": 4})))
        assert set(result.dice) == {"bright", "dark", "mean"}


class TestSchedule:
    def test_it_rises_then_falls_to_nothing(self) -> None:
        settings = TrainConfig(learning_rate=2.0, warmup=0.1)
        rates = [learning_rate(settings, step, 100) for step in range(100)]
        assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
        assert rates[10] == 2.0
        assert rates[55] == pytest.approx(1.0)  # half-way down a cosine
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.01

    @pytest.mark.parametrize("steps", [1, 2, 3])
    @pytest.mark.parametrize("warmup", [0.0, 0.9])
    def test_the_shortest_trainings_have_one(self, steps: int, warmup: float) -> None:
        settings = TrainConfig(learning_rate=1.0, warmup=warmup)
        assert all(0 < learning_rate(settings, step, steps) <= 1 for step in range(steps))

    def test_averages_forget_the_start(self) -> None:
        settings = TrainConfig(weight_average=0.9)
        assert average_decay(settings, 0) == 0.1
        assert average_decay(settings, 1000) == 0.9
        assert average_decay(TrainConfig(weight_average=0), 1000) == 0


class Oracle(nn.Module):
    """Says class 1 above 1, class 2 below -1, background between."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Tensor:
        classes = (image[:, 0] > 1).long() + 2 * (image[:, 0] < -1).long()
        return nn.functional.one_hot(classes, 3).movedim(-1, 1).float()


def painted(name: str, found: list[int], true: list[int]) -> PreparedCase:
    """A case of 8 voxels along k in which `Oracle` finds `found` where `true` is right."""
    shape = (4, 4, 8)
    image = torch.tensor([(0.0, 2.0, -2.0)[c] for c in found]).expand(1, *shape).clone()
    classes = torch.tensor(true, dtype=torch.uint8).expand(1, *shape).clone()
    return PreparedCase(name, Geometry(shape, np.eye(4)), image, classes, np.empty((0, 4), np.int32))


class TestValidation:
    def test_dice_is_that_of_a_hand_count(self, task: TrainingTask) -> None:
        cases = [
            painted("a", [0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]),  # 2 * 2 / 8; class 2 absent
            painted("b", [0, 1, 1, 1, 0, 2, 2, 2], [0, 1, 1, 1, 0, 2, 0, 0]),  # 1; 2 * 1 / 4
        ]
        task = replace(task, validation=cases)
        assert validate(task, Oracle(), last=True) == {"bright": 0.75, "dark": 0.5, "mean": 0.625}

    def test_only_the_last_takes_all_cases(self, task: TrainingTask) -> None:
        good = painted("a", [0, 1, 2, 0, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0])
        bad = painted("b", [0, 1, 2, 0, 0, 0, 0, 0], [0, 2, 1, 0, 0, 0, 0, 0])
        task = replace(task, validation=[good, bad])
        assert validate(task, Oracle(), last=False)["mean"] == 1
        assert validate(task, Oracle(), last=True)["mean"] == 0.5

    def test_a_label_that_is_nowhere_is_left_out(self, task: TrainingTask) -> None:
        nothing = painted("a", [0] * 8, [0] * 8)
        assert validate(replace(task, validation=[nothing]), Oracle(), last=True) == {}

    def test_it_is_told_as_it_was_planned(self, task: TrainingTask) -> None:
        listener = Listener()
        run(task, listener)
        assert [step for step, row in listener.rows if "dice/mean" in row] == [10, 20]
        row = listener.rows[0][1]
        assert {"loss", "learning_rate", "gradient_norm"} | TIMES - {"memory_gb"} <= set(row)
        assert any(key.startswith("loss/") for key in row)
        assert listener.rows[-1][1].keys() == {"memory_gb"}
