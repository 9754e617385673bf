"""How long to wait and how often to try again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from pipeline.errors import PacsError

Value = TypeVar("Value")


class Unreachable(PacsError):
    """The archive could not be reached, did not answer or broke off: another try may succeed."""


@dataclass(frozen=True)
class Patience:
    """Bounds in seconds. `total_s` is looked at between requests, so an end may come `answer_s` later."""

    connect_s: float = 10.0
    answer_s: float = 60.0
    """The longest silence while an answer is awaited."""
    total_s: float = 4 * 3600.0
    attempts: int = 4
    first_delay_s: float = 1.0
    """Before the second attempt; each further one waits up to twice as long."""


@dataclass
class Effort:
    """One command's attempts: exponential back-off with jitter, until its time is up."""

    patience: Patience
    random: np.random.Generator
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    _end_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._end_s = self.now() + self.patience.total_s

    def run(self, action: Callable[[], Value]) -> Value:
        """The value of `action`, which may be repeated without harm.

        Raises:
            PacsError: it was refused, or could not be reached in any attempt.
        """
        for attempt in range(1, self.patience.attempts):
            self.check()
            try:
                return action()
            except Unreachable:
                self.pause(attempt)
        self.check()
        return action()

    def persist(self, step: Callable[[], None], left: Callable[[], int]) -> None:
        """Repeat `step` until it ends by itself; what counts are failures with nothing achieved between them.

        Raises:
            PacsError: as `run`.
        """
        failed = 0
        while (before := left()) > 0:
            self.check()
            try:
                return step()
            except Unreachable:
                failed = 1 if left() < before else failed + 1
                if failed >= self.patience.attempts:
                    raise
                self.pause(failed)
        return None

    def check(self) -> None:
        """Raises PacsError when the time is up."""
        if self.now() >= self._end_s:
            raise PacsError(f"the time for the whole command is up ({self.patience.total_s:g} s, --deadline)")

    def pause(self, attempt: int) -> None:
        """Wait before the attempt after the `attempt`-th, but not beyond the end."""
        longest_s = self.patience.first_delay_s * 2 ** (attempt - 1)
        self.sleep(min(longest_s * float(self.random.uniform(0.5, 1.0)), max(0.0, self._end_s - self.now())))
