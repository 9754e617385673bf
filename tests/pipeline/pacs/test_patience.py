"""Attempts, delays and deadlines, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.errors import PacsError
from pipeline.pacs.patience import Effort, Patience, Unreachable


class Clock:
    """Time passes only in sleep."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.slept_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.time_s += seconds

    def effort(self, attempts: int = 4, total_s: float = 1000.0, seed: int = 0) -> Effort:
        patience = Patience(1, 1, total_s, attempts, first_delay_s=1.0)
        return Effort(patience, np.random.default_rng(seed), sleep=self.sleep, now=lambda: self.time_s)


def failing(times: int) -> Callable[[], str]:
    left = [times]

    def act() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise Unreachable("away")
        return "done"

    return act


def test_delays_double_and_are_shaken_by_the_seed() -> None:
    one, same, other = Clock(), Clock(), Clock()
    assert one.effort().run(failing(3)) == "done"
    same.effort().run(failing(3))
    other.effort(seed=1).run(failing(3))
    assert one.slept_s == same.slept_s != other.slept_s
    for slept_s, longest_s in zip(one.slept_s, (1, 2, 4), strict=True):
        assert longest_s / 2 <= slept_s <= longest_s


def test_attempts_are_bounded() -> None:
    clock = Clock()
    with pytest.raises(Unreachable):
        clock.effort(attempts=3).run(failing(3))
    assert len(clock.slept_s) == 2


def test_a_refusal_is_not_tried_again() -> None:
    clock = Clock()

    def refused() -> None:
        raise PacsError("no")

    with pytest.raises(PacsError, match=r"^no$"):
        clock.effort().run(refused)
    assert clock.slept_s == []


def test_the_whole_has_an_end() -> None:
    clock = Clock()
    with pytest.raises(PacsError, match="time for the whole command is up"):
        clock.effort(attempts=100, total_s=5).run(failing(100))
    assert clock.time_s == 5


def test_progress_gives_new_attempts() -> None:
    left = [10]

    def step() -> None:
        left[0] -= 1
        raise Unreachable("away")

    clock = Clock()
    clock.effort(attempts=2).persist(step, lambda: left[0])
    assert left == [0]
    assert len(clock.slept_s) == 10


def test_without_progress_it_ends() -> None:
    clock = Clock()
    with pytest.raises(Unreachable):
        clock.effort(attempts=3).persist(failing(9), lambda: 1)  # type: ignore[arg-type]
    assert len(clock.slept_s) == 2
