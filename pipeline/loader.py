"""Batches made ahead of the network, in a thread or in processes: the same ones in the same order.

Batch n is a function of n alone, so it does not matter who makes it, nor how often. A process that dies is replaced
and its batch made again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.loader_team import STALLED_S, Source, Team

PREFETCHED_BATCHES = 3

MOST_WORKERS = 12
"""Processes beyond this many were never waited for; each takes some 400 MB."""

Made = TypeVar("Made")


def batches(
    source: Source,
    start: int,
    stop: int,
    *,
    workers: int,
    pin: bool = False,
    note: Callable[[str], None] = lambda _: None,
    stalled_s: float = STALLED_S,
) -> Iterator[Batch]:
    """`source.batch(start)`, ..., `source.batch(stop - 1)` in order, made ahead by `workers` (see `count_workers`).

    `pin` puts them into memory that a GPU copies from by itself; `note` is told in one line, once, when a process had
    to be replaced. To end early, close the iterator (`contextlib.closing`): then no thread and no process is left.

    Raises:
        RunError: one batch ended several processes, or none could be started.
        VolsegError: what making a batch refused, with the case's id.
    """
    if workers <= 1:
        yield from prefetch(lambda number: _placed(source.batch(number), pin), start, stop)
        return
    team = Team(source, range(start, stop), count=min(workers, max(1, stop - start)), stalled_s=stalled_s)
    told = False
    try:
        for batch in prefetch(lambda number: _placed(team.batch(number), pin), start, stop, at_end=team.stop):
            if team.losses and not told:
                note(f"{team.losses[0]}; it was replaced, and what is learnt stays the same (told once)")
                told = True
            yield batch
    finally:
        team.close()


def load(
    source: Source,
    start: int,
    stop: int,
    *,
    wanted: Literal["auto"] | int,
    device: torch.device,
    processes_here: int = 1,
    note: Callable[[str], None] = lambda _: None,
) -> Timed[Batch]:
    """`batches` as a training on `device` has them: `wanted` is `train.workers`, memory is pinned for a GPU.

    Use it as `for batch in (loading := load(patches, ...))`, with `loading.wait_share()` in each row of the history.
    """
    workers = count_workers(wanted, device.type, processes_here=processes_here)
    return Timed(batches(source, start, stop, workers=workers, pin=device.type == "cuda", note=note))


def count_workers(wanted: Literal["auto"] | int, device: str, *, processes_here: int = 1) -> int:
    """Who makes the batches of one training process: 0 a thread, more that many processes.

    On a CPU a thread is best: processes would take the cores from the network. On a GPU every core but one is shared
    among the `processes_here` that train on this machine.
    """
    if wanted != "auto":
        return wanted
    if device == "cpu" or sys.platform == "win32":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // processes_here - 1
    return min(share, MOST_WORKERS) if share > 1 else 0


class Timed(Generic[Made]):
    """An iterator that knows how long its user waited for it: `waited_s` in all, `wait_share` since it was asked."""

    def __init__(self, items: Iterable[Made]) -> None:
        self._items = iter(items)
        self.waited_s = 0.0
        self._asked_s, self._asked_at = 0.0, time.monotonic()

    def __iter__(self) -> Timed[Made]:
        return self

    def __next__(self) -> Made:
        begun = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.waited_s += time.monotonic() - begun

    def wait_share(self) -> float:
        """Part of the wall time since the last call, or the beginning, that was spent waiting: for the history."""
        now = time.monotonic()
        share = (self.waited_s - self._asked_s) / max(1e-9, now - self._asked_at)
        self._asked_s, self._asked_at = self.waited_s, now
        return share

    def close(self) -> None:
        """End what makes them."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()


def prefetch(
    make: Callable[[int], Made], start: int, stop: int, *, at_end: Callable[[], None] = lambda: None
) -> Iterator[Made]:
    """`make(start)`, ..., `make(stop - 1)` in order, made ahead in one thread; `at_end` may hurry its last one."""
    with ThreadPoolExecutor(1, "patches") as pool:
        _limit_to_one_core(pool)
        ahead = [pool.submit(make, n) for n in range(start, min(stop, start + PREFETCHED_BATCHES))]
        try:
            for number in range(start, stop):
                batch = ahead.pop(0).result()
                if number + PREFETCHED_BATCHES < stop:
                    ahead.append(pool.submit(make, number + PREFETCHED_BATCHES))
                yield batch
        finally:
            at_end()
            for future in ahead:
                future.cancel()


def _placed(batch: Batch, pin: bool) -> Batch:
    if not pin:
        return batch
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    values |= {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
    return Batch(**values)


def _limit_to_one_core(pool: ThreadPoolExecutor) -> None:
    """A second OpenMP team beside the network's would stall both at every barrier.

    The number of threads is each thread's own, but what torch remembers of it is not: it is set back here. So is a
    GPU, which a new thread forgets.
    """
    threads = torch.get_num_threads()
    pool.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        pool.submit(torch.cuda.set_device, torch.cuda.current_device()).result()
