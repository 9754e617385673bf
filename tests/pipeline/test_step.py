"""One update: the same in parts as whole, left out where it is not finite, within the memory that there is."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import AugmentConfig, LossConfig, LossTerms, TrainConfig
from pipeline.device import Hardware
from pipeline.errors import PlanError, RunError
from pipeline.gradients import gradients_that_fit, is_out_of_memory
from pipeline.losses import Loss, Targets, build_loss
from pipeline.plan import Plan
from pipeline.processes import open_fabric, require_sharable, share_of_batch
from pipeline.step import LEAST_SCALE, MOST_SKIPPED, start_training, update
from pipeline.task import TrainingState, TrainingTask, bare
from transforms.labels import schema_from_names

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Hardware("cpu", "32-true")
RATE = 0.01


@pytest.fixture
def task(small_plan: Plan, tmp_path: Path) -> TrainingTask:
    """A tiny network; what it would be trained on is handed in as batches."""
    return TrainingTask(
        plan=small_plan.model_copy(update={"patch_shape": (8, 8, 8), "batch_size": 4}),
        schema=schema_from_names({1: "bright", 2: "dark"}),
        training=(),
        validation=(),
        settings=TrainConfig(steps=20, weight_average=0.9),
        augment=AugmentConfig(),
        tile_step=0.5,
        folder=tmp_path,
    )


def with_unet(task: TrainingTask, **values: Any) -> TrainingTask:
    unet = task.plan.unet.model_copy(update=values)
    return replace(task, plan=task.plan.model_copy(update={"unet": unet}))


def some_batch(count: int = 4, seed: int = 0) -> Batch:
    """Noise with classes to match; one class is not annotated in the second patch."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 3, (count, 1, 8, 8, 8), generator=random, dtype=torch.uint8)
    images = classes + 0.5 * torch.randn(count, 1, 8, 8, 8, generator=random)
    annotated = torch.ones(count, 3, dtype=torch.bool)
    annotated[1:2, 2] = False
    return Batch(images, classes, annotated, tuple(f"case_{n}" for n in range(count)))


def with_value(batch: Batch, value: float) -> Batch:
    images = batch.images.clone()
    images[0, 0, 3, 3, 3] = value
    return replace(batch, images=images)


def loss_of(task: TrainingTask) -> Loss:
    return build_loss(task.loss, Targets(task.plan.class_count))


def begin(task: TrainingTask, fabric: Fabric | None = None) -> tuple[Fabric, TrainingState, Loss]:
    fabric = fabric or open_fabric(CPU)
    return fabric, start_training(task, fabric), loss_of(task)


def all_that_changes(state: TrainingState) -> list[Tensor]:
    moments = [v for row in state.optimiser.state_dict()["state"].values() for v in row.values()]
    tensors = [*bare(state.network).state_dict().values(), *state.averaged.state_dict().values(), *moments]
    return [tensor.clone() for tensor in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refuse_more_than(most: int, state: TrainingState) -> None:
    """From now on the real allocator refuses more patches than `most` at a time."""

    def ask_for_too_much(network: nn.Module, inputs: tuple[Tensor], _: object) -> None:
        if network.training and len(inputs[0]) > most:
            torch.empty(2**50)

    bare(state.network).register_forward_hook(ask_for_too_much)


class TestInParts:
    @pytest.mark.parametrize("parts", [2, 3, 4])
    @pytest.mark.parametrize(
        "terms", [LossTerms(dice=1, cross_entropy=1), LossTerms(tversky=0.5, focal=1, top_k=1, boundary=0.1)]
    )
    def test_the_gradients_are_those_of_the_whole(self, task: TrainingTask, parts: int, terms: LossTerms) -> None:
        task = replace(with_unet(task, deep_supervision=True), loss=LossConfig(terms=terms))
        fabric, state, loss = begin(task)
        bare(state.network).double()
        batch = some_batch()
        batch = replace(batch, images=batch.images.double())
        found = []
        for state.parts in (1, parts):
            figures = gradients_that_fit(task, fabric, state, loss, batch)
            gradients = [p.grad.clone() for p in state.network.parameters() if p.grad is not None]
            found.append([*gradients, *figures.values()])
        assert len(found[0]) == len(found[1]) > 10
        for whole, pieced in zip(*found, strict=True):
            torch.testing.assert_close(pieced, whole, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize(("most", "parts"), [(3, 2), (2, 2), (1, 4)])
    def test_it_is_halved_until_it_fits(self, task: TrainingTask, most: int, parts: int) -> None:
        task = replace(task, settings=task.settings.model_copy(update={"optimiser": "sgd"}))
        fabric, state, loss = begin(task)
        _, whole, _ = begin(task)
        update(task, fabric, whole, loss, some_batch(), RATE)
        refuse_more_than(most, state)
        update(task, fabric, state, loss, some_batch(), RATE)
        assert state.parts == parts
        for found, expected in zip(all_that_changes(state), all_that_changes(whole), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_one_patch_too_many_names_a_plan_that_fits_and_leaves_nothing(self, task: TrainingTask) -> None:
        fabric, state, loss = begin(task)
        refuse_more_than(0, state)
        before = all_that_changes(state)
        with pytest.raises(RunError, match=r"^out of memory with a single patch of 8x8x8; .*plan") as caught:
            update(task, fabric, state, loss, some_batch(), RATE)
        assert "\n" not in str(caught.value)
        assert all(p.grad is None for p in state.network.parameters())
        assert same(all_that_changes(state), before)

    @pytest.mark.parametrize("what", ["network.normalisation=batch", "loss.batch_dice"])
    def test_what_sees_the_whole_batch_is_not_split(self, task: TrainingTask, what: str) -> None:
        if what == "loss.batch_dice":
            task = replace(task, loss=LossConfig(batch_dice=True))
        else:
            task = with_unet(task, normalisation="batch")
        fabric, state, loss = begin(task)
        refuse_more_than(1, state)
        with pytest.raises(RunError, match=f"out of memory with 4 patches, which {what} does not allow"):
            update(task, fabric, state, loss, some_batch(), RATE)

    def test_other_errors_come_through(self, task: TrainingTask) -> None:
        fabric, state, loss = begin(task)
        batch = replace(some_batch(), images=torch.zeros(4, 2, 8, 8, 8))
        with pytest.raises(RuntimeError, match="channels"):
            update(task, fabric, state, loss, batch, RATE)
        assert not is_out_of_memory(ValueError("out of memory"))
        assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        assert is_out_of_memory(RuntimeError("could not create a primitive"))
        assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))


class TestNotFinite:
    @pytest.mark.parametrize(("value", "normalisation"), [(math.nan, "instance"), (math.inf, "batch")])
    def test_the_update_is_left_out(self, task: TrainingTask, value: float, normalisation: str) -> None:
        task = with_unet(task, normalisation=normalisation)
        fabric, state, loss = begin(task)
        update(task, fabric, state, loss, some_batch(), RATE)
        before = all_that_changes(state)
        figures = update(task, fabric, state, loss, with_value(some_batch(), value), RATE)
        assert state.skipped == 1
        assert all(math.isnan(figure) for figure in figures.values())
        assert same(all_that_changes(state), before)
        update(task, fabric, state, loss, some_batch(), RATE)
        assert (state.skipped, state.suspects) == (1, [])
        assert not same(all_that_changes(state), before)

    def test_ten_in_a_row_stop_it_and_name_the_cases(self, task: TrainingTask) -> None:
        fabric, state, loss = begin(task)
        bad = with_value(some_batch(2), math.nan)
        for _ in range(MOST_SKIPPED - 1):
            update(task, fabric, state, loss, bad, RATE)
        restored = start_training(task, fabric)
        restored.load_loop_state(copy.deepcopy(state.loop_state()))
        with pytest.raises(RunError, match=r"^10 updates in a row .* their cases: case_0, case_1;"):
            update(task, fabric, restored, loss, bad, RATE)

    def test_a_learning_rate_that_explodes(self, task: TrainingTask) -> None:
        fabric, state, loss = begin(task)

        def explode() -> None:
            for step in range(20):
                update(task, fabric, state, loss, some_batch(seed=step), 1e30)

        with pytest.raises(RunError, match=r"lower train.learning_rate"):
            explode()


class TestFloat16:
    """On the CPU, where gradients in float16 overflow as they do on a GPU."""

    @pytest.fixture
    def fabric(self) -> Fabric:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    def test_too_large_a_scale_is_lowered_and_is_no_fault(self, task: TrainingTask, fabric: Fabric) -> None:
        _, state, loss = begin(task, fabric)
        before = all_that_changes(state)
        update(task, fabric, state, loss, some_batch(), RATE)
        assert state.scaler is not None
        assert state.scaler.get_scale() == 2.0**29
        assert (state.skipped, state.suspects) == (0, [])
        assert same(all_that_changes(state), before)
        for _ in range(25):
            update(task, fabric, state, loss, some_batch(), RATE)
        assert state.scaler.get_scale() > LEAST_SCALE
        assert not same(all_that_changes(state), before)
        assert state.loop_state()["scaler"]["scale"] == state.scaler.get_scale()

    def test_a_voxel_that_is_not_finite_is(self, task: TrainingTask, fabric: Fabric) -> None:
        _, state, loss = begin(task, fabric)
        update(task, fabric, state, loss, with_value(some_batch(), math.nan), RATE)
        assert state.skipped == 1


class TestRepeatability:
    def test_what_an_update_draws_follows_from_its_number(self, task: TrainingTask) -> None:
        task = with_unet(task, block="residual", drop_path=0.5)
        results = []
        for noise, step in ((1, 3), (2, 3), (2, 4)):
            fabric, state, loss = begin(task)
            state.step = step
            torch.manual_seed(noise)
            update(task, fabric, state, loss, some_batch(), RATE)
            results.append(list(bare(state.network).state_dict().values()))
        assert same(results[0], results[1])
        assert not same(results[1], results[2])


class TestSharing:
    def test_alone_it_takes_every_row(self) -> None:
        assert share_of_batch(open_fabric(CPU), 5) == range(5)

    @pytest.mark.parametrize(("size", "near"), [(5, "4 or 6"), (1, "2")])
    def test_an_uneven_batch_is_refused(self, size: int, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Fabric, "world_size", 2)
        with pytest.raises(PlanError, match=f"cannot be shared out evenly to 2 devices; set plan.batch_size to {near}"):
            share_of_batch(open_fabric(CPU), size)

    def test_what_sees_the_whole_batch_is_refused(self, task: TrainingTask, monkeypatch: pytest.MonkeyPatch) -> None:
        fabric, plan = open_fabric(CPU), with_unet(task, normalisation="batch").plan
        require_sharable(fabric, plan, task.loss)
        monkeypatch.setattr(Fabric, "world_size", 2)
        with pytest.raises(PlanError, match=r"network.normalisation=batch .* 2 devices"):
            require_sharable(fabric, plan, task.loss)
        with pytest.raises(PlanError, match=r"network.name=attention_unet .* 2 devices"):
            require_sharable(fabric, task.plan.model_copy(update={"network": "attention_unet"}), task.loss)
        require_sharable(fabric, task.plan, task.loss)
