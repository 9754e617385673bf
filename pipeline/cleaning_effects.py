"""What each of many actions would do to one case: from one look at its components, without doing any of them.

Dice after an action follows from the voxels and overlaps of the components that it removes, so ten sizes of islands
cost no more than one. Voxels that the reference ignores are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cleaning import Pockets, background_pockets, dropped, mask_of, sizes_of, values_of
from pipeline.detection import components
from pipeline.label_boxes import Box, boxes_of_values, joined
from pipeline.postprocessing import Action
from transforms.labels import LabelSchema

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ISLANDS_MM3 = (10.0, 100.0, 1000.0, 10000.0)
"""Sizes below which islands are tried."""


@dataclass(frozen=True)
class CaseEffect:
    """Of one action on one case. Dice is the mean over the parts of its structure (see `parts_of`), 1 where neither
    side has a part: to find nothing where nothing is, is right. None where a part was not annotated.

    `parts_lost` are components of the reference that were touched before and are not touched any more.
    """

    before: float | None
    after: float | None
    is_changed: bool
    parts_lost: int = 0


def candidates(schema: LabelSchema) -> tuple[Action, ...]:
    """Everything that is tried: for each label, and for all together, or for each region where there are regions.

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
        self._pockets: Pockets | None = None

    def box_of(self, values: Sequence[int]) -> Box | None:
        """The least box that holds these values on both sides; None where neither has any."""
        held = [side[value] for side in self.boxes for value in values if value in side]
        return joined(held) if held else None

    def counted(self, box: Box) -> Mask:
        """Where the reference says anything."""
        ignored = self.schema.ignore
        return np.ones(self.reference[box].shape, np.bool_) if ignored is None else self.reference[box] != ignored

    @property
    def pockets(self) -> Pockets:
        """Of the prediction's background."""
        if self._pockets is None:
            self._pockets = background_pockets(self.prediction)
        return self._pockets


def _effects(case: _Case, actions: Sequence[Action]) -> list[CaseEffect]:
    values = values_of(actions[0], case.id_of)
    box = case.box_of(values)
    if box is None:
        return [CaseEffect(1.0, 1.0, is_changed=False)] * len(actions)
    parts = [tuple(case.id_of[name] for name in part) for part in parts_of(actions[0], case.schema)]
    structure = _Structure(case, box, values, parts)
    return [structure.removal(action) if action.removes else structure.filling(action) for action in actions]


class _Structure:
    """One structure of a case: its components, and for each (rows) and part (columns) the voxels and overlaps."""

    def __init__(self, case: _Case, box: Box, values: Sequence[int], parts: Sequence[Sequence[int]]) -> None:
        self._case, self._values, self._parts = case, values, parts
        found, expected, counted = case.prediction[box], case.reference[box], case.counted(box)
        mask = mask_of(found, values)
        numbers, self._count = components(mask)
        self._sizes = sizes_of(numbers, self._count)
        where = [counted & mask_of(found, part) for part in parts]
        truth = [mask_of(expected, part) for part in parts]
        self._voxels = self._per_component(numbers, where)
        self._overlaps = self._per_component(numbers, [w & t for w, t in zip(where, truth, strict=True)])
        self._expected = np.array([np.count_nonzero(t) for t in truth])
        true_numbers, true_count = components(mask_of(expected, values))
        both = mask & (true_numbers > 0)
        pairs = (numbers[both].astype(np.int64) - 1) * max(true_count, 1) + true_numbers[both] - 1
        self._touching = np.stack(np.divmod(np.unique(pairs), max(true_count, 1)))

    def removal(self, action: Action) -> CaseEffect:
        """Without the components that the action removes."""
        drop = dropped(self._sizes, action, self._case.voxel_volume_mm3)
        before = self._dice(self._voxels.sum(axis=0), self._overlaps.sum(axis=0))
        if not drop.any():
            return CaseEffect(before, before, is_changed=False)
        after = self._dice(self._voxels[~drop].sum(axis=0), self._overlaps[~drop].sum(axis=0))
        component, lesion = self._touching
        lost = np.setdiff1d(lesion, lesion[~drop[component]])
        return CaseEffect(before, after, is_changed=True, parts_lost=int(lost.size))

    def filling(self, action: Action) -> CaseEffect:
        """With the pockets that it fills."""
        voxels, overlaps = self._voxels.sum(axis=0), self._overlaps.sum(axis=0)
        before = self._dice(voxels, overlaps)
        pockets = self._case.pockets
        at = tuple(pockets.places[pockets.bordered_by(self._values)].T)
        if not at[0].size:
            return CaseEffect(before, before, is_changed=False)
        truth = self._case.reference[at]
        counted = truth != (-1 if self._case.schema.ignore is None else self._case.schema.ignore)
        fill = self._case.id_of[action.becomes or action.labels[0]]
        gets = np.array([fill in part for part in self._parts])
        right = np.array([np.count_nonzero(mask_of(truth, part)) for part in self._parts])
        after = self._dice(voxels + gets * np.count_nonzero(counted), overlaps + gets * right)
        return CaseEffect(before, after, is_changed=True)

    def _per_component(self, numbers: npt.NDArray[np.int32], masks: Sequence[Mask]) -> Counts:
        counts = [np.bincount(numbers[mask], minlength=self._count + 1)[1:] for mask in masks]
        return np.stack(counts, axis=1).astype(np.int64)

    def _dice(self, voxels: Counts, overlaps: Counts) -> float:
        whole = voxels + self._expected
        dice = np.divide(2.0 * overlaps, whole, out=np.ones(len(whole)), where=whole > 0)
        return float(dice.mean())


def _structures(schema: LabelSchema) -> list[tuple[str, tuple[str, ...], str | None]]:
    """Names, labels, and what is put where voxels of them are removed."""
    if not schema.regions:
        single = [(name, (name,), None) for name in schema.names]
        return [*single, ("all labels", schema.names, None)] if len(single) > 1 else list(single)
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
