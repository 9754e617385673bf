"""Kept scores -> label maps: several models averaged, other thresholds, without running a network again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pipeline.errors import ConfigError, VolumeError
from pipeline.kept_scores import KeptScores, ScoresHeader
from pipeline.outputs import class_dtype
from pipeline.segmentation import Algorithm, Segmentation
from pipeline.thresholds import Decision, decision_of
from transforms.labels import LabelSchema
from transforms.placing import put_back
from transforms.restore import SlabRestorer, slab_axis

_SLAB_VALUES = 1 << 24
"""Scores that are decided together."""


def segment_scores(scores: Sequence[KeptScores], thresholds: Mapping[str, float] | None = None) -> Segmentation:
    """The label map of the mean of several models' scores of one study, on the study's grid, not post-processed.

    Without thresholds the likeliest class wins, and a region is where it is likelier than not; see `decision_of`.

    Raises:
        VolumeError: the scores are of different studies or labels.
        ConfigError: a threshold of a name that is none of the labels (or regions, where there are any), or not within
            0 and 1.
    """
    refuse_others(scores)
    first = scores[0]
    schema, grids = first.schema, first.grids
    decision = _decision(schema, thresholds or {})
    axis = slab_axis(grids.grid, grids.field)
    restorer = SlabRestorer(grids.grid, grids.field, axis, painted=schema.painted_classes or None)
    classes = torch.zeros(grids.field.shape, dtype=class_dtype(schema))
    count = grids.grid.shape[axis]
    step = max(1, _SLAB_VALUES // (schema.output_count * math.prod(grids.grid.shape) // count))
    for low in range(0, count, step):
        high = min(low + step, count)
        mean = first.dense(axis, low, high)
        for other in scores[1:]:
            mean += other.dense(axis, low, high)
        restorer.add(decision.apply_(mean.div_(len(scores))), classes)
    found = put_back(classes[None], grids.field, grids.box, grids.source)[0].numpy()
    return Segmentation(schema.ids_from_classes(found), grids.source, schema, _algorithm(scores))


def _decision(schema: LabelSchema, thresholds: Mapping[str, float]) -> Decision:
    try:
        return decision_of(schema, thresholds)
    except ValueError as error:
        raise ConfigError(f"--threshold {error}") from error


def refuse_others(scores: Sequence[KeptScores] | Sequence[ScoresHeader]) -> None:
    """Refuse what cannot be averaged.

    Raises:
        VolumeError: the scores are of different studies or labels.
    """
    first = scores[0]
    for other in scores[1:]:
        if difference := first.grids.difference(other.grids):
            raise VolumeError(f"the scores are not of one study: {difference}; average those of one study")
        if not have_same_labels(first.schema, other.schema):
            raise VolumeError("the scores are of models with different labels; average those of one set of labels")


def have_same_labels(first: LabelSchema, second: LabelSchema) -> bool:
    """Whether the outputs of two models mean the same."""
    return first.matches(second) and first.regions == second.regions


def _algorithm(scores: Sequence[KeptScores]) -> Algorithm:
    """All that took part."""
    names, versions = (" and ".join(dict.fromkeys(each)) for each in zip(*(s.made_by for s in scores), strict=True))
    return Algorithm(names, versions)
