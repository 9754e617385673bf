"""The training loop on phantoms: the same seed gives the same bytes, however often it is interrupted."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.checkpoint import CHECKPOINT
from pipeline.config import AugmentConfig, TrainConfig
from pipeline.dataset import PreparedCase
from pipeline.device import Hardware
from pipeline.errors import RunError
from pipeline.history import HISTORY, read_history
from pipeline.pace import STEPS
from pipeline.plan import Plan
from pipeline.step import average_decay, learning_rate
from pipeline.task import TrainingResult, TrainingTask
from pipeline.train import train
from pipeline.validation import validate
from transforms.geometry import Geometry
from transforms.labels import schema_from_names
from transforms.patches import class_positions

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.fixture
def task(small_plan: Plan, tmp_path: Path) -> TrainingTask:
    """Twenty updates of a tiny network on three phantoms."""
    return TrainingTask(
        plan=small_plan.model_copy(update={"patch_shape": (8, 8, 8), "batch_size": 2}),
        schema=schema_from_names({1: "bright", 2: "dark"}),
        training=[phantom(n) for n in range(3)],
        validation=[phantom(n) for n in range(3, 5)],
        settings=TrainConfig(steps=20, validations=2, validation_cases=1, learning_rate=0.02, weight_average=0.9),
        augment=AugmentConfig(),
        tile_step=0.5,
        folder=tmp_path,
    )


def another(task: TrainingTask, folder: str, **settings: Any) -> TrainingTask:
    (task.folder / folder).mkdir()
    values = task.settings.model_copy(update=settings)
    return replace(task, folder=task.folder / folder, settings=values)


def run(task: TrainingTask, listener: Listener | None = None, *, resume: bool = False) -> TrainingResult:
    return train(task, CPU, listener or Listener(), resume=resume)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


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
            [{k: v for k, v in row.items() if k not in ("patches_per_s", "memory_gb")} for row in read_history(path)]
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


class TestCheckpoint:
    @pytest.fixture
    def broken(self, task: TrainingTask) -> TrainingTask:
        with pytest.raises(KeyboardInterrupt):
            run(task, Listener({10: press_ctrl_c}))
        return task

    def test_it_holds_tensors_and_plain_values_only(self, broken: TrainingTask) -> None:
        document = torch.load(broken.folder / CHECKPOINT, weights_only=True)
        assert (document["step"], document["steps"]) == (10, 20)
        assert not list(broken.folder.glob(".*"))

    def test_it_is_not_overwritten_unasked(self, broken: TrainingTask) -> None:
        with pytest.raises(RunError, match=r"an unfinished training is here; give --resume, or another --out"):
            run(broken)

    @pytest.mark.parametrize("change", ["seed", "plan", "augment", "cases"])
    def test_it_is_not_resumed_with_anything_else(self, broken: TrainingTask, change: str) -> None:
        changed = {
            "seed": lambda: replace(broken, settings=broken.settings.model_copy(update={"seed": 1})),
            "plan": lambda: replace(broken, plan=broken.plan.model_copy(update={"batch_size": 3})),
            "augment": lambda: replace(broken, augment=AugmentConfig(noise_deviation=0.5)),
            "cases": lambda: replace(broken, training=broken.training[:2]),
        }
        with pytest.raises(RunError, match="made with another plan, config or set of cases than this run's"):
            run(changed[change](), resume=True)

    @pytest.mark.parametrize("damage", ["cut short", "text", "empty", "foreign", "pickle"])
    def test_a_damaged_one_is_named(self, broken: TrainingTask, damage: str) -> None:
        path = broken.folder / CHECKPOINT
        if damage == "foreign":
            torch.save({"weights": torch.zeros(3)}, path)
        elif damage == "pickle":
            # Protocol 0 of a call to os.mkdir, as an attacker would write it.
            path.write_bytes(f"cposix\nmkdir\n(V{broken.folder}/made\ntR.".encode())
        else:
            content = {"cut short": path.read_bytes()[:-5000], "text": b"hello", "empty": b""}[damage]
            path.write_bytes(content)
        with pytest.raises(RunError) as caught:
            run(broken, resume=True)
        assert str(caught.value).startswith(f"{path}: not a ")
        assert str(caught.value).endswith("delete it to start anew")
        assert not (broken.folder / "made").exists()

    def test_rows_beyond_it_and_cut_short_are_dropped(self, broken: TrainingTask) -> None:
        with (broken.folder / HISTORY).open("a") as stream:
            stream.write(json.dumps({"step": 15, "loss": 1.0}) + '\n{"step": 16, "lo')
        run(broken, resume=True)
        steps = [row["step"] for row in read_history(broken.folder / HISTORY)]
        assert 15 not in steps
        assert steps == sorted(steps)

    def test_a_finished_one_is_not_trained_again(self, task: TrainingTask) -> None:
        first = run(task)
        again = run(task, Listener({n: lambda: pytest.fail("trained again") for n in range(21)}), resume=True)
        assert same(first.weights, again.weights)


class TestBudget:
    def timed(self, task: TrainingTask, minutes: float) -> TrainingTask:
        settings = task.settings.model_copy(update={"steps": None, "budget_minutes": minutes})
        return replace(task, settings=settings)

    def test_minutes_become_steps_once_and_are_recorded_before_the_first(self, task: TrainingTask) -> None:
        task = self.timed(task, 0.1)

        def stop() -> None:
            record = json.loads((task.folder / STEPS).read_text())
            assert record["budget_minutes"] == 0.1
            raise InterruptedError

        listener = Listener({10: stop})
        with pytest.raises(InterruptedError):
            run(task, listener)
        # No checkpoint was written, as after a kill; the steps are those of the beginning none the less.
        assert not (task.folder / CHECKPOINT).exists()
        steps = json.loads((task.folder / STEPS).read_text())["steps"]
        assert f"0.1 minutes hold {steps} updates" in listener.notes[0]
        again = Listener({10: stop})
        with pytest.raises(InterruptedError):
            run(task, again, resume=True)
        assert again.notes == [f"{steps} updates, as timed when this training began"]

    def test_repeated_with_its_recorded_steps_it_gives_the_same_weights(self, task: TrainingTask) -> None:
        (task.folder / STEPS).write_text("[]")  # one that says nothing is made anew
        timed = run(self.timed(task, 0.01))
        record = json.loads((task.folder / STEPS).read_text())
        assert record["steps"] == timed.steps >= task.settings.validations
        assert same(run(another(task, "again", steps=timed.steps)).weights, timed.weights)

    def test_another_budget_is_timed_anew(self, task: TrainingTask) -> None:
        record = {"key": self.timed(task, 0.2).key(), "budget_minutes": 0.2, "steps": 3}
        (task.folder / STEPS).write_text(json.dumps(record))
        assert run(self.timed(task, 0.2)).steps == 3
        (task.folder / CHECKPOINT).unlink()
        listener = Listener()
        run(self.timed(task, 0.01), listener)
        assert "0.01 minutes hold" in listener.notes[0]

    def test_without_either_there_is_no_end(self, task: TrainingTask) -> None:
        settings = task.settings.model_copy(update={"steps": None, "budget_minutes": None})
        with pytest.raises(RunError, match=r"train.steps and train.budget_minutes are both null"):
            run(replace(task, settings=settings))


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
        assert {"loss", "learning_rate", "patches_per_s", "gradient_norm"} <= set(row)
        assert any(key.startswith("loss/") for key in row)
        assert listener.rows[-1][1].keys() == {"memory_gb"}


def test_a_full_disk_under_the_history_is_one_line(task: TrainingTask) -> None:
    def swap_for_a_full_device() -> None:
        (task.folder / HISTORY).unlink()
        (task.folder / HISTORY).symlink_to("/dev/full")

    with pytest.raises(RunError, match=r"history.jsonl: the disk is full; free some space"):
        run(task, Listener({10: swap_for_a_full_device}))
