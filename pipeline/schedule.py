"""How far along a training is at each update, when the number of updates may be put right on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Decision = tuple[int, int]
"""From this update on, a training has this many updates in all."""


@dataclass(frozen=True)
class Schedule:
    """The decisions of a training, in order; the first is made at update 0.

    Progress is 0 at the start and 1 at the end. A decision bends it and never lets it jump: from where it is, it goes
    on evenly to 1 at the new end.
    """

    decisions: tuple[Decision, ...]

    def __post_init__(self) -> None:
        check_decisions(self.decisions)

    @staticmethod
    def of(decisions: Sequence[Sequence[int]]) -> Schedule:
        """From lists, as JSON has them.

        Raises:
            ValueError: they are none.
        """
        return Schedule(tuple((int(step), int(steps)) for step, steps in decisions))

    @property
    def steps(self) -> int:
        """Updates in all, as far as is known by now."""
        return self.decisions[-1][1]

    def decide(self, step: int, steps: int) -> Schedule:
        """With one more decision."""
        return Schedule((*self.decisions, (step, steps)))

    def position(self, step: int) -> tuple[float, int]:
        """Where update `step` (from 0) stands among how many; the number of the update itself if nothing was bent."""
        progress, steps = self._progress(step)
        return progress * steps, steps

    def validation_due(self, step: int, count: int) -> bool:
        """True when one of `count` evenly spread validations follows on the update that made `step` updates."""
        return self.validations(step, count) > self.validations(step - 1, count)

    def validations(self, step: int, count: int) -> int:
        """How many of `count` evenly spread validations follow on the first `step` updates."""
        if step == self.steps:
            return count
        # Away from where rounding decides: a quarter of the way is a quarter, however it was computed.
        return min(count - 1, int(self._progress(step)[0] * count + 1e-9))

    def _progress(self, step: int) -> tuple[float, int]:
        """Progress, and the number of updates that counted at this step."""
        progress, since, steps = 0.0, 0, self.decisions[0][1]
        for at, of in self.decisions[1:]:
            if at > step:
                break
            progress, since, steps = _along(progress, since, steps, at), at, of
        return _along(progress, since, steps, step), steps


def check_decisions(decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """The decisions, if they begin at update 0, follow on each other, and each leaves updates to be made.

    Raises:
        ValueError: they do not.
    """
    if not decisions or decisions[0][0] != 0:
        raise ValueError("expected pairs of an update and a number of updates, the first at update 0")
    for (before, _), (at, _) in pairwise(decisions):
        if at <= before:
            raise ValueError(f"update {at} follows on update {before}; expected a rising order")
    for at, of in decisions:
        if of <= at:
            raise ValueError(f"at update {at} there are {of} updates in all; expected more than {at}")
    return decisions


def _along(progress: float, since: int, steps: int, step: int) -> float:
    return progress + (1 - progress) * ((step - since) / (steps - since))
