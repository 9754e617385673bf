"""Three stages of work on one item after another that overlap: while one is worked on in the calling thread, the next
is read in a second thread, and the one before is written in a third.

Outcomes come in the order of the items, whatever happens; they are those of one at a time.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any, Generic, TypeVar

from pipeline.errors import RunError, VolsegError

IN_FLIGHT = 3
"""Items that are held at a time, at most: one being read, one worked on, one being written."""

SWITCH_S = 0.0005
"""How soon a thread that computes in Python makes way. PyTorch comes back to Python after each of its operations, and
with Python's own 5 ms a network beside such a thread took three times as long as alone."""

Item = TypeVar("Item")
Opened = TypeVar("Opened")
Read = TypeVar("Read")
Made = TypeVar("Made")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Stages(Generic[Item, Opened, Read, Made, Done]):
    """What is done with an item; a VolsegError sets it aside, a RunError ends everything.

    `open`, `size`, `read` and `write` are called in other threads, for one item at a time. `open` finds out how large
    an item is without holding much; reading it takes `size(opened)` bytes. `room(read, made)` is asked before `work`,
    with what is still being written, if anything: the bytes that reading the next item may take meanwhile, or None
    where nothing may go on beside this item.
    """

    open: Callable[[Item], Opened]
    size: Callable[[Opened], int]
    read: Callable[[Item, Opened], Read]
    room: Callable[[Read, Made | None], int | None]
    work: Callable[[Item, Read], Made]
    write: Callable[[Item, Made], Done]


def one_at_a_time(
    items: Sequence[Item], stages: Stages[Item, Any, Any, Any, Done]
) -> Iterator[tuple[Item, Done | VolsegError]]:
    """Each item with what `write` gave, or with the error that set it aside.

    Raises:
        RunError: of a stage.
    """
    for item in items:
        try:
            made = stages.work(item, stages.read(item, stages.open(item)))
            outcome: Done | VolsegError = stages.write(item, made)
        except RunError:
            raise
        except VolsegError as error:
            outcome = error
        yield item, outcome


def overlapped(
    items: Sequence[Item], stages: Stages[Item, Opened, Read, Made, Done]
) -> Generator[tuple[Item, Done | VolsegError], None, None]:
    """As `one_at_a_time`, with stages of successive items beside each other.

    Close the iterator, or let it end: what is being written by then is finished, nothing else is begun.
    """
    run, interval_s = _Run(stages), sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield from run.outcomes(items)
    finally:
        sys.setswitchinterval(interval_s)
        run.stop()


class _Turn:
    """When an item may be read: at once if that takes no more than `room`, else when the item before is written."""

    def __init__(self, room: int | None) -> None:
        self.room = room
        self.come = Event()
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.come.set()

    def wait(self, size: int) -> None:
        if self.room is None or size > self.room:
            self.come.wait()
        if self.cancelled:
            raise CancelledError


class _Run(Generic[Item, Opened, Read, Made, Done]):
    """Locals of `_pass` end with it: nothing keeps an item that is no longer in flight."""

    def __init__(self, stages: Stages[Item, Opened, Read, Made, Done]) -> None:
        self._stages = stages
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="volseg-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="volseg-write")
        self._turn = _Turn(None)
        self._ending: deque[tuple[Item, Made | None, Future[Done]]] = deque()

    def outcomes(self, items: Sequence[Item]) -> Iterator[tuple[Item, Done | VolsegError]]:
        reading = self._begin(items, None)
        self._turn.come.set()
        for number, item in enumerate(items):
            reading = yield from self._pass(item, reading, items[number + 1 :])
        yield from self._ended()

    def stop(self) -> None:
        self._turn.cancel()
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)

    def _pass(
        self, item: Item, reading: list[Future[Read]], rest: Sequence[Item]
    ) -> Generator[tuple[Item, Done | VolsegError], None, list[Future[Read]]]:
        value = _outcome(reading.pop())
        room = None if isinstance(value, VolsegError) else self._stages.room(value, self._in_writing())
        if room is None:
            yield from self._ended()
        following = self._begin(rest, room)
        made = value if isinstance(value, VolsegError) else self._attempt(item, value)
        yield from self._ended()
        if isinstance(made, VolsegError):
            future: Future[Done] = Future()
            future.set_exception(made)
            self._ending.append((item, None, future))
        else:
            future = self._writer.submit(self._stages.write, item, made)
            self._ending.append((item, made, future))
        come = self._turn.come
        future.add_done_callback(lambda _: come.set())
        return following

    def _begin(self, items: Sequence[Item], room: int | None) -> list[Future[Read]]:
        """The reading of the first of `items`, if there is one."""
        self._turn = turn = _Turn(room)

        def read(item: Item) -> Read:
            opened = self._stages.open(item)
            turn.wait(self._stages.size(opened))
            return self._stages.read(item, opened)

        return [self._reader.submit(read, item) for item in items[:1]]

    def _attempt(self, item: Item, value: Read) -> Made | VolsegError:
        try:
            return self._stages.work(item, value)
        except RunError:
            raise
        except VolsegError as error:
            return error

    def _in_writing(self) -> Made | None:
        return next((made for _, made, future in self._ending if not future.done()), None)

    def _ended(self) -> Iterator[tuple[Item, Done | VolsegError]]:
        """What has been written, or is when this is over."""
        while self._ending:
            item, _, future = self._ending.popleft()
            outcome = _outcome(future)
            yield item, outcome


def _outcome(future: Future[Done]) -> Done | VolsegError:
    try:
        return future.result()
    except RunError:
        raise
    except VolsegError as error:
        return error
