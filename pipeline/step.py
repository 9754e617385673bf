"""How a training starts, and one update of it."""

from __future__ import annotations

import copy
import math

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import TrainConfig
from pipeline.losses import Loss, deep_supervision_loss
from pipeline.models.registry import build_network
from pipeline.models.slices import as_volume_network
from pipeline.schedule import Schedule
from pipeline.task import TrainingState, TrainingTask, bare

SGD_MOMENTUM = 0.99
ADAMW_BETAS = (0.9, 0.99)

UNKNOWN = Schedule(((0, 1),))
"""Of a training whose number of updates is still to be found."""


def start_training(task: TrainingTask, fabric: Fabric) -> TrainingState:
    shape = tuple(n for a, n in enumerate(task.plan.patch_shape) if a != task.plan.slice_axis)
    generator = torch.Generator().manual_seed(task.settings.seed)
    network = build_network(task.plan.network, task.plan.unet, shape, generator=generator)
    network = as_volume_network(network, task.plan.slice_axis)
    averaged = fabric.to_device(copy.deepcopy(network)).eval().requires_grad_(False)
    optimiser = _optimiser(network, task.settings)
    network, optimiser = fabric.setup(network, optimiser)
    torch.manual_seed(task.settings.seed)
    return TrainingState(network, averaged, optimiser, UNKNOWN)


def _optimiser(network: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay is for kernels only: biases and normalisation scales have nothing to shrink for."""
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=SGD_MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=ADAMW_BETAS)


def update(
    task: TrainingTask, fabric: Fabric, state: TrainingState, loss: Loss, batch: Batch, rate: float
) -> dict[str, Tensor]:
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.network.train()
    state.optimiser.zero_grad(set_to_none=True)
    total, terms = deep_supervision_loss(loss, state.network(batch.images), batch.classes, batch.annotated)
    fabric.backward(total)
    norm = fabric.clip_gradients(
        state.network, state.optimiser, max_norm=task.settings.gradient_norm, error_if_nonfinite=False
    )
    state.optimiser.step()
    _average(state, average_decay(task.settings, state.step))
    return {
        "loss": total.detach(),
        **{f"loss/{k}": v for k, v in terms.items()},
        "gradient_norm": torch.as_tensor(norm),
    }


@torch.no_grad()
def _average(state: TrainingState, decay: float) -> None:
    current, averaged = bare(state.network).state_dict(), state.averaged.state_dict()
    floats = [name for name, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([averaged[n] for n in floats], [current[n] for n in floats], 1.0 - decay)
    for name in current.keys() - set(floats):
        averaged[name].copy_(current[name])


def learning_rate(settings: TrainConfig, step: float, steps: int) -> float:
    """Linear rise over the warm-up, then half a cosine to zero at the last step (Loshchilov and Hutter 2017).

    `step` is a position among `steps`, as `Schedule.position` gives it.
    """
    warm = max(1, round(settings.warmup * steps))
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warm) / max(1, steps - warm)))
    return settings.learning_rate * min(1.0, (step + 1) / warm) * fall


def average_decay(settings: TrainConfig, step: int) -> float:
    """Decay of the averaged weights: short at first, so that the random start is forgotten."""
    return min(settings.weight_average, (1 + step) / (10 + step)) if settings.weight_average else 0.0
