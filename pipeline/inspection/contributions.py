"""What each part of a U-Net brings: the Dice of a case when a skip, or all levels below one, no longer say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

    Rows are by label and region; `headline` names those that count, regions where there are any.
    """

    against: Against
    headline: tuple[str, ...]
    untouched: tuple[Row, ...]
    changed: Mapping[Change, tuple[Row, ...]]

    @property
    def dice(self) -> float:
        """As the network is: mean over cases of the mean over labels."""
        return _mean([self._of_case(row, row) for row in self.untouched])

    def dice_with(self, change: Change) -> float:
        """The same with a change, over the labels that count for `dice`."""
        return _mean([self._of_case(row, base) for row, base in self._pairs(change)])

    def falls(self, change: Change) -> float:
        """By how much the Dice falls; below zero where it rises."""
        return self.dice - self.dice_with(change)

    def falls_of_cases(self, change: Change) -> tuple[float, ...]:
        """The same of each case."""
        return tuple(self._of_case(base, base) - self._of_case(row, base) for row, base in self._pairs(change))

    def most_changed(self, change: Change) -> tuple[str, float] | None:
        """The label whose Dice changes most, and by how much it falls."""
        falls = {
            name: _mean([base[name] - row[name] for row, base in self._pairs(change)])
            for name in self.headline
        }  # fmt: skip
        known = {name: fall for name, fall in falls.items() if not math.isnan(fall)}
        return max(known.items(), key=lambda item: abs(item[1])) if known else None

    def _pairs(self, change: Change) -> list[tuple[Row, Row]]:
        return list(zip(self.changed[change], self.untouched, strict=True))

    def _of_case(self, row: Row, base: Row) -> float:
        return _mean([row[name] for name in self.headline if not math.isnan(base[name])])


def _constant(mean: Tensor, features: Tensor) -> Tensor:
    """`mean` (C,) in place of each voxel of features (B,C,...)."""
    shape = (1, -1, *(1,) * (features.ndim - 2))
    return mean.to(device=features.device, dtype=features.dtype).reshape(shape).expand_as(features).contiguous()


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN where there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
