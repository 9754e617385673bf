"""Volumes and a model -> a Segmentation on the source's own grid. No paths, no training config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.bundle import ModelBundle
from pipeline.confidence import Asked, Confidence, Gatherer
from pipeline.demand import batch_of, demand_of, with_confidence
from pipeline.errors import BundleError, GeometryMismatch, PlanError, VolumeError
from pipeline.free_memory import free_bytes, held_bytes
from pipeline.kept_scores import Grids
from pipeline.memory_plan import MemoryPlan, plan_memory
from pipeline.outputs import Goal, Listeners, layout_on, segment_image
from pipeline.plan import ChannelPlan, Plan
from pipeline.postprocessing import LIBRARY_BYTES as CLEANING_BYTES
from pipeline.postprocessing import PostProcessing, cleaning_bytes
from pipeline.preparing import Prepared, grid_of, prepare, put_back
from pipeline.segmentation import Algorithm, Segmentation
from pipeline.settled_memory import note_prediction, planning, settled_bytes
from pipeline.windows import Member, Pace, Progress, count_taken_for_air, window_settings
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.volume import Volume

FREE_SHARE = 0.8
"""Of the memory that is free, what a prediction may take unless it is told."""

VOXEL_BYTES = 4
"""Of a study's voxels, as `read_volume` gives them."""

AIR_HU = -500.0
"""A CT whose lowest voxel lies above this has no air in it, so its unit is hardly HU."""


@dataclass(frozen=True)
class PredictSettings:
    """How a study is segmented.

    `mirror`: average over mirrored passes. `max_memory_bytes`: what the process may hold in all (resident); None is
    80 % of what is free. It decides how much is worked on at a time, never the result. `tile_step`: distance of tiles
    as part of the patch; None is the model's own. `held_bytes`: what the process holds meanwhile beside the study, by
    `settled_bytes`, other studies that are read or written at the same time included; None is what it holds now.

    Asked for beside the labels (`Segmentation.confidence`): `uncertainty`, maps of entropy and disagreement and an
    estimate of quality; `estimate`, that alone; `keep_scores`, the probabilities of so many likeliest outputs a voxel.
    `postprocess`: do to the labels what the model's cross-validation found to help, if anything. `skip_air`: windows
    that the model takes for air are not computed, where labels are decided as they were when that was proven.
    """

    mirror: bool
    max_memory_bytes: int | None = None
    tile_step: float | None = None
    held_bytes: int | None = None
    uncertainty: bool = False
    estimate: bool = False
    keep_scores: int = 0
    postprocess: bool = True
    skip_air: bool = True

    @property
    def asked(self) -> Asked:
        """What is wanted beside the labels."""
        return Asked(self.uncertainty, self.estimate, self.keep_scores)


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
            if other.plan.inference != first.plan.inference:
                raise BundleError("the bundles of an ensemble blend differently; give models of one training")

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
    def postprocessing(self) -> PostProcessing | None:
        """What its cross-validation found to help.

        Raises:
            BundleError: the bundles of an ensemble have different ones.
        """
        found = {None if b.postprocessing is None else b.postprocessing.digest for b in self.bundles}
        if len(found) > 1:
            raise BundleError(
                "the bundles of an ensemble are post-processed differently, as when a fold was trained later; "
                "choose again for all of them with `volseg postprocess RUN`, or give --no-postprocessing"
            )
        return self.bundles[0].postprocessing

    @property
    def mirror(self) -> bool:
        """What was found worth it in training.

        Raises:
            BundleError: the bundles of an ensemble do otherwise than each other.
        """
        if len(found := {bundle.index.mirror for bundle in self.bundles}) > 1:
            raise BundleError(
                "some bundles of the ensemble take mirrored passes and some do not, as when folds were trained one by "
                "one; let all of them decide with `volseg postprocess RUN`, or give --mirror or --no-mirror"
            )
        return found.pop()

    @property
    def air(self) -> tuple[float, ...] | None:
        """Values, one a channel, below which all bundles take a window for air; None where one has not proven any.

        That no label changes was seen of each by itself, not of their mean.
        """
        known = [bundle.index.air for bundle in self.bundles]
        levels = [air.levels for air in known if air is not None and air.is_proven]
        return tuple(map(min, zip(*levels, strict=True))) if len(levels) == len(self.bundles) else None

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
        PlanError: the memory that it may hold does not suffice; the message names the least that does.
        BundleError: the bundles are post-processed differently, and that is not left out.
    """
    check_input(model.plan, channels)
    there = [volume for volume in channels if volume is not None]
    source, study = there[0].geometry, sum(volume.voxels.nbytes for volume in there)
    planned = _planned(model, source, settings, device, study=study, is_there=True)
    prepared = prepare(model.plan, channels)
    image, cleaning = prepared.image.to(device), _cleaning_of(model, settings)
    goal = Goal(prepared.grid, prepared.field, model.schema, None if cleaning is None else cleaning.thresholds)
    pace = Pace(planned.batch, planned.slab_planes, planned.skip_empty)
    members = members_of(model, settings)
    skipped = count_taken_for_air(members, image, layout_on(members, goal.grid, goal.field))
    gatherer = Gatherer(members, model.schema, prepared.grid, settings.asked) if settings.asked.anything else None
    told = Listeners(on_window) if gatherer is None else Listeners(on_window, gatherer.add, gatherer.figure)
    with torch.inference_mode():
        found = segment_image(members, image, goal, pace=pace, listeners=told)
        classes = put_back(found[None], prepared, source)[0].numpy()
        beside = None if gatherer is None else _confidence(gatherer, model, prepared, source)
    del image, prepared, found  # else they would be held while the labels are worked on
    ids = model.schema.ids_from_classes(classes)
    if cleaning is not None and cleaning.cleaning:
        from pipeline.cleaning import postprocessed

        ids = postprocessed(ids, cleaning, model.schema, source)
    note_prediction(cleaned=cleans_labels(model, settings))
    return Segmentation(ids, source, model.schema, model.algorithm, beside, cleaning, skipped)


def _cleaning_of(model: Model, settings: PredictSettings) -> PostProcessing | None:
    return model.postprocessing if settings.postprocess else None


def cleans_labels(model: Model, settings: PredictSettings) -> bool:
    """Whether anything is done to finished labels.

    Raises:
        BundleError: as `Model.postprocessing`.
    """
    cleaning = _cleaning_of(model, settings)
    return cleaning is not None and bool(cleaning.cleaning)


def _confidence(gatherer: Gatherer, model: Model, prepared: Prepared, source: Geometry) -> Confidence:
    grids = Grids(prepared.grid, prepared.field, prepared.box, source)
    made_by = (model.algorithm.name, model.algorithm.version)
    return gatherer.finished(grids, made_by, [bundle.digest for bundle in model.bundles])


def explain(model: Model, source: Geometry, *, settings: PredictSettings, device: torch.device) -> MemoryPlan:
    """What `predict` will hold in memory for a study on the grid `source`, which is not loaded yet.

    Raises:
        PlanError: the limit is too small; the message names the least that suffices.
        VolumeError: the grid cannot be brought to the model's axes.
    """
    study = VOXEL_BYTES * len(model.plan.channels) * math.prod(source.shape)
    return _planned(model, source, settings, device, study=study, is_there=False)


def _planned(
    model: Model, source: Geometry, settings: PredictSettings, device: torch.device, *, study: int, is_there: bool
) -> MemoryPlan:
    """For a study of so many bytes, which the process holds already or not."""
    there = study if is_there else 0
    cleans = cleans_labels(model, settings)
    held = settled_bytes(cleans=cleans) - there if settings.held_bytes is None else settings.held_bytes
    members = members_of(model, settings)
    try:
        grid = grid_of(model.plan, source)
    except ValueError as error:
        raise VolumeError(str(error)) from error
    layout = layout_on(members, grid, source if model.plan.placing is None else grid)
    limit = settings.max_memory_bytes or held_bytes() - there + study + round(FREE_SHARE * free_bytes())
    batch = batch_of(layout, device)

    def planned(*, exactly: bool) -> MemoryPlan:
        with planning():
            demand = demand_of(model.bundles, members, layout, source, device=device, exactly=exactly)
        if settings.asked.anything:
            demand = with_confidence(demand, members, layout, source, asked=settings.asked, schema=model.schema)
        if cleans:
            # Its library is counted in what is held.
            demand = replace(demand, cleaning=cleaning_bytes(math.prod(source.shape)) - CLEANING_BYTES)
        return plan_memory(replace(demand, process=held, study=study), limit_bytes=limit, batch=batch)

    try:
        return planned(exactly=False)
    except PlanError:
        return planned(exactly=True)


def members_of(model: Model, settings: PredictSettings) -> list[Member]:
    """The model's networks, each with the windows that it wants."""
    step, air = settings.tile_step or model.tile_step, air_of(model, settings)
    wanted = [window_settings(b.plan, b.schema, step=step, mirror=settings.mirror) for b in model.bundles]
    return [Member(b.network, replace(w, air=air)) for b, w in zip(model.bundles, wanted, strict=True)]


def air_of(model: Model, settings: PredictSettings) -> tuple[float, ...] | None:
    """What windows have to reach not to be taken for air; None where that was not proven of such settings.

    It was of the likeliest labels, by the model's own windows and passes: not of scores, nor of moved thresholds.

    Raises:
        BundleError: as `Model.postprocessing`.
    """
    passes = all(settings.mirror == bundle.index.mirror for bundle in model.bundles)
    if not settings.skip_air or not passes or settings.tile_step not in (None, model.tile_step):
        return None
    cleaning = _cleaning_of(model, settings)
    return None if settings.asked.anything or (cleaning is not None and cleaning.thresholds) else model.air


def taken_for_air(model: Model, channels: Sequence[Volume | None], settings: PredictSettings) -> int:
    """Windows of a study that `predict` would not compute although they hold more than the lowest values.

    Raises:
        VolumeError, GeometryMismatch, BundleError: see `predict`.
    """
    check_input(model.plan, channels)
    prepared, members = prepare(model.plan, channels), members_of(model, settings)
    return count_taken_for_air(members, prepared.image, layout_on(members, prepared.grid, prepared.field))


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
    """Refuse what a header says is another modality (DICOM's code) than the channel's; None on either side is unknown.

    Raises:
        VolumeError: as said.
    """
    if None not in (modality, channel.modality) and modality != channel.modality:
        raise VolumeError(
            f"the input is {modality}, the model's channel {channel.name} is {channel.modality}; "
            f"choose a model that was trained on {modality}"
        )


def _check_intensities(volume: Volume, channel: ChannelPlan) -> None:
    if channel.modality is None or channel.lowest is None:
        return
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
