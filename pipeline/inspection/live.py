"""What a training tells of the levels of its network while it goes on: figures of each, and norms of their gradients.

Looking changes nothing: figures are those of the averaged weights, which are what is kept and which no gradient flows
through, on one patch of one validation case, always the same; gradients are read where they lie, before the optimiser
uses them (some change them in place). Nothing is computed, and no device is waited for, in updates between two looks.
A training of a given number of updates ends with the same bits; one of minutes has fewer, as looking takes time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.gradients import is_out_of_memory
from pipeline.inspection.figures import LevelFigures, figures_of, record_sums
from pipeline.inspection.levels import levels_of
from pipeline.inspection.window import Window, window_of
from pipeline.task import TrainingState, TrainingTask, bare

FIGURES = ("energy", "sparsity", "effective_rank", "dead_share", "redundant_share")
"""Of `LevelFigures`, those that are told."""

REST = "rest"
"""What belongs to no level, such as the layer that gives the scores."""

Look = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""After an update, with its figures: rows for the history, none where it is not time to look."""


@contextmanager
def inspecting(task: TrainingTask, fabric: Fabric, state: TrainingState, note: Callable[[str], None]) -> Iterator[Look]:
    """While entered, looks every `train.inspect_every` updates, and after the last; in the first process alone.

    Raises:
        PlanError: the levels of the network are not known.
    """
    if task.settings.inspect_every is None or not fabric.is_global_zero:
        yield lambda _: {}
        return
    inspection = Onlooker(task, fabric, state, note)
    hook = state.optimiser.register_step_pre_hook(inspection.before_step)
    try:
        yield inspection.after_update
    finally:
        hook.remove()


class Onlooker:
    """One training, seen from inside."""

    def __init__(self, task: TrainingTask, fabric: Fabric, state: TrainingState, note: Callable[[str], None]) -> None:
        self._every, self._fabric, self._state, self._note = task.settings.inspect_every or 0, fabric, state, note
        self._levels = parameter_levels(bare(state.network))
        self._window = validation_window(task)
        self._norms: Tensor | None = None

    def before_step(self, *_: Any) -> None:
        """With the (clipped) gradients of the coming update, as an optimiser's hook is called."""
        if not self._due(self._state.step + 1):
            return
        norms = [gradient_norm(parameters) for parameters in self._levels.values()]
        self._norms = torch.stack([norm.to(self._fabric.device) for norm in norms])

    def after_update(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures of each level, and norms of gradients as they were before `values['gradient_norm']` was clipped."""
        norms, self._norms = self._norms, None
        if not self._due(self._state.step):
            return {}
        rows = {}
        if norms is not None:
            clipped = torch.linalg.vector_norm(norms).clamp_min(torch.finfo(norms.dtype).tiny)
            whole = (norms * (values["gradient_norm"] / clipped)).tolist()
            rows = {f"gradient_norm/{plain(n)}": norm for n, norm in zip(self._levels, whole, strict=True)}
        rows |= self._figures()
        return {name: value for name, value in rows.items() if math.isfinite(value)}

    def _due(self, step: int) -> bool:
        return self._every > 0 and (step % self._every == 0 or step == self._state.steps)

    def _figures(self) -> dict[str, float]:
        try:
            image = self._window.image[None].to(self._fabric.device)
            network = self._state.averaged
            with torch.inference_mode(), self._fabric.autocast(), record_sums(network) as sums:
                network(image)
            return rows_of(figures_of(sums))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._every = 0
        self._note("memory does not suffice to look inside the network: figures of its levels end here")
        return {}


def rows_of(figures: Sequence[LevelFigures]) -> dict[str, float]:
    """As 'inspect/encoder_1/energy'; a skip that hands on what the encoder found, as it is, is left out."""
    encoders = {level.level: level for level in figures if level.kind == "encoder"}
    told = [level for level in figures if level.kind != "skip" or not _is_alike(level, encoders.get(level.level))]
    return {f"inspect/{plain(level.name)}/{figure}": getattr(level, figure) for level in told for figure in FIGURES}


def _is_alike(level: LevelFigures, other: LevelFigures | None) -> bool:
    """But for rounding: the same features lie differently in memory, and are summed in another order."""
    if other is None:
        return False
    pairs = ((getattr(level, figure), getattr(other, figure)) for figure in FIGURES)
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) for a, b in pairs)


def plain(name: str) -> str:
    """The name of a level as it stands in names of figures and files."""
    return name.replace(" ", "_")


def parameter_levels(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each level, by its name and in its order, and of the `REST`; each parameter once.

    Raises:
        PlanError: the levels of the network are not known.
    """
    points = levels_of(network).named()
    names = {id(point.module): name for name, point in points.items() if point.argument is None}
    by_path = {path: names[id(module)] for path, module in network.named_modules() if id(module) in names}
    found: dict[str, list[nn.Parameter]] = {name: [] for name in (*points, REST)}
    for path, parameter in network.named_parameters():
        around = [inner for inner in by_path if path.startswith(f"{inner}.")]
        # Where levels lie inside one another, the innermost is the parameter's own.
        found[by_path[max(around, key=len)] if around else REST].append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of the gradients there are, together; a scalar on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def validation_window(task: TrainingTask) -> Window:
    """The patch that is looked at: around the object of the first validation case that shows one."""
    count = task.schema.class_count
    shown = (c for c in task.validation if bool(((c.classes > 0) & (c.classes < count)).any()))
    case = next(shown, task.validation[0])
    return window_of(case.image, case.classes[0], case.geometry, task.plan.patch_shape, class_count=count)
