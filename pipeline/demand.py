"""What a study asks of memory under a model: every part of a prediction, in bytes, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.bundle import ModelBundle
from pipeline.confidence import WORK_PLANES, Asked, bytes_taken, figure_for
from pipeline.live_scores import is_copied, live_bytes, store_of
from pipeline.memory_plan import Demand
from pipeline.models.cost import WORKSPACE_FACTOR, kept_bytes, weight_count
from pipeline.models.unet import UNet
from pipeline.network_memory import answer_bytes
from pipeline.outputs import class_dtype
from pipeline.plan import Plan
from pipeline.tile_scores import CHUNK_VALUES, Member, mirror_passes, widening
from pipeline.tiling import Layout, Triple
from transforms.geometry import Geometry
from transforms.labels import LabelSchema

FLOAT_BYTES = 4

FOREIGN_CHANNELS = 512
"""For each voxel of a window, what a network from MONAI is taken to hold that cannot be run without values."""

PREPARING_SPARE = 0.5
"""Volumes of float32 on the study's grid for masks and slabs, beside channels put together and channels normalised."""

FOREIGN_COPIES = 4
"""The same in all, for each channel, where the steps are another framework's."""

CODE_BYTES = 16
"""Of a finished voxel: which class wins, its score, and what compares them."""

MIXED_VOLUMES = 5
"""Planes of scores that are gathered where classes meet, if they meet everywhere, and the last one of a slab."""

BATCH_VOXELS = 1 << 21
"""On a GPU, windows pass through the network together up to this many voxels."""


def batch_of(layout: Layout, device: torch.device) -> int:
    """Windows in a batch, by model and device alone: a GPU picks another kernel, and rounding, for another batch.

    On a CPU the bits are the same for any batch, and one at a time is as fast as several.
    """
    if device.type == "cpu":
        return 1
    return max(1, BATCH_VOXELS // max(math.prod(row.window) for row in layout.rows))


def demand_of(
    bundles: Sequence[ModelBundle],
    members: Sequence[Member],
    layout: Layout,
    source: Geometry,
    *,
    device: torch.device,
    exactly: bool,
) -> Demand:
    """Of a study on the grid `source`, without what the process and the study hold already.

    `exactly` runs each network without values, which takes a second the first time; otherwise what training would
    keep stands for what the network holds, which is more. On a GPU the network and its scores lie in its own memory.
    """
    plan, outputs = bundles[0].plan, bundles[0].schema.output_count
    volume, grid = math.prod(source.shape), math.prod(layout.shape)
    image = FLOAT_BYTES * len(plan.channels) * grid
    store = store_of(outputs, plan.inference.blend)
    plane = math.prod(n for axis, n in enumerate(layout.shape) if axis != layout.axis)
    on_host = device.type == "cpu"
    # Finished scores may be copied as they are taken, and are where logits become probabilities.
    copies_of_slab = is_copied(store, layout.axis) + 2 * (plan.inference.blend == "logits")
    slab_plane = plane * (FLOAT_BYTES * outputs * copies_of_slab + CODE_BYTES)
    return Demand(
        process=0,
        study=0,
        preparing=round(FLOAT_BYTES * _preparing_volumes(plan) * volume),
        image=image,
        network=_network(bundles, members, layout, exactly=exactly) if on_host else 0,
        live=live_bytes(outputs, layout, store) if on_host else 0,
        slab_plane=slab_plane if on_host else 0,
        restoring=MIXED_VOLUMES * FLOAT_BYTES * outputs * plane if on_host else 0,
        label_map=volume * class_dtype(bundles[0].schema).itemsize,
        empty=FLOAT_BYTES * outputs * _window_voxels(layout) if on_host else 0,
        is_on_host=on_host,
    )


def with_confidence(
    demand: Demand, members: Sequence[Member], layout: Layout, source: Geometry, *, asked: Asked, schema: LabelSchema
) -> Demand:
    """The same, with what is gathered beside the labels."""
    # One channel more of what is averaged, in a window and in the ring, and a piece of logarithms and of the figure.
    figure = figure_for(members, asked) is not None and demand.is_on_host
    work = WORK_PLANES * FLOAT_BYTES * schema.output_count if demand.is_on_host else 0
    window = max(math.prod(row.window) for row in layout.rows)
    network = FLOAT_BYTES * (window + 2 * CHUNK_VALUES) if figure else 0
    empty = FLOAT_BYTES * _window_voxels(layout) if figure else 0
    live = FLOAT_BYTES * math.prod(layout.live_shape) if figure else 0
    plane = math.prod(n for axis, n in enumerate(layout.shape) if axis != layout.axis)
    taken = bytes_taken(members, asked, schema, (math.prod(layout.shape), math.prod(source.shape)))
    return replace(
        demand,
        network=demand.network + network,
        live=demand.live + live,
        empty=demand.empty + empty,
        restoring=demand.restoring + work * plane,
        gathered=taken.gathered,
        finishing=taken.finishing,
        finished=taken.finished,
    )


def _window_voxels(layout: Layout) -> int:
    """Of one window of each network that has windows of its own."""
    return sum(math.prod(window) for window, _ in {(row.window, row.members) for row in layout.rows})


def _preparing_volumes(plan: Plan) -> float:
    """Of float32 on the study's grid, beside the study and the image that comes of it, at the peak."""
    channels = len(plan.channels)
    if plan.placing is not None or plan.recipe is not None:
        return FOREIGN_COPIES * channels
    # A single channel is not put together with others.
    return (2 if channels > 1 else 1) * channels + PREPARING_SPARE


def _network(bundles: Sequence[ModelBundle], members: Sequence[Member], layout: Layout, *, exactly: bool) -> int:
    """Of the row of windows that takes most: a network, and what is added up of several passes."""
    most = 0
    for window, seeing in {(row.window, row.members) for row in layout.rows}:
        passes = sum(len(mirror_passes(members[m].settings.mirror_axes)) for m in seeing)
        voxels = math.prod(window)
        sums = FLOAT_BYTES * bundles[0].schema.output_count * voxels if passes > 1 else 0
        weights = 4 * FLOAT_BYTES * voxels + FLOAT_BYTES * math.prod(layout.live_shape)
        answers = [_answer(bundles[m], window, exactly=exactly) for m in seeing]
        most = max(most, max(answers) + sums + weights + 6 * FLOAT_BYTES * CHUNK_VALUES)
    return most


def _answer(bundle: ModelBundle, window: Triple, *, exactly: bool) -> int:
    plan = bundle.plan
    shape = (1, len(plan.channels), *window)
    unet = widening(bundle.network)
    # Logits that are made a few planes at a time are none of what is held.
    network, logits = (bundle.network, bundle.schema.output_count) if unet is None else (_Features(unet), 0)
    found = answer_bytes(network, shape) if exactly or plan.monai is not None else None
    if found is not None:
        return found
    if plan.monai is not None:
        return FLOAT_BYTES * FOREIGN_CHANNELS * math.prod(window)
    flat = tuple(n for axis, n in enumerate(window) if axis != plan.slice_axis)
    kept = kept_bytes(plan.network, plan.unet, flat, 1) + FLOAT_BYTES * weight_count(plan.network, plan.unet)
    return round(WORKSPACE_FACTOR * kept) + FLOAT_BYTES * logits * math.prod(window)


class _Features(nn.Module):
    """A U-Net without its last layer."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.features(image)
