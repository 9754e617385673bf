"""Model or header? Whether a bad prediction is a good one on the wrong axes, in the wrong place or by the wrong names.

The prediction is turned, moved and renamed in every way that a confused header or label table brings about, and
scored again. Only its labelled voxels are looked at, as a list of places, so that a large volume costs no more than its
labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]
Shape = tuple[int, int, int]

LEAST_GAIN = 0.2
"""Of mean Dice: what a change has to bring to be called an explanation."""

LEAST_DICE = 0.5
"""An explanation that leaves less than this explains little."""

SIMPLER = 0.02
"""A simpler change is preferred to one that brings no more than this beyond it."""

MOST_SHIFT = 12
"""Voxels along each axis that a prediction is moved at most."""

MOST_PLACES = 200_000
"""Labelled voxels that the search looks at; what it finds is then scored on all of them."""

_WAYS = {"R": "left to right", "L": "left to right", "A": "front to back", "P": "front to back"}
_WAYS |= {"S": "head to foot", "I": "head to foot"}


@dataclass(frozen=True)
class Change:
    """What is done to a prediction on a grid (I, J, K): its axes are brought into the order `axes` (the new axis t is
    the old `axes[t]`), then reversed along `flipped`, then moved by `shift_ijk` voxels; `renamed` is label to label."""

    axes: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[int, ...] = ()
    shift_ijk: tuple[int, int, int] = (0, 0, 0)
    renamed: tuple[tuple[int, int], ...] = ()

    @property
    def effort(self) -> int:
        """How much it changes: of two that explain the same, the smaller is the likelier fault."""
        turned = sum(a != t for t, a in enumerate(self.axes))
        return 2 * turned + len(self.flipped) + bool(self.renamed) + (1 if any(self.shift_ijk) else 0)


@dataclass(frozen=True)
class Explanation:
    """A change that turns a bad prediction into a good one; Dice is the mean over the labels of the reference."""

    change: Change
    dice: float
    explained_dice: float
    sentence: str


def explain(
    prediction: Array, reference: Array, *, names: Mapping[int, str], axis_codes: str = "RAS"
) -> Explanation | None:
    """The simplest change of two label maps (I, J, K) of one grid that explains a bad score, or None.

    All 48 ways to lie on the axes, each with the best exchange of labels; where none explains it, moves of up to
    `MOST_SHIFT` voxels. `names` are of the label ids that count; `axis_codes` says where each axis points.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(f"found a prediction of {prediction.shape} against a reference of {reference.shape}")
    there = set(np.unique(reference).tolist())
    ids = [i for i in sorted(names) if i in there]
    case = _Case.of(prediction, reference, ids)
    if not ids or not case.places.size:
        return None
    before = case.dice(Change())
    found = _best([*_turned(case), *_moved(case)])
    if found is None or found.effort == 0:
        return None
    after = case.dice(found)
    if after < max(LEAST_DICE, before + LEAST_GAIN):
        return None
    return Explanation(found, before, after, _sentence(found, before, after, names, axis_codes))


@dataclass(frozen=True, eq=False)
class _Case:
    """Labelled voxels of a prediction: their places (N, 3) and label numbers (N,), 1 for the first of `ids`."""

    ids: tuple[int, ...]
    places: Places
    labels: npt.NDArray[np.int64]
    reference: npt.NDArray[np.uint16]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, prediction: Array, reference: Array, ids: Sequence[int]) -> _Case:
        table = np.zeros(max(int(prediction.max()), int(reference.max()), *ids, 0) + 1, np.uint16)
        table[list(ids)] = np.arange(1, len(ids) + 1)
        predicted, expected = table[prediction], table[reference]
        places = np.argwhere(predicted)
        labels = predicted[tuple(places.T)].astype(np.int64)
        sizes = np.bincount(expected[expected > 0], minlength=len(ids) + 1)
        return cls(tuple(ids), places, labels, expected, sizes)

    def thinned(self) -> tuple[Places, npt.NDArray[np.int64], float]:
        """Every n-th voxel, and n."""
        step = max(1, -(-len(self.places) // MOST_PLACES))
        return self.places[::step], self.labels[::step], float(step)

    def overlaps(self, change: Change, *, exact: bool) -> tuple[Array, Array]:
        """(L, L) voxels of predicted label p that lie in label r of the reference, and (L,) of each predicted."""
        places, labels, weight = (self.places, self.labels, 1.0) if exact else self.thinned()
        count = len(self.ids) + 1
        moved = _places_after(places, change, self.reference.shape)
        inside = ((moved >= 0) & (moved < self.reference.shape)).all(axis=1)
        met = self.reference[tuple(moved[inside].T)]
        table = np.bincount(labels[inside] * count + met, minlength=count * count).reshape(count, count)
        return weight * table[1:, 1:], weight * np.bincount(labels, minlength=count)[1:]

    def dice(self, change: Change) -> float:
        """Mean over the labels of the reference, on all voxels."""
        dices = self._dices(change, exact=True)
        renamed = dict(change.renamed)
        order = [self.ids.index(renamed.get(i, i)) for i in self.ids]
        return float(dices[np.arange(len(order)), order].mean())

    def with_names(self, change: Change) -> tuple[Change, float]:
        """The change with the exchange of labels that brings most, if that is worth it, and its mean Dice."""
        from scipy.optimize import linear_sum_assignment

        dices = self._dices(change, exact=False)
        kept = float(np.diagonal(dices).mean())
        rows, columns = linear_sum_assignment(-dices)
        best = float(dices[rows, columns].mean())
        if best < kept + LEAST_GAIN:
            return change, kept
        pairs = tuple((self.ids[p], self.ids[r]) for p, r in zip(rows, columns, strict=True) if p != r)
        return Change(change.axes, change.flipped, change.shift_ijk, pairs), best

    def _dices(self, change: Change, *, exact: bool) -> Array:
        """(L, L): of each predicted label with each of the reference."""
        met, predicted = self.overlaps(change, exact=exact)
        return np.asarray(2.0 * met / (predicted[:, None] + self.sizes[None, 1:]))


def _places_after(places: Places, change: Change, shape: tuple[int, ...]) -> Places:
    """Where places (N, 3) come to lie, the middle of the grid staying where it is."""
    moved = places[:, change.axes].copy()
    for t, axis in enumerate(change.axes):
        # Volumes of unequal sides are laid middle upon middle when their axes are exchanged.
        moved[:, t] += (shape[t] - shape[axis]) // 2
        if t in change.flipped:
            moved[:, t] = shape[t] - 1 - moved[:, t]
    return np.asarray(moved + np.asarray(change.shift_ijk))


def _turned(case: _Case) -> list[tuple[Change, float]]:
    """All 48 ways to lie on the axes."""
    flips = [tuple(t for t in range(3) if way[t]) for way in product((False, True), repeat=3)]
    orders = [(p[0], p[1], p[2]) for p in permutations(range(3))]
    return [case.with_names(Change(axes, flipped)) for axes, flipped in product(orders, flips)]


def _moved(case: _Case) -> list[tuple[Change, float]]:
    """The shift under which most of the prediction meets its label, found axis by axis from the centres of mass."""
    expected = [np.argwhere(case.reference == n) for n in range(1, len(case.ids) + 1)]
    offsets = [
        where.mean(axis=0) - case.places[case.labels == n].mean(axis=0)
        for n, where in enumerate(expected, start=1)
        if len(where) and bool((case.labels == n).any())
    ]
    if not offsets:
        return []
    start = np.clip(np.rint(np.median(offsets, axis=0)), -MOST_SHIFT, MOST_SHIFT).astype(int)
    around = [range(s - 1, s + 2) for s in start]
    shifts = [(i, j, k) for i, j, k in product(*around) if max(map(abs, (i, j, k))) <= MOST_SHIFT]
    return [case.with_names(Change(shift_ijk=shift)) for shift in shifts]


def _best(found: Sequence[tuple[Change, float]]) -> Change | None:
    """The simplest of those that bring nearly as much as the best."""
    if not found:
        return None
    most = max(dice for _, dice in found)
    good = [(change.effort, -dice, change) for change, dice in found if dice >= most - SIMPLER]
    return min(good, key=lambda row: row[:2])[2]


def _sentence(change: Change, before: float, after: float, names: Mapping[int, str], axis_codes: str) -> str:
    parts = []
    if change.axes != (0, 1, 2):
        parts.append("its axes are taken in the order " + ", ".join("IJK"[a] for a in change.axes))
    if change.flipped:
        parts.append("it is mirrored " + " and ".join(_WAYS[axis_codes[t]] for t in change.flipped))
    if any(change.shift_ijk):
        parts.append(f"it is moved by {', '.join(map(str, change.shift_ijk))} voxels")
    if change.renamed:
        parts.append(_renaming(change.renamed, names))
    return f"Dice is {after:.2f} instead of {before:.2f} if {' and '.join(parts)}"


def _renaming(renamed: Sequence[tuple[int, int]], names: Mapping[int, str]) -> str:
    pairs = dict(renamed)
    swaps = [(a, b) for a, b in renamed if pairs.get(b) == a and a < b]
    told = [f"{names[a]} and {names[b]} are exchanged" for a, b in swaps]
    told += [f"{names[a]} is called {names[b]}" for a, b in renamed if pairs.get(b) != a]
    return " and ".join(told)
