"""What other thresholds would do to one case: from one look at its kept scores, on the network's grid.

A threshold moves the few voxels whose probabilities are between it and a half, so that a dozen of them for a hundred
labels cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cleaning_effects import CaseEffect
from pipeline.detection import components
from pipeline.kept_scores import LEVELS, KeptScores
from pipeline.label_parts import label_parts
from pipeline.postprocessing import Action, outputs_of
from transforms.labels import LabelSchema

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
"""That are tried beside a half."""

KEPT = 3
"""Likeliest outputs of a voxel that are kept of held-out cases: what is less likely is taken at none of these."""

_HALF = 0.5


def threshold_candidates(schema: LabelSchema) -> tuple[Action, ...]:
    """Everything that is tried: for each output of a network but background."""
    return tuple(
        Action(kind="threshold", name=name, labels=labels, threshold=threshold)
        for name, labels in outputs_of(schema)
        for threshold in THRESHOLDS
    )


def threshold_effects(
    kept: KeptScores, classes: Array, actions: Sequence[Action], *, annotated: Sequence[bool]
) -> tuple[CaseEffect, ...]:
    """The effect of each threshold by itself, with reference `classes` (I, J, K) on the grid of the scores.

    Dice is that of the label or region; what other labels gain or lose by it is added to the one after, and each of
    them may be the one that does worst. `annotated` is per class; others do not count. Voxels of the schema's ignored
    class do not either.

    Raises:
        ValueError: the shapes differ.
    """
    if classes.shape != kept.grids.grid.shape:
        raise ValueError(f"a reference of {classes.shape} against scores of {kept.grids.grid.shape}")
    schema = kept.schema
    known = {label.name for c, label in enumerate(schema.labels, start=1) if annotated[c]}
    case = _Regions(kept, classes) if schema.regions else _Labels(kept, classes, annotated)
    numbers = {name: number for number, (name, _) in enumerate(outputs_of(schema))}
    return tuple(
        case.effect(numbers[action.name], action.threshold or _HALF)
        if set(action.labels) <= known
        else CaseEffect(None, None, is_changed=False)
        for action in actions
    )


@dataclass(frozen=True, eq=False)
class _Moves:
    """Voxels (N,), flat, that may become the class `after` instead of `before`, and the share of p that decides."""

    at: Counts
    share: Floats
    before: Counts
    after: Counts

    def chosen(self, which: Array) -> _Moves:
        """Some of them, by a mask or by their numbers."""
        return _Moves(self.at[which], self.share[which], self.before[which], self.after[which])

    def by(self, labels: Counts, count: int) -> list[_Moves]:
        """Apart for each label 1 to `count` - 1, where `labels` (N,) says which is whose."""
        order = np.argsort(labels, kind="stable")
        ends = np.searchsorted(labels[order], np.arange(1, count + 1))
        return [self.chosen(order[low:high]) for low, high in pairwise(ends)]


class _Labels:
    """Labels that exclude each other: what one takes, another loses."""

    def __init__(self, kept: KeptScores, classes: Array, annotated: Sequence[bool]) -> None:
        schema = kept.schema
        self.count, self.names = schema.class_count, ("", *schema.names)
        self.annotated = np.array(annotated[1:])
        self.truth = np.ascontiguousarray(classes).reshape(-1).astype(np.int64)
        self.counted = self.truth != (-1 if schema.ignored_class is None else schema.ignored_class)
        found = kept.outputs[0].reshape(-1)
        right = self.counted & (found == self.truth) & (found > 0)
        self.found = np.bincount(found[self.counted], minlength=self.count)[1:]
        self.overlaps = np.bincount(found[right], minlength=self.count)[1:]
        self.expected = np.bincount(self.truth[self.counted], minlength=self.count)[1:]
        drawn = np.where(self.counted, self.truth, 0).reshape(classes.shape)
        self.parts = label_parts(drawn).painted(classes.shape).reshape(-1)
        self.touched = np.bincount(self.parts[right])
        gains, losses = _gains_of(kept), _losses_of(kept)
        self.gains, self.losses = gains.by(gains.after, self.count), losses.by(losses.before, self.count)

    def effect(self, number: int, threshold: float) -> CaseEffect:
        """Of the label with this number, from 0 on."""
        if threshold < _HALF:
            moves = self.gains[number]
            moves = moves.chosen(moves.share > threshold)
        else:
            moves = self.losses[number]
            moves = moves.chosen(moves.share <= threshold)
        before = self._dice(self.found, self.overlaps)
        own = float(before[number])
        if not moves.at.size:
            return CaseEffect(own, own, is_changed=False)
        counted, truth = self.counted[moves.at], self.truth[moves.at]
        was_right = counted & (moves.before == truth) & (truth > 0)
        is_right = counted & (moves.after == truth) & (truth > 0)
        found = self.found + self._counts(moves.after[counted]) - self._counts(moves.before[counted])
        overlaps = self.overlaps + self._counts(truth[is_right]) - self._counts(truth[was_right])
        change = np.where(self.annotated, self._dice(found, overlaps) - before, 0.0)
        lost = _parts_lost(self.touched, self.parts[moves.at[was_right]])
        others = np.bincount(moves.before if threshold < _HALF else moves.after, minlength=self.count)
        moved = tuple((self.names[c], int(others[c])) for c in np.flatnonzero(others))
        total, worst = float(change.sum()), float(change.min())
        return CaseEffect(own, own + total, is_changed=True, parts_lost=lost, total=total, worst=worst, moved=moved)

    def _counts(self, classes: Counts) -> Counts:
        return np.bincount(classes, minlength=self.count)[1:]

    def _dice(self, found: Counts, overlaps: Counts) -> Floats:
        whole = found + self.expected
        return np.asarray(np.divide(2.0 * overlaps, whole, out=np.ones(len(whole)), where=whole > 0))


class _Regions:
    """Regions, each a yes or no of its own."""

    def __init__(self, kept: KeptScores, classes: Array) -> None:
        self.kept, self.classes, self.schema = kept, classes, kept.schema
        self._known: dict[int, tuple[Floats, Mask, Mask, Counts]] = {}

    def effect(self, number: int, threshold: float) -> CaseEffect:
        """Of the region with this number."""
        probability, truth, counted, parts = self._of(number)
        was, now = (counted & (probability > limit) for limit in (_HALF, threshold))
        before, after = _dice(was, truth), _dice(now, truth)
        change = after - before
        lost = _parts_lost(np.bincount(parts[was & truth]), parts[was & truth & ~now])
        is_changed = bool(((probability > _HALF) != (probability > threshold)).any())
        return CaseEffect(before, after, is_changed=is_changed, parts_lost=lost, total=change, worst=change)

    def _of(self, number: int) -> tuple[Floats, Mask, Mask, Counts]:
        """Flat: its probability, where it is and what counts in the reference, and the components of it."""
        if number not in self._known:
            self._known.clear()  # thresholds of one region stand together, and each holds a volume
            union = np.isin(self.classes, self.schema.region_classes[number])
            ignored = self.schema.ignored_class
            counted = np.ones(union.shape, dtype=np.bool_) if ignored is None else self.classes != ignored
            level = np.where(self.kept.outputs == number, self.kept.levels, 0).max(axis=0)
            parts = components(union)[0].astype(np.int64)
            self._known[number] = (level.ravel() / LEVELS, union.ravel(), counted.ravel(), parts.ravel())
        return self._known[number]


def _gains_of(kept: KeptScores) -> _Moves:
    """What would be another label if that one's threshold were lower."""
    outputs, levels = kept.outputs.reshape(len(kept.outputs), -1), _levels(kept)
    pieces = []
    for rank in range(1, len(levels)):
        at = np.flatnonzero((levels[rank] > 0) & (outputs[rank] > 0))
        share = _share(kept, levels, at, rank=rank, of=rank)
        pieces.append(_Moves(at, share, outputs[0, at].astype(np.int64), outputs[rank, at].astype(np.int64)))
    if not pieces:
        return _no_moves()
    return _Moves(*(np.concatenate([getattr(p, name) for p in pieces]) for name in ("at", "share", "before", "after")))


def _losses_of(kept: KeptScores) -> _Moves:
    """What would be the next likely class if the label's threshold were higher."""
    if len(kept.levels) < 2:
        return _no_moves()
    outputs, levels = kept.outputs.reshape(len(kept.outputs), -1), _levels(kept)
    at = np.flatnonzero((levels[1] > 0) & (outputs[0] > 0))
    share = _share(kept, levels, at, rank=1, of=0)
    return _Moves(at, share, outputs[0, at].astype(np.int64), outputs[1, at].astype(np.int64))


def _levels(kept: KeptScores) -> Array:
    """(K, N)"""
    return kept.levels.reshape(len(kept.levels), -1)


def _share(kept: KeptScores, levels: Array, at: Counts, *, rank: int, of: int) -> Floats:
    """What the output of rank `of` has of what it has together with the other of 0 and `rank`."""
    value = {r: levels[r, at] + kept.above(r) for r in (0, rank)}
    return np.asarray(value[of] / (value[0] + value[rank]), dtype=np.float64)


def _no_moves() -> _Moves:
    nothing = np.zeros(0, dtype=np.int64)
    return _Moves(nothing, nothing.astype(np.float64), nothing, nothing)


def _dice(found: Mask, truth: Mask) -> float:
    whole = np.count_nonzero(found) + np.count_nonzero(truth)
    return 2.0 * np.count_nonzero(found & truth) / whole if whole else 1.0


def _parts_lost(touched: Counts, lost: Counts) -> int:
    """Components of which `touched` voxels (C,) were found, and all of those are lost; `lost` has a number a voxel."""
    gone = np.bincount(lost, minlength=len(touched))
    return int(np.count_nonzero((gone > 0) & (gone == touched)))
