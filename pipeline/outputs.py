"""What the outputs of a network mean, by the labels it was trained on: to the loss, and on a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss_comparison import Targets
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.resample import move_argmax, move_regions


def targets_of(schema: LabelSchema) -> Targets:
    """What the loss compares outputs with."""
    return Targets(schema.class_count, schema.region_classes, schema.ignored_class)


def classes_of_probabilities(probabilities: Tensor, schema: LabelSchema, source: Geometry, target: Geometry) -> Tensor:
    """The class map (1, I', J', K') int32 on `target` that probabilities (O, I, J, K) on `source` amount to."""
    if schema.regions:
        return move_regions(probabilities, schema.painted_classes, source, target, dtype=torch.int32)
    return move_argmax(probabilities, source, target, dtype=torch.int32)
