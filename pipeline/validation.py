"""Whole validation volumes during a training: Dice on the plan's grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from pipeline.metrics import confusion_counts, dice_from_counts
from pipeline.task import TrainingTask
from pipeline.windows import WindowSettings, predict_windows


def validate(task: TrainingTask, network: nn.Module, *, last: bool) -> dict[str, float]:
    """Mean Dice per label name and `mean`, on whole validation volumes on the plan's grid, without mirroring.

    Labels absent from both sides count nowhere; a label that occurs in no case is left out.
    """
    cases = task.validation if last else task.validation[: task.settings.validation_cases]
    window = WindowSettings(task.plan.patch_shape, task.plan.factor, task.tile_step, (), task.schema.twin_classes)
    per_case = []
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode():
        for case in cases:
            scores = predict_windows(network, case.image.to(device), window)
            found = scores.argmax(dim=0).cpu().numpy()
            counts = confusion_counts(found, case.classes[0].numpy(), task.plan.class_count)
            per_case.append([float(x) for x in dice_from_counts(counts)[1:]])
    return _mean_dice(per_case, task.schema.names)


def _mean_dice(per_case: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    means = {}
    for column, name in enumerate(names):
        scored = [row[column] for row in per_case if not math.isnan(row[column])]
        if scored:
            means[name] = sum(scored) / len(scored)
    if means:
        means["mean"] = sum(means.values()) / len(means)
    return means
