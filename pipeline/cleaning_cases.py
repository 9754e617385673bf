"""Held-out cases on disk, and what post-processing does to them: passes over all of them, a few in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.cleaning import postprocessed
from pipeline.cleaning_choice import JudgedCase, SurfaceGain, Trials, Worst
from pipeline.cleaning_effects import CaseEffect, effects_on, parts_of
from pipeline.combining import segment_scores
from pipeline.config import EvaluateConfig
from pipeline.console import Console
from pipeline.errors import GeometryMismatch
from pipeline.kept_scores import read_scores
from pipeline.measures import Measures
from pipeline.metrics import dice_from_counts
from pipeline.postprocessing import Action, Effect, PostProcessing
from pipeline.references import Reference
from pipeline.scores import count_voxels, measure_ids
from pipeline.threshold_effects import threshold_effects
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, classes_of_values
from transforms.resample import move_classes
from transforms.volume import read_label

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Item = TypeVar("Item")
Result = TypeVar("Result")

FIGURES = ("dice", "surface_dice", "hausdorff_95_mm")
"""That are told before and after."""

_SURFACE_DICE = FIGURES.index("surface_dice")
_MOST_THREADS = 2  # each holds a case with the components of both its label maps


@dataclass(frozen=True)
class HeldOut:
    """A case with the fold that held it out, and where its prediction, the scores kept of it, and its reference are."""

    fold: int
    prediction: Path
    scores: Path
    reference: Reference


@dataclass(frozen=True, eq=False)
class Cases:
    """Held-out cases, and what is needed to look at them. `judge` and `measure` go over all of them.

    Their errors: VolumeError where a file cannot be read, GeometryMismatch where two lie on different grids.
    """

    held_out: tuple[HeldOut, ...]
    schema: LabelSchema
    settings: EvaluateConfig
    console: Console

    def judge(self, actions: Sequence[Action]) -> list[JudgedCase]:
        """The effect of every action by itself on every case; thresholds are looked at on the network's grid."""
        thresholds = [action for action in actions if action.kind == "threshold"]
        cleaning = [action for action in actions if action.kind != "threshold"]

        def judged(case: HeldOut) -> JudgedCase:
            pair, reference, annotated = _read(case), case.reference, self._annotated(case)
            found = effects_on(
                pair.prediction,
                pair.reference,
                cleaning,
                self.schema,
                voxel_volume_mm3=pair.geometry.voxel_volume_mm3,
                annotated=annotated,
            )
            effect_of = dict(zip(cleaning, found, strict=True))
            if thresholds:
                effect_of |= zip(thresholds, self._threshold_effects(case, pair, thresholds), strict=True)
            effects = tuple(effect_of[action] for action in actions)
            return JudgedCase(reference.case_id, reference.patient_id, case.fold, effects)

        return self._each(judged, self.held_out, "trying post-processing")

    def trials(self, judged: Sequence[JudgedCase], actions: Sequence[Action]) -> Trials:
        """What is known only by doing it; worked out when it is first asked for."""
        return Trials(self._surface_gains(judged, actions), self._worst_changes())

    def _surface_gains(self, judged: Sequence[JudgedCase], actions: Sequence[Action]) -> SurfaceGain:
        known: dict[Action, Floats] = {}

        def gains(action: Action) -> Floats:
            if action not in known:
                number = list(actions).index(action)
                moved = [row for row, case in enumerate(judged) if case.effects[number].is_changed]
                known[action] = np.full(len(judged), np.nan)
                some = [self.held_out[row] for row in moved]
                known[action][moved] = self._each(lambda case: self._surface_gain(case, action), some, action.words)
            return known[action]

        return gains

    def _worst_changes(self) -> Worst:
        known: dict[tuple[frozenset[Action], int], float] = {}

        def worst(actions: Sequence[Action], rows: Sequence[int]) -> Floats:
            wanted = frozenset(actions)
            new = [row for row in rows if (wanted, row) not in known]
            found = self._each(
                lambda row: self._worst_change(self.held_out[row], actions), new, "checking what was chosen"
            )
            known.update(zip(((wanted, row) for row in new), found, strict=True))
            return np.array([known[wanted, row] for row in rows])

        return worst

    def measure(self, chosen: Sequence[Action], of_fold: Mapping[int, Sequence[Action]]) -> tuple[Effect, ...]:
        """The figures before and after."""

        def measured(case: HeldOut) -> Floats:
            pair, nested = _read(case), of_fold[case.fold]
            before, after = self._figures(pair, (), case), self._figures(pair, chosen, case)
            return np.stack([before, after if set(nested) == set(chosen) else self._figures(pair, nested, case), after])

        return self._effects(np.stack(self._each(measured, self.held_out, "measuring post-processing")))

    def _effects(self, table: Floats) -> tuple[Effect, ...]:
        """From figures (cases, before and nested and chosen, labels and regions, figures)."""
        names = [*self.schema.names, *(region.name for region in self.schema.regions)]
        found = []
        for column, name in enumerate(names):
            for number, figure in enumerate(FIGURES):
                values = table[:, :, column, number]
                defined = values[~np.isnan(values).any(axis=1)]
                if defined.size:
                    means = dict(zip(("before", "nested", "chosen"), defined.mean(axis=0).tolist(), strict=True))
                    found.append(Effect(label=name, figure=figure, **means))
        return tuple(found)

    def _figures(self, pair: _Pair, actions: Sequence[Action], case: HeldOut) -> Floats:
        """(labels and regions, figures); NaN where not defined or not annotated, 1 of a Dice where both are empty."""
        labels, regions = self._measured(self._after(case, pair, actions), pair)
        rows = [_values(row) for row in (*labels, *regions)]
        return np.where(np.array(self._known(case))[:, None], rows, np.nan)

    def _worst_change(self, case: HeldOut, actions: Sequence[Action]) -> float:
        """Of the Dice of any label or region; 0 where none falls."""
        pair = _read(case)
        change = self._dices(self._after(case, pair, actions), pair) - self._dices(pair.prediction, pair)
        return float(min(0.0, change[np.array(self._known(case))].min(initial=0.0)))

    def _dices(self, prediction: Array, pair: _Pair) -> Floats:
        """(labels and regions,), 1 where both are empty."""
        ids = self.schema.ids
        counts = count_voxels(
            prediction,
            pair.reference,
            value_count=max(*ids, self.schema.ignore or 0) + 1,
            regions=[[ids[c - 1] for c in union] for union in self.schema.region_classes],
            ignored=self.schema.ignore,
        )
        labels = dice_from_counts(counts.classes)[list(ids)]
        regions = [dice_from_counts(region)[1] for region in counts.regions]
        return np.asarray(np.nan_to_num(np.array([*labels, *regions]), nan=1.0))

    def _surface_gain(self, case: HeldOut, action: Action) -> float:
        """Of the mean over the parts of the action's structure."""
        pair = _read(case)
        wanted = [frozenset(part) for part in parts_of(action, self.schema)]
        regions = [frozenset(region.labels) for region in self.schema.regions]
        names = regions or [frozenset([name]) for name in self.schema.names]
        sides = []
        for prediction in (pair.prediction, self._after(case, pair, [action])):
            labels, unions = self._measured(prediction, pair)
            of_name = dict(zip(names, unions if regions else labels, strict=True))
            sides.append(np.mean([_values(of_name[part])[_SURFACE_DICE] for part in wanted]))
        return float(sides[1] - sides[0])

    def _threshold_effects(self, case: HeldOut, pair: _Pair, actions: Sequence[Action]) -> tuple[CaseEffect, ...]:
        kept = read_scores(case.scores)
        values = {i: c for c, i in enumerate(self.schema.ids, start=1)}
        if self.schema.ignore is not None:
            values[self.schema.ignore] = self.schema.class_count
        classes = torch.from_numpy(classes_of_values(pair.reference, values).astype(np.int32))
        on_grid = move_classes(classes[None], pair.geometry, kept.grids.grid)[0].numpy()
        return threshold_effects(kept, on_grid, actions, annotated=self._annotated(case))

    def _after(self, case: HeldOut, pair: _Pair, actions: Sequence[Action]) -> Array:
        """The label map with these actions."""
        if not actions:
            return pair.prediction
        wanted, ids = PostProcessing(actions=tuple(actions)), pair.prediction
        if wanted.thresholds:
            ids = segment_scores([read_scores(case.scores)], wanted.thresholds).label_map
        return postprocessed(ids, wanted, self.schema, pair.geometry) if wanted.cleaning else ids

    def _measured(self, prediction: Array, pair: _Pair) -> tuple[tuple[Measures, ...], tuple[Measures, ...]]:
        spacing_mm = pair.geometry.spacing_mm
        found = measure_ids(prediction, pair.reference, self.schema, spacing_mm=spacing_mm, settings=self.settings)
        return tuple(found.labels[i] for i in self.schema.ids), found.regions

    def _known(self, case: HeldOut) -> list[bool]:
        """Which labels and regions were annotated."""
        annotated = self._annotated(case)
        return [*annotated[1:], *(all(annotated[c] for c in union) for union in self.schema.region_classes)]

    def _annotated(self, case: HeldOut) -> tuple[bool, ...]:
        annotation = case.reference.annotation
        return self.schema.are_annotated(None if annotation is None else annotation.annotated)

    def _each(self, do: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
        """In threads, for reading frees the interpreter; in the order of the items."""
        found = []
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            for done, result in enumerate(pool.map(do, items), start=1):
                found.append(result)
                self.console.progress(what, done, len(items))
        return found


@dataclass(frozen=True, eq=False)
class _Pair:
    """Both label maps (I, J, K) of ids, on one grid."""

    prediction: Array
    reference: Array
    geometry: Geometry


def _read(case: HeldOut) -> _Pair:
    predicted, drawn = read_label(case.prediction), read_label(case.reference.path)
    if difference := predicted.geometry.difference(drawn.geometry):
        raise GeometryMismatch(
            f"{case.prediction} and its reference {case.reference.path} lie on different grids: {difference}"
        )
    annotation = case.reference.annotation
    ids = drawn.voxels if annotation is None else annotation.ids(drawn.voxels)
    return _Pair(predicted.voxels, ids, drawn.geometry)


def _values(row: Measures) -> list[float]:
    """Of `FIGURES`. To find nothing where nothing is, is right: a Dice of 1."""
    nothing = not (row.prediction_voxels or row.reference_voxels)
    return [1.0, 1.0, float("nan")] if nothing else [row.dice, row.surface_dice, row.hausdorff_95_mm]
