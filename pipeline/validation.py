"""Whole validation volumes during a training: Dice on the plan's grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.outputs import Goal, segment_image
from pipeline.scores import dice_of_classes
from pipeline.task import TrainingTask
from pipeline.windows import Member, window_settings


def validate(task: TrainingTask, network: nn.Module, *, last: bool) -> dict[str, float]:
    """Mean Dice per label, per region and `mean`, on whole validation volumes on the plan's grid, without mirroring.

    What is ignored or was not annotated in a case does not count, nor do labels that are absent from both sides; a
    label that is left with no case is left out. `mean` is over regions where there are any, else over labels.
    """
    cases = task.validation if last else task.validation[: task.settings.validation_cases]
    schema, plan = task.schema, task.plan
    member = Member(network, window_settings(plan, schema, step=task.tile_step, mirror=False))
    per_case = []
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode():
        for case in cases:
            goal = Goal(case.geometry, case.geometry, schema)
            found = segment_image([member], case.image.to(device), goal).numpy()
            annotated = schema.are_annotated(None) if case.annotated is None else case.annotated.tolist()
            per_case.append(dice_of_classes(found, case.classes[0].numpy(), schema, annotated=annotated))
    headline = [region.name for region in schema.regions] or schema.names
    return _mean_dice(per_case, headline)


def _mean_dice(per_case: Sequence[Mapping[str, float]], headline: Sequence[str]) -> dict[str, float]:
    means = {}
    for name in per_case[0] if per_case else ():
        scored = [row[name] for row in per_case if not math.isnan(row[name])]
        if scored:
            means[name] = sum(scored) / len(scored)
    shown = [means[name] for name in headline if name in means]
    return means | ({"mean": sum(shown) / len(shown)} if shown else {})
