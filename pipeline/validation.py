"""Whole validation volumes during a training: Dice on the plan's grid. Several processes share the cases out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from lightning_fabric import Fabric
from torch import nn

from pipeline.dataset import PreparedCase
from pipeline.outputs import Goal, segment_image
from pipeline.processes import done_by_all
from pipeline.scores import dice_of_classes
from pipeline.task import TrainingTask
from pipeline.windows import Member, window_settings


def validate(task: TrainingTask, network: nn.Module, *, last: bool) -> dict[str, float]:
    """Mean Dice per label, per region and `mean`, on whole validation volumes on the plan's grid, without mirroring.

    What is ignored or was not annotated in a case does not count, nor do labels that are absent from both sides; a
    label that is left with no case is left out. `mean` is over regions where there are any, else over labels.
    """
    return _mean_dice(_dice_of_cases(task, network, validation_cases(task, last=last)), task)


def validate_together(task: TrainingTask, network: nn.Module, fabric: Fabric, *, last: bool) -> dict[str, float]:
    """What `validate` gives, in every process of `fabric`; case n is done by process n modulo their number.

    Raises:
        RunError: a case failed in another process; what fails in this one comes through as it is.
    """
    cases, world = validation_cases(task, last=last), fabric.world_size
    shares = done_by_all(fabric, lambda: _dice_of_cases(task, network, cases[fabric.global_rank :: world]))
    # In the order of the cases, so that sums are those of one process.
    return _mean_dice([shares[number % world][number // world] for number in range(len(cases))], task)


def validation_cases(task: TrainingTask, *, last: bool) -> Sequence[PreparedCase]:
    """Those that a validation looks at: the first few, and all at the end."""
    return task.validation if last else task.validation[: task.settings.validation_cases]


def _dice_of_cases(task: TrainingTask, network: nn.Module, cases: Sequence[PreparedCase]) -> list[dict[str, float]]:
    schema = task.schema
    member = Member(network, window_settings(task.plan, schema, step=task.tile_step, mirror=False))
    per_case = []
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode():
        for case in cases:
            goal = Goal(case.geometry, case.geometry, schema)
            found = segment_image([member], case.image.to(device), goal).numpy()
            annotated = schema.are_annotated(None) if case.annotated is None else case.annotated.tolist()
            per_case.append(dice_of_classes(found, case.classes[0].numpy(), schema, annotated=annotated))
    return per_case


def _mean_dice(per_case: Sequence[Mapping[str, float]], task: TrainingTask) -> dict[str, float]:
    headline = [region.name for region in task.schema.regions] or task.schema.names
    means = {}
    for name in per_case[0] if per_case else ():
        scored = [row[name] for row in per_case if not math.isnan(row[name])]
        if scored:
            means[name] = sum(scored) / len(scored)
    shown = [means[name] for name in headline if name in means]
    return means | ({"mean": sum(shown) / len(shown)} if shown else {})
