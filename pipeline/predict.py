"""Volumes and a model -> a Segmentation on the source's own grid. No paths, no training config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.bundle import ModelBundle
from pipeline.errors import BundleError, GeometryMismatch, VolumeError
from pipeline.memory_plan import MemoryPlan
from pipeline.outputs import classes_of_probabilities
from pipeline.plan import ChannelPlan, Plan
from pipeline.preparing import prepare
from pipeline.segmentation import Algorithm, Segmentation
from pipeline.windows import Progress, WindowSettings, predict_windows
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.volume import Volume

AIR_HU = -500.0
"""A CT whose lowest voxel lies above this has no air in it, so its unit is hardly HU."""


@dataclass(frozen=True)
class PredictSettings:
    """How a study is segmented.

    `mirror`: average over mirrored passes. `max_memory_bytes`: what the process may hold in all (resident); None is
    80 % of what is free. `tile_step`: distance of tiles as part of the patch; None is the model's own.
    """

    mirror: bool
    max_memory_bytes: int | None = None
    tile_step: float | None = None


@dataclass(frozen=True, eq=False)
class Model:
    """One bundle, or several that are averaged: the folds of a cross-validation."""

    bundles: tuple[ModelBundle, ...]

    def __post_init__(self) -> None:
        if not self.bundles:
            raise BundleError("a model is at least one bundle")
        first = self.bundles[0]
        for other in self.bundles[1:]:
            if not other.schema.matches(first.schema) or other.schema.regions != first.schema.regions:
                raise BundleError("the bundles of an ensemble have different labels; give models of one training")
            if other.plan.preprocessing() != first.plan.preprocessing():
                raise BundleError("the bundles of an ensemble preprocess differently; give models of one training")

    @property
    def plan(self) -> Plan:
        """The first bundle's; preprocessing is the same for all."""
        return self.bundles[0].plan

    @property
    def schema(self) -> LabelSchema:
        """What the voxels of a result mean."""
        return self.bundles[0].schema

    @property
    def algorithm(self) -> Algorithm:
        """Who is named as the author of a segmentation."""
        index = self.bundles[0].index
        return Algorithm(f"volseg {index.name}", str(index.provenance.get("volseg", "")))

    @property
    def mirror(self) -> bool:
        """What was found worth it in training."""
        return self.bundles[0].index.mirror

    @property
    def tile_step(self) -> float:
        """Distance of tiles as part of the patch."""
        return self.bundles[0].index.tile_step


def predict(
    model: Model,
    channels: Sequence[Volume | None],
    *,
    settings: PredictSettings,
    device: torch.device,
    on_window: Progress | None = None,
) -> Segmentation:
    """Segment one study. `channels` are in the order of the model's and share a grid; so does the result.

    None stands for an optional channel that the study lacks. `on_window(done, total)` is called after each window.

    Raises:
        VolumeError: another number of channels, another modality, intensities that cannot be that modality's, a
            channel missing that is not optional, or all of them missing.
        GeometryMismatch: the channels lie on different grids.
    """
    check_input(model.plan, channels)
    source = next(volume.geometry for volume in channels if volume is not None)
    prepared = prepare(model.plan, channels)
    image, grid = prepared.image.to(device), prepared.grid
    total: Tensor | None = None
    with torch.inference_mode():
        for number, bundle in enumerate(model.bundles):
            window = _window(bundle, mirror=settings.mirror, step=settings.tile_step or model.tile_step)
            tell = None if on_window is None else _after(on_window, number, len(model.bundles))
            scores = predict_windows(bundle.network, image, window, on_tile=tell)
            total = scores if total is None else total.add_(scores)
        if total is None:
            raise BundleError("a model is at least one bundle")
        classes = classes_of_probabilities(total.div_(len(model.bundles)), model.schema, grid, source)
    label_map = model.schema.ids_from_classes(classes[0].cpu().numpy())
    return Segmentation(label_map, source, model.schema, model.algorithm)


def explain(model: Model, source: Geometry, *, settings: PredictSettings, device: torch.device) -> MemoryPlan:
    """What `predict` will hold in memory for a study on the grid `source`; nothing is computed.

    Raises:
        PlanError: the limit is too small; the message names the least that suffices.
    """
    grid = source.orthogonal().oriented(model.plan.axis_codes).respaced(model.plan.spacing_mm)
    image = 4 * len(model.plan.channels) * math.prod(grid.shape)
    scores = 4 * model.schema.output_count * math.prod(grid.shape)
    return MemoryPlan((("image", image), ("scores", scores)), settings.max_memory_bytes or 0, 1, grid.shape[0])


def check_input(plan: Plan, channels: Sequence[Volume | None]) -> None:
    """Refuse what the model was not made for.

    Raises:
        VolumeError, GeometryMismatch: see `predict`.
    """
    if len(channels) != len(plan.channels):
        names = ", ".join(channel.described for channel in plan.channels)
        raise VolumeError(f"{len(channels)} channel(s) given, the model wants {len(plan.channels)}: {names}")
    pairs = list(zip(channels, plan.channels, strict=True))
    refuse_missing([channel.name for volume, channel in pairs if volume is None], plan)
    there = [(volume, channel) for volume, channel in pairs if volume is not None]
    for volume, channel in there:
        refuse_modality(volume.modality, channel)
        _check_intensities(volume, channel)
        difference = there[0][0].geometry.difference(volume.geometry)
        if difference:
            raise GeometryMismatch(f"channel {channel.name} lies on another grid than the first: {difference}")


def refuse_missing(missing: Sequence[str], plan: Plan) -> None:
    """Refuse a study that lacks the channels of these names.

    Raises:
        VolumeError: one of them is not optional, or they are all that there are.
    """
    needed = [c.described for c in plan.channels if c.name in missing and not c.optional]
    if needed or len(missing) == len(plan.channels):
        what = f"channel {', '.join(needed)} is missing" if needed else "every channel is missing"
        known = ", ".join(channel.described for channel in plan.channels)
        raise VolumeError(f"{what}; the model wants {known}")


def refuse_modality(modality: str | None, channel: ChannelPlan) -> None:
    """Refuse what a header says is another modality (DICOM's code) than the channel's; None says nothing.

    Raises:
        VolumeError: as said.
    """
    if modality is not None and modality != channel.modality:
        raise VolumeError(
            f"the input is {modality}, the model's channel {channel.name} is {channel.modality}; "
            f"choose a model that was trained on {modality}"
        )


def _check_intensities(volume: Volume, channel: ChannelPlan) -> None:
    lowest, highest = float(volume.voxels.min()), float(volume.voxels.max())
    found = f"intensities from {lowest:g} to {highest:g}"
    if channel.modality == "CT" and channel.lowest < AIR_HU <= lowest:
        raise VolumeError(
            f"{found} are not a CT in HU as channel {channel.name} had in training (from {channel.lowest:g}): "
            "no voxel is air; give the CT in HU, or a model for this modality"
        )
    if channel.modality != "CT" and channel.lowest >= 0 and lowest <= AIR_HU:
        raise VolumeError(
            f"{found} look like a CT in HU, the model's channel {channel.name} is {channel.modality} "
            f"(from {channel.lowest:g} in training); choose a model that was trained on CT"
        )


def _after(on_window: Progress, number: int, count: int) -> Progress:
    """The windows of bundle `number` of `count`, counted after those of the bundles before it."""

    def tell(done: int, total: int) -> None:
        on_window(number * total + done, count * total)

    return tell


def _window(bundle: ModelBundle, *, mirror: bool, step: float) -> WindowSettings:
    axes = bundle.plan.mirror_axes if mirror else ()
    return WindowSettings(
        bundle.plan.patch_shape, bundle.plan.factor, step, axes, bundle.schema.twin_outputs, bool(bundle.schema.regions)
    )
