"""How a training starts, and one update of it."""

from __future__ import annotations

import copy
import math

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import TrainConfig
from pipeline.errors import RunError
from pipeline.gradients import gradients_that_fit
from pipeline.losses import Loss
from pipeline.models.registry import build_network
from pipeline.models.slices import as_volume_network
from pipeline.processes import gradient_scaler, mean_of, names_of_all
from pipeline.schedule import Schedule
from pipeline.task import TrainingState, TrainingTask, bare

SGD_MOMENTUM = 0.99
ADAMW_BETAS = (0.9, 0.99)

MOST_SKIPPED = 10
"""Updates in a row without a finite loss or gradient after which a training stops."""

LEAST_SCALE = 1.0
"""A float16 gradient that overflows when it is scaled no more than this is not too large for float16, but at fault."""

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
    return TrainingState(network, averaged, optimiser, UNKNOWN, scaler=gradient_scaler(fabric))


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
    """One update with this process's share of a batch; figures (scalars) for the log.

    Where the loss or the gradient is not finite, all stays as it was, `state.skipped` grows and no figure is a number.
    To know it the host waits for a GPU once an update, where little is left to be told to it.

    Raises:
        RunError: memory does not suffice for one patch, or ten updates in a row could not be made.
    """
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.network.train()
    # Running statistics, if there are any: the forward pass changes them.
    buffers = [(buffer, buffer.clone()) for buffer in state.network.buffers()]
    figures = mean_of(fabric, gradients_that_fit(task, fabric, state, loss, batch))
    norm = torch.as_tensor(
        fabric.clip_gradients(
            state.network, state.optimiser, max_norm=task.settings.gradient_norm, error_if_nonfinite=False
        )
    )
    # Averaged over the processes, both are the same on all of them, and so is what follows.
    loss_is_finite, norm_is_finite = torch.stack([figures["loss"], norm]).isfinite().tolist()
    if loss_is_finite and norm_is_finite:
        state.optimiser.step()
        _average(state, average_decay(task.settings, state.step))
        state.suspects = []
        return {**figures, "gradient_norm": norm}
    for buffer, before in buffers:
        buffer.copy_(before)
    if not _is_overflow(state, loss_is_finite=loss_is_finite):
        _leave_out(fabric, state, batch)
    return dict.fromkeys((*figures, "gradient_norm"), norm.new_tensor(math.nan))


def _is_overflow(state: TrainingState, *, loss_is_finite: bool) -> bool:
    """Whether float16 alone is to blame; the gradients are scaled less from now on."""
    if state.scaler is None:
        return False
    scale = state.scaler.get_scale()
    state.scaler.update()
    return loss_is_finite and scale > LEAST_SCALE


def _leave_out(fabric: Fabric, state: TrainingState, batch: Batch) -> None:
    state.skipped += 1
    state.suspects.append(names_of_all(fabric, batch.case_ids))
    if len(state.suspects) >= MOST_SKIPPED:
        names = ", ".join(sorted({name for names in state.suspects for name in names}))
        raise RunError(
            f"{MOST_SKIPPED} updates in a row had no finite loss or gradient; their cases: {names}; look for voxels "
            "that are not finite in them, or lower train.learning_rate and choose another --out"
        )


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
