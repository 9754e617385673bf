"""The gradients of one batch, whole or in parts, within the memory that there is.

Every loss is a mean over patches, so the parts of a batch, each weighted by its share, add up to the whole.
"""

from __future__ import annotations

import gc
import math
import re

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from pipeline.batch import Batch
from pipeline.device import memory_gb_of
from pipeline.errors import RunError
from pipeline.losses import Loss, deep_supervision_loss
from pipeline.planner import advice_when_too_large
from pipeline.processes import any_of, whole_batch_only, without_exchange
from pipeline.task import TrainingState, TrainingTask

OUT_OF_MEMORY = re.compile(
    "out of memory|DefaultCPUAllocator|Cannot allocate memory|std::bad_alloc|could not (create|execute) a primitive$"
)
"""How PyTorch's allocators, the system and C++ say so in a RuntimeError.

The last is oneDNN, which gives no reason: it found no memory for its code or its scratchpad, or the tensors are larger
than it can index (https://github.com/pytorch/pytorch/issues/89104). Smaller parts are the answer to each.
"""


def gradients_that_fit(
    task: TrainingTask, fabric: Fabric, state: TrainingState, loss: Loss, batch: Batch
) -> dict[str, Tensor]:
    """Leave the batch's mean gradients in `state.network`; the loss and its terms, detached.

    Where memory runs out the batch is computed in twice as many parts, from then on (`state.parts`).
    Several processes find that out together before they exchange gradients for the first time.

    Raises:
        RunError: memory ran out with one patch, or with a batch that cannot be computed in parts.
    """
    while True:
        rehearsing = fabric.world_size > 1 and state.rehearsals > 0
        # The error itself holds on to what was computed so far: nothing of it may live on when the next try begins.
        figures = _attempt(task, fabric, state, loss, batch, exchange=not rehearsing)
        if not rehearsing and figures is not None:
            return figures
        if rehearsing and not any_of(fabric, figures is None):
            state.rehearsals -= 1
            figures = _attempt(task, fabric, state, loss, batch, exchange=True)
            if figures is not None:
                return figures
        state.optimiser.zero_grad(set_to_none=True)
        if fabric.world_size > 1 and not rehearsing:
            raise RunError("out of memory on one of several devices; resume the run with more memory or a smaller plan")
        state.parts = _more_parts(task, fabric, state.parts, len(batch))


def _attempt(
    task: TrainingTask, fabric: Fabric, state: TrainingState, loss: Loss, batch: Batch, *, exchange: bool
) -> dict[str, Tensor] | None:
    """None when memory ran out."""
    _seed(task.settings.seed, state.step, fabric.global_rank)
    state.optimiser.zero_grad(set_to_none=True)
    try:
        return _gradients(fabric, state, loss, batch, exchange=exchange)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # The error's traceback may have been part of a cycle, and held what was computed so far.
    gc.collect()
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _gradients(fabric: Fabric, state: TrainingState, loss: Loss, batch: Batch, *, exchange: bool) -> dict[str, Tensor]:
    """In `state.parts` parts; gradients are `exchange`d between processes with the last of them."""
    sums: dict[str, Tensor] = {}
    each = math.ceil(len(batch) / state.parts)
    starts = range(0, len(batch), each)
    for start in starts:
        part = batch.rows(start, min(start + each, len(batch)))
        # Asked here, since asking a GPU would wait for it.
        annotated = None if bool(part.annotated.all()) else part.annotated.to(fabric.device)
        part = part.to(fabric.device)
        last = start == starts[-1]
        with without_exchange(fabric, state.network, wanted=not (exchange and last)):
            total, terms = deep_supervision_loss(loss, state.network(part.images), part.classes, annotated)
            share = len(part) / len(batch)
            fabric.backward(total * share)
        for name, value in {"loss": total.detach(), **{f"loss/{k}": v for k, v in terms.items()}}.items():
            sums[name] = sums.get(name, 0.0) + value * share
    return sums


def _seed(seed: int, step: int, rank: int) -> None:
    """Whatever an update draws (dropped paths) follows from the seed, its number and the process alone."""
    state = np.random.SeedSequence([seed, 3, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def _more_parts(task: TrainingTask, fabric: Fabric, parts: int, patches: int) -> int:
    whole = whole_batch_only(task.plan, task.loss)
    if parts < patches and whole:
        raise RunError(
            f"out of memory with {patches} patches, which {whole} does not allow to be computed one by one; "
            f"lower plan.batch_size, or change {whole.partition('=')[0]}"
        )
    if parts >= patches:
        advice = advice_when_too_large(task.plan, memory_gb_of(fabric.device))
        raise RunError(f"out of memory with a single patch of {'x'.join(map(str, task.plan.patch_shape))}; {advice}")
    return min(2 * parts, patches)


def is_out_of_memory(error: BaseException) -> bool:
    """True for what a GPU's and a CPU's allocators raise."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
