"""Batches made ahead: the same whoever makes them, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import VolumeError
from pipeline.loader import PREFETCHED_BATCHES, prefetch

pytestmark = pytest.mark.usefixtures("one_thread")


def numbered(number: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(number), torch.tensor(-number)


class TestPrefetch:
    @pytest.mark.parametrize(("start", "stop"), [(0, 10), (4, 6), (7, 7), (0, PREFETCHED_BATCHES)])
    def test_batches_come_in_order(self, start: int, stop: int) -> None:
        assert [int(image) for image, _ in prefetch(numbered, start, stop)] == list(range(start, stop))

    def test_it_stays_a_few_ahead_and_no_more(self) -> None:
        made: list[int] = []

        def make(number: int) -> tuple[Tensor, Tensor]:
            made.append(number)
            return numbered(number)

        batches = prefetch(make, 0, 100)
        next(batches)
        close(batches)
        assert len(made) <= 1 + PREFETCHED_BATCHES

    def test_a_fault_while_making_one_comes_through(self) -> None:
        def make(number: int) -> tuple[Tensor, Tensor]:
            if number == 2:
                raise VolumeError("batch 2 is bad")
            return numbered(number)

        batches = prefetch(make, 0, 10)
        assert [int(next(batches)[0]) for _ in range(2)] == [0, 1]
        with pytest.raises(VolumeError, match="batch 2 is bad"):
            next(batches)


def close(batches: Iterator[Any]) -> None:
    closing: Callable[[], None] = batches.close  # type: ignore[attr-defined]
    closing()
