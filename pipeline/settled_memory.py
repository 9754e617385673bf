"""What a process holds once it has predicted for the first time, which brings in what stays: it is counted before it
comes, so that the studies after the first are planned as that one was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.free_memory import held_bytes
from pipeline.postprocessing import LIBRARY_BYTES as CLEANING_BYTES

PREDICTING_BYTES = 160_000_000
"""What the process grows by in its first prediction: compiled kernels, modules, what allocators keep back."""


@dataclass
class _Come:
    """How much of these is in the process by now."""

    predicting: int = 0
    cleaning: int = 0


_COME = _Come()


def settled_bytes(*, cleans: bool) -> int:
    """Resident memory of this process with what a first prediction, which `cleans` its labels or not, is still to
    bring."""
    to_come = max(0, PREDICTING_BYTES - _COME.predicting) + (CLEANING_BYTES - _COME.cleaning if cleans else 0)
    return held_bytes() + to_come


@contextmanager
def planning() -> Iterator[None]:
    """What making a plan brings in is a part of what the first prediction would."""
    before = held_bytes()
    yield
    _COME.predicting += max(0, held_bytes() - before)


def note_prediction(*, cleaned: bool) -> None:
    """One is over: what it brings has come."""
    _COME.predicting = PREDICTING_BYTES
    _COME.cleaning = CLEANING_BYTES if cleaned else _COME.cleaning
