"""Minutes are kept on machines whose speed changes, and what was decided is repeated to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning_fabric import Fabric

from pipeline.checkpoint import CHECKPOINT
from pipeline.errors import RunError
from pipeline.files import write_json
from pipeline.pace import CHECKS, STEPS, Pace, first_schedule
from pipeline.plan import Plan
from pipeline.schedule import Schedule
from pipeline.task import TrainingTask

from .tiny_training import Listener, another, press_ctrl_c, run, same, tiny_task, with_settings

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE: Any = Fabric(accelerator="cpu", devices=1)

Speed = Callable[[float], float]
"""Seconds an update takes, that begins so many seconds into the training."""


@pytest.fixture
def task(small_plan: Plan, tmp_path: Path) -> TrainingTask:
    return tiny_task(small_plan, tmp_path)


def timed(task: TrainingTask, minutes: float) -> TrainingTask:
    return with_settings(task, steps=None, budget_minutes=minutes)


def record(task: TrainingTask) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((task.folder / STEPS).read_text())
    return result


class TestKeepingTime:
    """A clock of our own: an hour, of which each update takes what the machine's speed says at the moment."""

    def simulate(
        self, task: TrainingTask, first: int, speed: Speed, case_s: float = 0.0, *, fabric: Any = ALONE
    ) -> SimpleNamespace:
        task = timed(task, 60)
        timing = {"update_s": 3600 / first, "case_s": case_s, "spent_s": 0.0}
        identity = {"key": task.key(), "budget_minutes": 60}
        write_json(task.folder / STEPS, {**identity, "timing": timing, "steps": first, "schedule": [[0, first]]})
        state: Any = SimpleNamespace(schedule=Schedule(((0, first),)), step=0, elapsed_s=0.0, validations=0)
        pace = Pace(task, fabric, state)
        now = 0.0
        while state.step < state.schedule.steps:
            state.step += 1
            now += speed(now)
            state.elapsed_s = now
            pace.after_update(state)
            if state.schedule.validation_due(state.step, task.settings.validations):
                state.validations += 1
                cases = 2 if state.step == state.schedule.steps else task.settings.validation_cases
                seconds = case_s * math.ceil(cases / fabric.world_size)
                now += seconds
                pace.validated(seconds, cases)
        state.elapsed_s = now
        return state

    def test_a_machine_that_stays_as_it_was_keeps_its_count(self, task: TrainingTask) -> None:
        state = self.simulate(task, 1000, lambda _: 3.6)
        assert state.schedule.decisions == ((0, 1000),)

    def test_one_that_was_busy_when_it_was_timed_gets_its_updates_back(self, task: TrainingTask) -> None:
        """As in the log of 2026-11-22: 152 updates were counted on a busy machine that had time for 640."""
        state = self.simulate(task, 152, lambda _: 3600 / 640)
        assert state.schedule.steps == pytest.approx(640, rel=0.01)
        assert state.schedule.decisions[1][0] <= 10
        assert len(state.schedule.decisions) == 2

    @pytest.mark.parametrize("factor", [0.2, 3.0, 10.0])
    @pytest.mark.parametrize("when", [0.1, 0.5, 0.9])
    def test_one_that_gets_faster_or_slower_ends_in_time(self, task: TrainingTask, factor: float, when: float) -> None:
        state = self.simulate(task, 1000, lambda now: 3.6 * (factor if now > when * 3600 else 1.0))
        # What is counted every fiftieth of the time can be wrong by as much, at the speed that came after it.
        assert 3600 * 0.95 < state.elapsed_s < 3600 * (1 + max(1.0, factor) / CHECKS)

    def test_one_that_comes_and_goes_ends_in_time(self, task: TrainingTask) -> None:
        state = self.simulate(task, 2000, lambda now: 1.8 * (4 if int(now / 300) % 2 else 1))
        assert state.elapsed_s == pytest.approx(3600, rel=0.03)

    @pytest.mark.parametrize("case_s", [60.0, 300.0])
    def test_validations_have_their_time(self, task: TrainingTask, case_s: float) -> None:
        first = round((3600 - 3 * case_s) / 3.6)
        state = self.simulate(task, first, lambda _: 3.6, case_s)
        assert state.validations == 2
        assert state.elapsed_s == pytest.approx(3600, rel=0.03)

    def test_cases_that_several_processes_share_take_less(self, task: TrainingTask) -> None:
        two = SimpleNamespace(world_size=2, is_global_zero=True, broadcast=lambda value: value)
        task = with_settings(task, validation_cases=2)
        # Both validations take the time of one case.
        state = self.simulate(task, round(3000 / 3.6), lambda _: 3.6, 300.0, fabric=two)
        assert state.validations == 2
        assert state.elapsed_s == pytest.approx(3600, rel=0.01)
        assert len(state.schedule.decisions) == 1

    def test_a_disk_that_takes_no_record_takes_no_decision(self, task: TrainingTask) -> None:
        def speed(now: float) -> float:
            if now == 0.0:  # what cannot be written is where a folder stands
                (task.folder / STEPS).unlink()
                (task.folder / STEPS).mkdir()
            return 1.8

        state = self.simulate(task, 1000, speed)
        assert state.schedule.decisions == ((0, 1000),)


class TestRecord:
    def test_minutes_become_steps_and_are_recorded_before_the_first(self, task: TrainingTask) -> None:
        task = timed(task, 0.2)

        def stop() -> None:
            assert record(task)["budget_minutes"] == 0.2
            raise InterruptedError

        listener = Listener({10: stop})
        with pytest.raises(InterruptedError):
            run(task, listener)
        # No checkpoint was written, as after a kill; the decisions are those of the beginning none the less.
        assert not (task.folder / CHECKPOINT).exists()
        first = record(task)["schedule"]
        assert f"0.2 minutes hold {first[0][1]} updates" in listener.notes[0]
        again = Listener({10: stop})
        with pytest.raises(InterruptedError):
            run(task, again, resume=True)
        assert again.notes == [f"{first[-1][1]} updates, as timed when this training began"]
        assert record(task)["schedule"][: len(first)] == first

    def test_repeated_with_its_recorded_schedule_it_gives_the_same_weights(self, task: TrainingTask) -> None:
        (task.folder / STEPS).write_text("[]")  # one that says nothing is made anew
        minutes = timed(task, 0.02)
        learnt = run(minutes)
        kept = record(task)
        assert kept["steps"] == kept["schedule"][-1][1] == learnt.steps
        schedule = tuple(tuple(pair) for pair in kept["schedule"])
        assert same(run(another(task, "again", schedule=schedule)).weights, learnt.weights)

    def test_decisions_matter(self, task: TrainingTask) -> None:
        """Or else the tests of repeating them could not fail."""
        straight, bent = ((0, 20),), ((0, 10), (5, 20))
        weights = [run(another(task, f"{n}", schedule=s)).weights for n, s in enumerate((straight, bent))]
        assert not same(*weights)

    def test_decisions_that_outlived_their_checkpoint_are_taken_again(self, task: TrainingTask) -> None:
        """Killed after a decision and before the next checkpoint, which knew nothing of it."""
        whole = run(another(task, "whole", schedule=((0, 18), (12, 20))))
        broken = another(task, "broken", schedule=((0, 18),))
        with pytest.raises(KeyboardInterrupt):
            run(broken, Listener({10: press_ctrl_c}))
        broken = with_settings(timed(broken, 1000), schedule=None)
        kept = {"key": broken.key(), "budget_minutes": 1000, "schedule": [[0, 18], [12, 20]]}
        # So fast that nothing is counted anew.
        write_json(broken.folder / STEPS, {**kept, "timing": {"update_s": 1e-6}})
        assert same(run(broken, resume=True).weights, whole.weights)

    def test_another_budget_is_timed_anew(self, task: TrainingTask) -> None:
        kept = {"key": timed(task, 0.2).key(), "budget_minutes": 0.2, "schedule": [[0, 3]]}
        (task.folder / STEPS).write_text(json.dumps(kept))
        fabric: Any = Fabric(accelerator="cpu", devices=1)
        nothing: Any = None
        assert first_schedule(timed(task, 0.2), fabric, nothing, nothing, Listener()).steps == 3
        listener = Listener()
        run(timed(task, 0.01), listener)
        assert "0.01 minutes hold" in listener.notes[0]

    def test_without_any_end_there_is_none(self, task: TrainingTask) -> None:
        endless = with_settings(task, steps=None, budget_minutes=None)
        with pytest.raises(RunError, match=r"train.steps and train.budget_minutes are both null"):
            run(endless)
