"""Kept scores -> label maps: several models averaged, other thresholds, without running a network again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import ConfigError, VolumeError
from pipeline.kept_scores import KeptScores
from pipeline.segmentation import Algorithm, Segmentation
from transforms.labels import LabelSchema
from transforms.placing import put_back
from transforms.restore import SlabRestorer, slab_axis

_SLAB_VALUES = 1 << 24
"""Scores that are decided together."""


def segment_scores(scores: Sequence[KeptScores], thresholds: Mapping[str, float] | None = None) -> Segmentation:
    """The label map of the mean of several models' scores of one study, on the study's grid, not post-processed.

    Without thresholds the likeliest class wins, and a region is where it is likelier than not. A label's threshold t
    is its share against any one other class from which on it is taken: it wins over class c where p / (p + p_c) > t,
    so that with one label t is the probability itself. A region's is its probability.

    Raises:
        VolumeError: the scores are of different studies or labels.
        ConfigError: a threshold of a name that is none of the labels (or regions, where there are any), or not within
            0 and 1.
    """
    first = scores[0]
    for other in scores[1:]:
        _refuse_other(first, other)
    schema, grids = first.schema, first.grids
    weights, shift = _decision(schema, thresholds or {})
    axis = slab_axis(grids.grid, grids.field)
    painted = schema.painted_classes if schema.regions else None
    restorer = SlabRestorer(grids.grid, grids.field, axis, painted=painted)
    classes = torch.zeros(grids.field.shape, dtype=torch.uint8 if schema.class_count <= 256 else torch.int16)
    count = grids.grid.shape[axis]
    step = max(1, _SLAB_VALUES // (schema.output_count * math.prod(grids.grid.shape) // count))
    for low in range(0, count, step):
        high = min(low + step, count)
        mean = first.dense(axis, low, high)
        for other in scores[1:]:
            mean += other.dense(axis, low, high)
        restorer.add(mean.div_(len(scores)).mul_(weights).add_(shift), classes)
    found = put_back(classes[None], grids.field, grids.box, grids.source)[0].numpy()
    return Segmentation(schema.ids_from_classes(found), grids.source, schema, Algorithm(*first.made_by))


def _decision(schema: LabelSchema, thresholds: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """By what each output (O, 1, 1, 1) is multiplied, and what is added, for the usual decision to heed thresholds."""
    names = [region.name for region in schema.regions] or ["", *schema.names]
    for name, threshold in thresholds.items():
        if not name or name not in names:
            known = ", ".join(filter(None, names))
            raise ConfigError(f"--threshold {name}={threshold:g}: the model's outputs are {known}")
        if not 0 < threshold < 1:
            raise ConfigError(f"--threshold {name}={threshold:g}: expected a probability between 0 and 1")
    limits = torch.tensor([thresholds.get(name, 0.5) for name in names]).reshape(-1, 1, 1, 1)
    if schema.regions:
        return torch.ones_like(limits), 0.5 - limits
    # p (1 - t) > p_c t is p / (p + p_c) > t; a class without a threshold has a half, so a weight of 1.
    return (1 - limits) / limits, torch.zeros_like(limits)


def _refuse_other(first: KeptScores, other: KeptScores) -> None:
    if difference := first.grids.difference(other.grids):
        raise VolumeError(f"the scores are not of one study: {difference}; average those of one study")
    if not first.schema.matches(other.schema) or first.schema.regions != other.schema.regions:
        raise VolumeError("the scores are of models with different labels; average those of one set of labels")
