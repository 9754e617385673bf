"""What each part of a U-Net brings: the Dice of a case when a skip, or all levels below one, no longer say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pipeline.inspection.levels import Levels, name_of, visited

How = Literal["zeroed", "mean", "cut"]
Against = Literal["reference", "untouched"]

Row = Mapping[str, float]
"""Dice by label and region of one case; NaN where it is absent on both sides or was not annotated."""


@dataclass(frozen=True)
class Change:
    """`zeroed` and `mean`: what enters the decoder through skip `level` is 0, or each channel's mean over the case.

    `cut`: what comes from the levels below `level` is each channel's mean over the case.
    """

    how: How
    level: int

    @property
    def name(self) -> str:
        """For tables."""
        match self.how:
            case "zeroed":
                return f"skip {self.level} zeroed"
            case "mean":
                return f"skip {self.level} by its mean"
            case "cut":
                return f"only levels 1 to {self.level}" if self.level > 1 else "only level 1"


def changes_of(levels: Levels) -> tuple[Change, ...]:
    """All that can be done to a network: its skips from the finest, then cuts from the deepest."""
    skips = [change for n in sorted(levels.skips) for change in (Change("zeroed", n), Change("mean", n))]
    return (*skips, *(Change("cut", n) for n in sorted(levels.coarse, reverse=True)))


def changed(levels: Levels, change: Change, means: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """While entered, the network is changed; `means` (C,) are by the names of `Levels.named`."""
    if change.how == "zeroed":
        points = {name_of("skip", change.level): levels.skips[change.level]}
        return visited(points, lambda _, features: torch.zeros_like(features))
    if change.how == "mean":
        name, point = name_of("skip", change.level), levels.skips[change.level]
    else:
        below = change.level + 1
        name = name_of("bottleneck" if below == levels.count else "decoder", below)
        point = levels.coarse[change.level]
    return visited({name: point}, lambda _, features: _constant(means[name], features))


@dataclass(frozen=True)
class Contributions:
    """Dice of each case as the network is, and with each change, against the reference or the untouched result.

    Rows are by label and region; `headline` names those that count, regions where there are any. Of a case the same
    ones count in every row, those that it or any result of it shows: where one is rightly not found, its Dice is 1.
    """

    against: Against
    headline: tuple[str, ...]
    untouched: tuple[Row, ...]
    changed: Mapping[Change, tuple[Row, ...]]

    @property
    def dice(self) -> float:
        """As the network is: mean over cases of the mean over labels."""
        return _mean(self._of_cases(self.untouched))

    def dice_with(self, change: Change) -> float:
        """The same with a change."""
        return _mean(self._of_cases(self.changed[change]))

    def falls(self, change: Change) -> float:
        """By how much the Dice falls; below zero where it rises."""
        return self.dice - self.dice_with(change)

    def falls_of_cases(self, change: Change) -> tuple[float, ...]:
        """The same of each case."""
        pairs = zip(self._of_cases(self.untouched), self._of_cases(self.changed[change]), strict=True)
        return tuple(before - after for before, after in pairs)

    def most_changed(self, change: Change) -> tuple[str, float] | None:
        """The label whose Dice changes most, and by how much it falls."""
        falls: dict[str, list[float]] = {}
        for names, before, after in zip(self._counted, self.untouched, self.changed[change], strict=True):
            for name in names:
                falls.setdefault(name, []).append(_or_one(before[name]) - _or_one(after[name]))
        means = {name: _mean(of_cases) for name, of_cases in falls.items()}
        return max(means.items(), key=lambda item: abs(item[1])) if means else None

    @cached_property
    def _counted(self) -> tuple[tuple[str, ...], ...]:
        """By case, the labels whose Dice is known in any row."""
        cases = zip(self.untouched, *self.changed.values(), strict=True)
        return tuple(tuple(n for n in self.headline if any(not math.isnan(row[n]) for row in rows)) for rows in cases)

    def _of_cases(self, rows: Sequence[Row]) -> list[float]:
        return [_mean([_or_one(row[name]) for name in names]) for row, names in zip(rows, self._counted, strict=True)]


def _or_one(dice: float) -> float:
    """Of a label that counts: one that is neither in this result nor in the reference is rightly not found."""
    return 1.0 if math.isnan(dice) else dice


def _constant(mean: Tensor, features: Tensor) -> Tensor:
    """`mean` (C,) in place of each voxel of features (B,C,...)."""
    shape = (1, -1, *(1,) * (features.ndim - 2))
    return mean.to(device=features.device, dtype=features.dtype).reshape(shape).expand_as(features).contiguous()


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN where there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
