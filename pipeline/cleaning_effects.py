"""What each of many actions would do to one case: from one look at its components, without doing any of them.

Dice after an action follows from the voxels and overlaps of the components that it removes, so ten sizes of islands
cost no more than one. Voxels that the reference ignores are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cleaning import Pockets, background_pockets, dropped, mask_of, sizes_of, values_of
from pipeline.detection import components
from pipeline.label_boxes import Box, boxes_of_values, joined
from pipeline.label_parts import label_parts
from pipeline.postprocessing import Action
from transforms.labels import LabelSchema

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

ISLANDS_MM3 = (10.0, 100.0, 1000.0, 10000.0)
"""Sizes below which islands are tried."""

MOST_TOGETHER = 16
"""Labels up to which all of them are also tried as one structure."""


@dataclass(frozen=True)
class CaseEffect:
    """Of one action on one case. Dice is the mean over the parts of its structure (see `parts_of`), 1 where neither
    side has a part: to find nothing where nothing is, is right. None where a part was not annotated.

    `total` is what all of the parts gain, `worst` the least that one of them does. `parts_lost` are components of the
    reference that were touched before and are not touched any more. `moved` is how many voxels a threshold moves from
    or to each other label, or background, by its name ("").
    """

    before: float | None
    after: float | None
    is_changed: bool
    parts_lost: int = 0
    total: float = 0.0
    worst: float = 0.0
    moved: tuple[tuple[str, int], ...] = ()


def candidates(schema: LabelSchema) -> tuple[Action, ...]:
    """Everything that is tried: for each label, and for all together where they are few, or for each region.

    What is removed of a region becomes what the smallest region around it paints. A region is left out that shares
    labels with another of which neither holds the other, or that has nothing to become.
    """
    found: list[Action] = []
    for name, labels, becomes in _structures(schema):
        removing = {"name": name, "labels": labels, "becomes": becomes}
        found.append(Action.model_validate({"kind": "largest", **removing}))
        found += [Action.model_validate({"kind": "islands", "below_mm3": n, **removing}) for n in ISLANDS_MM3]
        fill = labels[0] if len(labels) == 1 else next((r.paints for r in schema.regions if r.name == name), None)
        if fill is not None:
            found.append(Action(kind="holes", name=name, labels=labels, becomes=fill))
    return tuple(found)


def parts_of(action: Action, schema: LabelSchema) -> tuple[tuple[str, ...], ...]:
    """What is scored of an action's structure: each of its labels, or each region that lies in it."""
    if schema.regions:
        return tuple(region.labels for region in schema.regions if set(region.labels) <= set(action.labels))
    return tuple((name,) for name in action.labels)


def effects_on(
    prediction: Array,
    reference: Array,
    actions: Sequence[Action],
    schema: LabelSchema,
    *,
    voxel_volume_mm3: float,
    annotated: Sequence[bool],
) -> tuple[CaseEffect, ...]:
    """The effect of each action by itself on a prediction (I, J, K) of label ids; `annotated` is per class.

    Actions on the same labels stand one after the other, as `candidates` gives them.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"a prediction of {prediction.shape} against a reference of {reference.shape}")
    case = _Case(prediction, reference, schema, voxel_volume_mm3)
    known = {label.name for c, label in enumerate(schema.labels, start=1) if annotated[c]}
    found: list[CaseEffect] = []
    for labels, group in groupby(actions, key=lambda action: action.labels):
        same = list(group)
        if set(labels) <= known:
            found += _effects(case, same)
        else:
            found += [CaseEffect(None, None, is_changed=False)] * len(same)
    return tuple(found)


class _Case:
    """Both label maps with what is looked up in them by every structure."""

    def __init__(self, prediction: Array, reference: Array, schema: LabelSchema, voxel_volume_mm3: float) -> None:
        self.prediction, self.reference, self.schema = prediction, reference, schema
        self.voxel_volume_mm3 = voxel_volume_mm3
        self.id_of = {label.name: label.id for label in schema.labels}
        ids = sorted(schema.ids)
        self.boxes = (boxes_of_values(prediction, ids), boxes_of_values(reference, ids))

    def box_of(self, values: Sequence[int]) -> Box | None:
        """The least box that holds these values on both sides; None where neither has any."""
        held = [side[value] for side in self.boxes for value in values if value in side]
        return joined(held) if held else None

    def counted(self, reference: Array) -> Mask:
        """Where a part of the reference says anything."""
        return np.asarray(reference != (-1 if self.schema.ignore is None else self.schema.ignore))

    @cached_property
    def pockets(self) -> Pockets:
        """Of the prediction's background."""
        return background_pockets(self.prediction)

    @cached_property
    def labels(self) -> _Labels:
        """Of every label by itself."""
        return _Labels(self)


def _effects(case: _Case, actions: Sequence[Action]) -> list[CaseEffect]:
    values = values_of(actions[0], case.id_of)
    box = case.box_of(values)
    if box is None:
        return [CaseEffect(1.0, 1.0, is_changed=False)] * len(actions)
    parts = [tuple(case.id_of[name] for name in part) for part in parts_of(actions[0], case.schema)]
    structure = case.labels.structure(values[0]) if parts == [values] and len(values) == 1 else _whole(case, box, parts)
    return [
        structure.removal(action, case.voxel_volume_mm3) if action.removes else _filling(structure, action, case, parts)
        for action in actions
    ]


@dataclass(frozen=True, eq=False)
class _Structure:
    """One structure of a case: of its components the `sizes` (C,), and for each part what is counted of them, `voxels`
    and `overlaps` with the reference (C, P); voxels of the reference (P,); and which component touches which of the
    reference's, as pairs (2, T).
    """

    sizes: Counts
    voxels: Counts
    overlaps: Counts
    expected: Counts
    touching: Counts

    def removal(self, action: Action, voxel_volume_mm3: float) -> CaseEffect:
        """Without the components that the action removes."""
        drop = dropped(self.sizes, action, voxel_volume_mm3)
        if not drop.any():
            return self.unchanged()
        component, lesion = self.touching
        lost = np.setdiff1d(lesion, lesion[~drop[component]])
        return self.changed(self.voxels[~drop].sum(axis=0), self.overlaps[~drop].sum(axis=0), parts_lost=int(lost.size))

    def unchanged(self) -> CaseEffect:
        """Of an action that finds nothing to do."""
        before = float(self._dice(self.voxels.sum(axis=0), self.overlaps.sum(axis=0)).mean())
        return CaseEffect(before, before, is_changed=False)

    def changed(self, voxels: Counts, overlaps: Counts, *, parts_lost: int = 0) -> CaseEffect:
        """Of an action that leaves each part with so many voxels (P,), of which so many are right."""
        before, after = self._dice(self.voxels.sum(axis=0), self.overlaps.sum(axis=0)), self._dice(voxels, overlaps)
        change = after - before
        return CaseEffect(
            float(before.mean()),
            float(after.mean()),
            is_changed=True,
            parts_lost=parts_lost,
            total=float(change.sum()),
            worst=float(change.min()),
        )

    def _dice(self, voxels: Counts, overlaps: Counts) -> Floats:
        """(P,)"""
        whole = voxels + self.expected
        return np.asarray(np.divide(2.0 * overlaps, whole, out=np.ones(len(whole)), where=whole > 0))


def _filling(structure: _Structure, action: Action, case: _Case, parts: Sequence[Sequence[int]]) -> CaseEffect:
    """With the pockets that an action fills."""
    at = tuple(case.pockets.places[case.pockets.bordered_by(values_of(action, case.id_of))].T)
    if not at[0].size:
        return structure.unchanged()
    truth = case.reference[at]
    fill = case.id_of[action.becomes or action.labels[0]]
    gets = np.array([fill in part for part in parts])
    right = np.array([np.count_nonzero(mask_of(truth, part)) for part in parts])
    voxels = structure.voxels.sum(axis=0) + gets * np.count_nonzero(case.counted(truth))
    return structure.changed(voxels, structure.overlaps.sum(axis=0) + gets * right)


def _whole(case: _Case, box: Box, parts: Sequence[Sequence[int]]) -> _Structure:
    """Several labels taken together."""
    values = sorted({value for part in parts for value in part})
    found, expected = case.prediction[box], case.reference[box]
    counted, mask = case.counted(expected), mask_of(found, values)
    numbers, count = components(mask)
    lesions, lesion_count = components(mask_of(expected, values))
    voxels, overlaps, truths = [], [], []
    for part in parts:
        where, truth = counted & mask_of(found, part), mask_of(expected, part)
        voxels.append(np.bincount(numbers[where], minlength=count + 1)[1:])
        overlaps.append(np.bincount(numbers[where & truth], minlength=count + 1)[1:])
        truths.append(np.count_nonzero(truth))
    both = mask & (lesions > 0)
    touching = _pairs(numbers[both] - 1, lesions[both] - 1, lesion_count)
    sizes = sizes_of(numbers, count)
    return _Structure(sizes, np.stack(voxels, axis=1), np.stack(overlaps, axis=1), np.array(truths), touching)


class _Labels:
    """Every label by itself, from one look at both label maps, so that a hundred labels cost about what one does."""

    def __init__(self, case: _Case) -> None:
        box = case.box_of(case.schema.ids) or (slice(0, 0),) * 3
        found, expected = (np.ascontiguousarray(side[box]) for side in (case.prediction, case.reference))
        counted = case.counted(expected)
        self._parts, lesions = label_parts(found), label_parts(expected)
        numbers, count = self._parts.painted(found.shape), self._parts.sizes.size
        same = (found == expected) & (found > 0)
        self._voxels = np.bincount(numbers[counted & (found > 0)], minlength=count)
        self._overlaps = np.bincount(numbers[same], minlength=count)
        self._expected = np.bincount(lesions.values, weights=lesions.sizes, minlength=max(case.schema.ids) + 1)
        touching = _pairs(numbers[same], lesions.painted(found.shape)[same], lesions.sizes.size)
        values = self._parts.values[touching[0]]
        by_value = np.argsort(values, kind="stable")
        self._touching, self._touching_values = touching[:, by_value], values[by_value]
        self._order = np.argsort(self._parts.values, kind="stable")
        self._ordered = self._parts.values[self._order]

    def structure(self, value: int) -> _Structure:
        """Of one label."""
        low, high = np.searchsorted(self._ordered, [value, value + 1])
        own = self._order[low:high]
        first, last = np.searchsorted(self._touching_values, [value, value + 1])
        component, lesion = self._touching[:, first:last]
        return _Structure(
            self._parts.sizes[own],
            self._voxels[own][:, None],
            self._overlaps[own][:, None],
            self._expected[[value]].astype(np.int64),
            np.stack([np.searchsorted(own, component), lesion]),
        )


def _pairs(left: Array, right: Array, right_count: int) -> Counts:
    """Which pairs occur, once each, as (2, T) in the order of the first."""
    wide = max(right_count, 1)
    return np.stack(np.divmod(np.unique(left.astype(np.int64) * wide + right), wide))


def _structures(schema: LabelSchema) -> list[tuple[str, tuple[str, ...], str | None]]:
    """Names, labels, and what is put where voxels of them are removed."""
    if not schema.regions:
        single = [(name, (name,), None) for name in schema.names]
        return [*single, ("all labels", schema.names, None)] if 1 < len(single) <= MOST_TOGETHER else list(single)
    sets = {region.name: frozenset(region.labels) for region in schema.regions}
    found = []
    for region in schema.regions:
        own = sets[region.name]
        if any(own & other and not (own <= other or other <= own) for other in sets.values()):
            continue
        around = sorted((r for r in schema.regions if own < sets[r.name]), key=lambda r: len(r.labels))
        becomes = next((r.paints for r in around if r.paints not in own), None)
        is_cleaned_itself = any(becomes in other and not own <= other for other in sets.values())
        if is_cleaned_itself or (around and becomes is None):
            continue
        found.append((region.name, region.labels, becomes))
    return found
