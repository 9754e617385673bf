"""One case, looked at: what flows through the network, what its parts bring, how far it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.free_memory import free_bytes
from pipeline.gradients import is_out_of_memory
from pipeline.inspection.contributions import Change, Row, changed
from pipeline.inspection.figures import ChannelSums, record_sums
from pipeline.inspection.levels import levels_of
from pipeline.inspection.receptive import Millimetres, extents_mm, gradient_energy, radius_mm, reach_mm, voxels_to_ask
from pipeline.outputs import Goal, Listeners, segment_image
from pipeline.predict import Model, PredictSettings, check_input, explain, members_of
from pipeline.preparing import prepare, put_back
from pipeline.scores import dice_of_classes
from pipeline.windows import Pace
from transforms.volume import Volume

Classes = npt.NDArray[Any]
Told = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""

SETTINGS = PredictSettings(mirror=False, skip_air=False)
"""Mirrored passes would mix activations of eight views, and take eight times as long; every window is looked at."""


@dataclass(frozen=True, eq=False)
class Case:
    """What is looked at: `channels` in the model's order, on one grid, None where an optional one is missing.

    `reference`: classes (I, J, K) on that grid, None where none is known; `annotated`: per class, the background first.
    """

    name: str
    channels: tuple[Volume | None, ...]
    reference: Classes | None = None
    annotated: tuple[bool, ...] = ()


@dataclass(frozen=True, eq=False)
class Look:
    """What was found in one case.

    `radius_mm` and `reach_mm` are of the gradients of `asked` output voxels, see `ReceptiveField`; None where memory
    did not suffice for them, or no answer depends on the image. `spacing_mm` is of the grid that the network sees.
    """

    name: str
    sums: Mapping[str, ChannelSums]
    untouched: Row
    changed: Mapping[Change, Row]
    extents_mm: Mapping[str, float]
    spacing_mm: Millimetres
    radius_mm: float | None
    reach_mm: Millimetres | None
    asked: int


@dataclass(frozen=True, eq=False)
class Untouched:
    """A case as the network is: what flowed through its levels, and the classes (I, J, K) on the case's own grid."""

    sums: Mapping[str, ChannelSums]
    classes: Classes


class Passes:
    """A case as the model's one network sees it, and passes over it.

    Raises:
        PlanError: the levels of the network are not known, or memory does not suffice.
        VolumeError, GeometryMismatch: the model was not made for such a case.
    """

    def __init__(self, model: Model, case: Case, *, device: torch.device, told: Told) -> None:
        check_input(model.plan, case.channels)
        self.model, self.case, self.told = model, case, told
        self.source = next(volume for volume in case.channels if volume is not None).geometry
        self.network = model.bundles[0].network
        self.levels = levels_of(self.network)
        planned = explain(model, self.source, settings=SETTINGS, device=device)
        self.pace = Pace(planned.batch, planned.slab_planes)
        self.members = members_of(model, SETTINGS)
        self.prepared = prepare(model.plan, case.channels)
        self.image = self.prepared.image.to(device)

    def untouched(self) -> Untouched:
        """The network as it is."""
        with record_sums(self.network) as sums:
            classes = self.run("as it is")
        return Untouched(dict(sums), classes)

    def run(self, what: str) -> Classes:
        """The classes (I, J, K) that the network finds now, on the case's own grid."""
        prepared = self.prepared
        goal = Goal(prepared.grid, prepared.field, self.model.schema)
        listeners = Listeners(lambda done, total: self.told(f"{self.case.name}, {what}", done, total))
        with torch.inference_mode():
            found = segment_image(self.members, self.image, goal, pace=self.pace, listeners=listeners)
            classes: Classes = put_back(found[None], prepared, self.source)[0].numpy()
        return classes

    def gradients(self, classes: Classes) -> Tensor | None:
        """See `gradient_energy`, of voxels in these labels; None where memory does not suffice."""
        schema, patch = self.model.schema, self.model.plan.patch_shape
        if self.image.device.type == "cpu" and self._backward_bytes() > free_bytes():
            return None  # a system that runs out of memory may end the process without an error
        try:
            asked = voxels_to_ask(classes, schema, self.source, self.prepared.grid)
            return gradient_energy(self.network, self.image, patch, asked)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _backward_bytes(self) -> float:
        """What going backward through one patch takes at most: its part of a training step; 0 where it is not known."""
        return 1e9 * self.model.plan.memory_gb / self.model.plan.batch_size


def look_at(passes: Passes, untouched: Untouched, changes: Sequence[Change]) -> Look:
    """Pass over a case with each of `changes`, and backward from a few voxels.

    Dice is on the case's own grid, without mirroring and post-processing: against the reference, or against the
    untouched result where there is none.
    """
    case, schema = passes.case, passes.model.schema
    classes, sums = untouched.classes, untouched.sums
    expected = classes if case.reference is None else case.reference
    annotated = case.annotated or schema.are_annotated(None)
    means = {name: found.mean for name, found in sums.items()}
    rows = {}
    for change in changes:
        with changed(passes.levels, change, means):
            found = passes.run(change.name)
        rows[change] = dice_of_classes(found, expected, schema, annotated=annotated)
    labelled = np.where(expected < schema.class_count, expected, 0)
    energy, spacing_mm = passes.gradients(labelled), passes.prepared.grid.spacing_mm
    return Look(
        name=case.name,
        sums=sums,
        untouched=dice_of_classes(classes, expected, schema, annotated=annotated),
        changed=rows,
        extents_mm=extents_mm(labelled, schema, passes.source.spacing_mm),
        spacing_mm=spacing_mm,
        radius_mm=None if energy is None else radius_mm(energy, spacing_mm),
        reach_mm=None if energy is None else reach_mm(energy, spacing_mm),
        asked=0 if energy is None else round(float(energy.sum())),
    )
