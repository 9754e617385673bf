"""Batches made ahead of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

PREFETCHED_BATCHES = 3

Made = TypeVar("Made")


def prefetch(make: Callable[[int], Made], start: int, stop: int) -> Iterator[Made]:
    """`make(start)`, ..., `make(stop - 1)` in order, made ahead in one thread."""
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
            for future in ahead:
                future.cancel()


def _limit_to_one_core(pool: ThreadPoolExecutor) -> None:
    """A second OpenMP team beside the network's would stall both at every barrier.

    The number of threads is each thread's own, but what torch remembers of it is not: it is set back here.
    """
    threads = torch.get_num_threads()
    pool.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)
