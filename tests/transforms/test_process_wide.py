"""A setting of the whole process that threads share: the last one out undoes it, not the first."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest

from pipeline.quiet import quiet
from transforms.process_wide import shared
from transforms.quiet_warnings import quiet_warnings


def test_the_first_makes_it_and_the_last_undoes_it() -> None:
    told: list[str] = []

    @contextmanager
    def change() -> Iterator[None]:
        told.append("made")
        yield
        told.append("undone")

    entered = shared(change)
    first, second = entered(), entered()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert told == ["made"]
    second.__exit__(None, None, None)
    assert told == ["made", "undone"]
    with entered(), entered():
        assert told == ["made", "undone", "made"]


def test_an_error_inside_undoes_it_too() -> None:
    before = list(warnings.filters)
    with pytest.raises(KeyError), quiet_warnings():
        raise KeyError
    assert list(warnings.filters) == before


def test_threads_that_come_and_go_leave_the_filters_as_they_were() -> None:
    """Plain `warnings.catch_warnings` would be left in force by threads that overlap."""
    before = list(warnings.filters)
    barrier = Barrier(4)

    def visit(rounds: int) -> None:
        for _ in range(rounds):
            barrier.wait(20)
            with quiet_warnings():
                warnings.warn("not shown, and no error", UserWarning, stacklevel=1)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(visit, 50) for _ in range(4)]:
            future.result()
    assert list(warnings.filters) == before


def test_log_levels_too() -> None:
    logger = logging.getLogger("pydicom")
    before = logger.level
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level > logging.CRITICAL
    second.__exit__(None, None, None)
    assert logger.level == before
