"""Progress that decisions bend and never let jump; validations where they were meant to be."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import TrainConfig
from pipeline.schedule import Schedule
from pipeline.step import learning_rate


def test_without_a_correction_the_position_is_the_number_of_the_update() -> None:
    schedule = Schedule(((0, 640),))
    assert [schedule.position(step) for step in (0, 1, 333, 640)] == [
        (pytest.approx(step), 640) for step in (0, 1, 333, 640)
    ]


def test_a_decision_bends_progress_where_it_is() -> None:
    # A quarter of 100 is done when there turn out to be 325: the other 300 share the other three quarters.
    schedule = Schedule(((0, 100),)).decide(25, 325)
    assert schedule.position(25) == (pytest.approx(325 / 4), 325)
    assert schedule.position(24) == (pytest.approx(24), 100)
    assert schedule.position(175) == (pytest.approx(325 * 5 / 8), 325)
    assert schedule.steps == 325


def test_the_rate_never_jumps() -> None:
    settings = TrainConfig(learning_rate=1.0, warmup=0.05)
    schedule = Schedule(((0, 152), (20, 640), (500, 520)))
    rates = [learning_rate(settings, *schedule.position(step)) for step in range(520)]
    assert rates[-1] < 0.01
    # The steepest part of half a cosine falls by pi / 2 over the updates that are left, at most a few dozen here.
    assert max(abs(a - b) for a, b in pairwise(rates[8:])) < 0.02


@pytest.mark.parametrize(
    ("decisions", "says"),
    [
        ((), "the first at update 0"),
        (((1, 10),), "the first at update 0"),
        (((0, 10), (5, 20), (5, 30)), "expected a rising order"),
        (((0, 10), (5, 5)), "expected more than 5"),
        (((0, 0),), "expected more than 0"),
    ],
)
def test_what_is_no_schedule_is_refused(decisions: tuple[tuple[int, int], ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Schedule(decisions)


@pytest.mark.parametrize("steps", [4, 5, 7, 20, 97, 640])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_validations_are_evenly_spread_and_the_last_is_at_the_end(steps: int, count: int) -> None:
    schedule = Schedule(((0, steps),))
    due = [step for step in range(1, steps + 1) if schedule.validation_due(step, count)]
    assert due == [math.ceil(steps * (n + 1) / count) for n in range(count)]


@given(
    first=st.integers(1, 50),
    later=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 100)), max_size=6),
    count=st.integers(1, 6),
)
def test_each_validation_comes_once_however_often_the_end_moves(
    first: int, later: list[tuple[int, int]], count: int
) -> None:
    schedule, at, seen, step = Schedule(((0, first),)), 0, 0, 0
    coming = iter(later)
    wait, left = next(coming, (0, 0))
    while step < schedule.steps:
        step += 1
        if left and step - at >= wait and step < schedule.steps:
            schedule, at = schedule.decide(step, step + left), step
            wait, left = next(coming, (0, 0))
        seen += schedule.validations(step, count) - schedule.validations(step - 1, count)
        assert schedule.validations(step, count) >= schedule.validations(step - 1, count)
    assert seen == count
    # What was decided later changes nothing about what came before: a resumed run sees the same.
    assert all(
        schedule.position(s) == Schedule(schedule.decisions[:n]).position(s)
        for n in range(1, len(schedule.decisions))
        for s in range(schedule.decisions[n][0])
    )
