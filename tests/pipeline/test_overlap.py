"""Stages that overlap: the same outcomes in the same order as one at a time, within bounds, and a clean end."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pipeline.errors import RunError, VolsegError
from pipeline.overlap import IN_FLIGHT, SWITCH_S, Stages, one_at_a_time, overlapped

LONG_S = 20.0
"""Longer than anything here takes; a stage that waits so long waits for what never comes."""

ITEMS = list(range(6))


class Value:
    """What a stage hands on; weak references to it can be had."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class Story:
    """Which stage of which item has begun and ended, and who waits for that."""

    told: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def tell(self, what: str) -> None:
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()

    def wait(self, what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: what in self.told, LONG_S), f"{what} never came: {self.told}"

    def comes_before(self, first: str, second: str) -> bool:
        return self.told.index(first) < self.told.index(second)


def stages_of(story: Story, *, room: int | None = 10, size: int = 10) -> Stages[int, int, Value, Value, str]:
    def stage(name: str) -> Callable[[int, Any], Value]:
        def run(item: int, value: Any) -> Value:
            story.tell(f"{name} {item} begins")
            story.tell(f"{name} {item} ends")
            return Value(item)

        return run

    def write(item: int, made: Value) -> str:
        stage("write")(item, made)
        assert made.number == item
        return f"file {item}"

    return Stages(
        open=lambda item: item,
        size=lambda opened: size,
        read=stage("read"),
        room=lambda value, writing: room,
        work=stage("work"),
        write=write,
    )


def failing(stages: Stages[int, int, Value, Value, str], faults: dict[int, str], error: type[VolsegError]) -> Any:
    """Stages of which the named one fails for an item."""

    def open_(item: int) -> int:
        if faults.get(item) == "open":
            raise error(f"open {item}")
        return stages.open(item)

    def named(name: str, run: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        def attempt(item: int, value: Any) -> Any:
            if faults.get(item) == name:
                raise error(f"{name} {item}")
            return run(item, value)

        return attempt

    return replace(
        stages,
        open=open_,
        read=named("read", stages.read),
        work=named("work", stages.work),
        write=named("write", stages.write),
    )


def outcomes(run: Any, items: Sequence[int], stages: Any) -> list[tuple[int, str]]:
    return [(item, str(outcome)) for item, outcome in run(items, stages)]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("volseg")]


@pytest.mark.parametrize("room", [10, 5, None])
@pytest.mark.parametrize("items", [[], [0], ITEMS])
def test_outcomes_are_those_of_one_at_a_time(items: list[int], room: int | None) -> None:
    found = outcomes(overlapped, items, stages_of(Story(), room=room))
    assert found == outcomes(one_at_a_time, items, stages_of(Story())) == [(n, f"file {n}") for n in items]
    assert threads() == []


@pytest.mark.parametrize("room", [10, 5, None])
def test_what_fails_at_any_stage_is_set_aside_in_its_place(room: int | None) -> None:
    faults = {0: "read", 1: "work", 3: "write", 4: "open", 5: "work"}
    found = outcomes(overlapped, ITEMS, failing(stages_of(Story(), room=room), faults, VolsegError))
    expected = [(n, f"{faults[n]} {n}" if n in faults else f"file {n}") for n in ITEMS]
    assert found == expected
    assert outcomes(one_at_a_time, ITEMS, failing(stages_of(Story()), faults, VolsegError)) == expected


@pytest.mark.parametrize("stage", ["open", "read", "work", "write"])
def test_what_concerns_all_ends_everything(stage: str) -> None:
    for run in (overlapped, one_at_a_time):
        story = Story()
        with pytest.raises(RunError, match=f"{stage} 2"):
            outcomes(run, ITEMS, failing(stages_of(story), {2: stage}, RunError))
        assert "work 5 begins" not in story.told
        assert threads() == []


def test_three_items_are_in_their_stages_at_once() -> None:
    story = Story()
    plain = stages_of(story)

    def work(item: int, value: Value) -> Value:
        if item == 1:
            story.wait("read 2 begins")
            story.wait("write 0 waits")
        return plain.work(item, value)

    def write(item: int, made: Value) -> str:
        if item == 0:
            story.tell("write 0 waits")
            story.wait("read 2 ends")
        return plain.write(item, made)

    assert len(outcomes(overlapped, ITEMS, replace(plain, work=work, write=write))) == len(ITEMS)
    assert IN_FLIGHT == 3


def test_no_more_than_that_is_held() -> None:
    story, alive = Story(), weakref.WeakSet[Value]()
    plain = stages_of(story)
    most = 0

    def read(item: int, opened: int) -> Value:
        value = plain.read(item, opened)
        alive.add(value)
        return value

    def work(item: int, value: Value) -> Value:
        nonlocal most
        if item + 1 < len(ITEMS):
            story.wait(f"read {item + 1} ends")
        gc.collect()
        most = max(most, len(alive))
        plain.work(item, value)
        return value  # the source goes on to be written

    outcomes(overlapped, ITEMS, replace(plain, read=read, work=work))
    gc.collect()
    assert (most, len(alive)) == (IN_FLIGHT, 0)


def test_nothing_goes_on_beside_an_item_without_room() -> None:
    story = Story()
    outcomes(overlapped, ITEMS, stages_of(story, room=None))
    for n in ITEMS[1:]:
        assert story.comes_before(f"write {n - 1} ends", f"read {n} begins")


def test_an_item_larger_than_the_room_waits_until_the_one_before_is_written() -> None:
    story = Story()
    plain = stages_of(story)
    stages = replace(plain, size=lambda opened: 11 if opened == 3 else 10)
    outcomes(overlapped, ITEMS, stages)
    assert story.comes_before("write 2 ends", "read 3 begins")


def test_room_is_asked_with_what_is_being_written() -> None:
    story, asked = Story(), []
    plain = stages_of(story)

    def room(value: Value, writing: Value | None) -> int:
        asked.append((value.number, None if writing is None else writing.number))
        story.tell(f"room {value.number}")
        return 10

    def write(item: int, made: Value) -> str:
        if item + 1 < len(ITEMS):
            story.wait(f"room {item + 1}")
        return plain.write(item, made)

    outcomes(overlapped, ITEMS, replace(plain, room=room, write=write))
    assert asked == [(0, None), *((n, n - 1) for n in ITEMS[1:])]


def test_an_interrupt_lets_what_is_being_written_end_and_begins_nothing() -> None:
    story = Story()
    plain = stages_of(story)

    def work(item: int, value: Value) -> Value:
        if item == 2:
            story.wait("write 1 waits")
            story.tell("interrupt")
            raise KeyboardInterrupt
        return plain.work(item, value)

    def write(item: int, made: Value) -> str:
        if item == 1:
            story.tell("write 1 waits")
            story.wait("interrupt")
        return plain.write(item, made)

    with pytest.raises(KeyboardInterrupt), closing(overlapped(ITEMS, replace(plain, work=work, write=write))) as run:
        list(run)
    assert "write 1 ends" in story.told
    assert not [what for what in story.told if what.startswith(("write 2", "work 3", "read 4", "read 5"))]
    assert threads() == []


def test_threads_make_way_sooner_while_there_are_any() -> None:
    before, seen = sys.getswitchinterval(), []
    plain = stages_of(Story())

    def work(item: int, value: Value) -> Value:
        seen.append(sys.getswitchinterval())
        return plain.work(item, value)

    outcomes(overlapped, ITEMS[:1], replace(plain, work=work))
    assert seen == [pytest.approx(SWITCH_S)]
    assert sys.getswitchinterval() == before > SWITCH_S


def test_who_stops_asking_stops_the_work() -> None:
    story = Story()
    with closing(overlapped(ITEMS, stages_of(story, room=None))) as run:
        next(run)
    assert threads() == []
    assert "work 4 begins" not in story.told
