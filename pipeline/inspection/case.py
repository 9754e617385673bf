"""One case, looked at: what flows through the network, what its parts bring, how far it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import PlanError
from pipeline.free_memory import free_bytes
from pipeline.inspection.contributions import Change, Row, changed
from pipeline.inspection.figures import ChannelSums, record_sums
from pipeline.inspection.levels import Levels, levels_of
from pipeline.inspection.receptive import extents_mm, gradient_energy, voxels_to_ask
from pipeline.outputs import Listeners, segment_image
from pipeline.predict import Model, PredictSettings, check_input, explain, members_of
from pipeline.preparing import Prepared, prepare, put_back
from pipeline.scores import dice_of_classes
from pipeline.windows import Member, Pace
from transforms.volume import Volume

Classes = npt.NDArray[Any]
Told = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""

SETTINGS = PredictSettings(mirror=False)
"""Mirrored passes would mix activations of eight views, and take eight times as long."""


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

    `classes` (I, J, K) is the untouched result on the case's own grid. `energy` as `gradient_energy` gives it, None
    where memory did not suffice for it.
    """

    name: str
    prepared: Prepared
    classes: Classes
    sums: Mapping[str, ChannelSums]
    untouched: Row
    changed: Mapping[Change, Row]
    extents_mm: Mapping[str, float]
    energy: Tensor | None


def look_at(model: Model, case: Case, *, device: torch.device, changes: Sequence[Change], told: Told) -> Look:
    """Run the model's one network over a case as it is, with each of `changes`, and backward from a few voxels.

    Dice is on the case's own grid, without mirroring and post-processing: against the reference, or against the
    untouched result where there is none.

    Raises:
        PlanError: the levels of the network are not known, or memory does not suffice.
        VolumeError, GeometryMismatch: the model was not made for such a case.
    """
    check_input(model.plan, case.channels)
    passes = _Passes(model, case, device, told)
    with record_sums(passes.network) as sums:
        classes = passes.run("as it is")
    against = classes if case.reference is None else case.reference
    annotated = case.annotated or model.schema.are_annotated(None)

    def dice(found: Classes) -> Row:
        return dice_of_classes(found, against, model.schema, annotated=annotated)

    means = {name: found.mean for name, found in sums.items()}
    rows = {}
    for change in changes:
        with changed(passes.levels, change, means):
            rows[change] = dice(passes.run(change.name))
    known = np.where(against < model.schema.class_count, against, 0)
    grid = passes.source
    return Look(
        name=case.name,
        prepared=passes.prepared,
        classes=classes,
        sums=dict(sums),
        untouched=dice(classes),
        changed=rows,
        extents_mm=extents_mm(known, model.schema, grid.spacing_mm),
        energy=passes.energy(known),
    )


class _Passes:
    """A case as the network sees it, and passes over it."""

    def __init__(self, model: Model, case: Case, device: torch.device, told: Told) -> None:
        there = [volume for volume in case.channels if volume is not None]
        self.model, self.told, self.name = model, told, case.name
        self.source = there[0].geometry
        self.network = model.bundles[0].network
        self.levels: Levels = levels_of(self.network)
        planned = explain(model, self.source, settings=SETTINGS, device=device)
        self.pace = Pace(planned.batch, planned.slab_planes)
        self.members: list[Member] = members_of(model, SETTINGS)
        self.prepared = prepare(model.plan, case.channels)
        self.image = self.prepared.image.to(device)

    def run(self, what: str) -> Classes:
        """The classes (I, J, K) that the network finds now, on the case's own grid."""
        prepared, schema = self.prepared, self.model.schema
        grids = prepared.grid, prepared.field
        with torch.inference_mode():
            found = segment_image(
                self.members,
                self.image,
                grids,
                schema,
                pace=self.pace,
                listeners=Listeners(lambda done, total: self.told(f"{self.name}, {what}", done, total)),
            )
            classes: Classes = put_back(found[None], prepared, self.source)[0].numpy()
        return classes

    def energy(self, classes: Classes) -> Tensor | None:
        """See `gradient_energy`; None where there is too little memory to go backward through the network."""
        plan = self.model.plan
        if self.image.device.type == "cpu" and plan.memory_gb * 1e9 > free_bytes():
            return None
        positions = voxels_to_ask(classes, self.model.schema, self.source, self.prepared.grid)
        return gradient_energy(self.network, self.image, plan.patch_shape, positions)


def require_one_network(model: Model) -> Levels:
    """Where the levels of the model's network are.

    Raises:
        PlanError: the model is of several networks, or of one whose levels are not known.
    """
    count = len(model.bundles)
    if count > 1:
        raise PlanError(f"the model has {count} networks, and one is inspected at a time; give the folder of one fold")
    return levels_of(model.bundles[0].network)
