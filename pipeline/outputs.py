"""What the outputs of a network mean, by the labels it was trained on: to the loss, and as classes on a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.loss_comparison import Targets
from pipeline.thresholds import decision_of
from pipeline.tiling import Layout, lay_out
from pipeline.windows import AT_ONCE, Member, Pace, Progress, VoxelFigure, stream_windows
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.restore import SlabRestorer, slab_axis


def targets_of(schema: LabelSchema) -> Targets:
    """What the loss compares outputs with."""
    return Targets(schema.class_count, schema.region_classes, schema.ignored_class)


@dataclass(frozen=True, eq=False)
class Listeners:
    """Who is told while a volume is segmented; they change nothing.

    `on_tile(done, total)` hears of each window. `on_slab(axis, first, scores)` is given each slab of finished scores
    (outputs, ...) from plane `first` on along an axis, as they were averaged, with the mean of a `figure` as one
    channel more, the last, if there is one (see `stream_windows`); it is to keep none of them.
    """

    on_tile: Progress | None = None
    on_slab: Callable[[int, int, Tensor], None] | None = None
    figure: VoxelFigure | None = None


NOBODY = Listeners()


@dataclass(frozen=True)
class Goal:
    """What a class map is to be: of the labels of `schema`, on the grid `field`, from scores on `grid`. `thresholds`
    are by the name of an output, those that are not a half (`thresholds.decision_of`)."""

    grid: Geometry
    field: Geometry
    schema: LabelSchema
    thresholds: Mapping[str, float] | None = None


def segment_image(
    members: Sequence[Member],
    image: Tensor,
    goal: Goal,
    *,
    pace: Pace = AT_ONCE,
    listeners: Listeners = NOBODY,
) -> Tensor:
    """The class map (I', J', K') on the goal's field, in ordinary memory, of an image (C, I, J, K) on its grid.

    Scores go to the field as they are finished; they never exist for a whole volume. The map is uint8, or int16 where
    there are more than 256 classes.
    """
    schema = goal.schema
    layout = layout_on(members, goal.grid, goal.field)
    restorer = SlabRestorer(
        goal.grid, goal.field, layout.axis, painted=schema.painted_classes or None, above=_above(members)
    )
    classes = torch.zeros(goal.field.shape, dtype=class_dtype(schema))
    turned = _turns(members)
    decision = decision_of(schema, goal.thresholds, in_logits=_has_logits(members)) if goal.thresholds else None
    told, figure = listeners.on_tile, listeners.figure
    for first, slab in stream_windows(members, image, layout, pace=pace, on_tile=told, figure=figure):
        if listeners.on_slab is not None:
            listeners.on_slab(layout.axis, first, slab)
        scores = slab if figure is None else slab[:-1]
        scores = probabilities_of(scores, schema) if turned else scores
        restorer.add(scores if decision is None else decision.apply_(scores), classes)
        del slab, scores  # else they would be held while the next windows are worked on
    return classes


def layout_on(members: Sequence[Member], grid: Geometry, field: Geometry) -> Layout:
    """The windows over `grid`, along an axis in whose order scores can go to `field`."""
    leans = grid.is_sheared != field.is_sheared
    return lay_out(grid.shape, [member.settings for member in members], axis=slab_axis(grid, field) if leans else None)


def class_dtype(schema: LabelSchema) -> torch.dtype:
    """The narrowest that holds every class."""
    return torch.uint8 if schema.class_count <= 256 else torch.int16


def _above(members: Sequence[Member]) -> float:
    """What a region's score is over where it is more likely than not."""
    return 0.0 if _has_logits(members) else 0.5


def _has_logits(members: Sequence[Member]) -> bool:
    """Whether it is logits that are interpolated and decided."""
    return members[0].settings.conventions.blend == "logits" and not _turns(members)


def _turns(members: Sequence[Member]) -> bool:
    """Whether blended logits become probabilities before they are interpolated."""
    conventions = members[0].settings.conventions
    return conventions.blend == "logits" and conventions.restores == "probabilities"


def probabilities_of(logits: Tensor, schema: LabelSchema) -> Tensor:
    """Those (O, ...) of blended logits (O, ...): each region's own, or the classes' together."""
    return logits.sigmoid() if schema.regions else logits.softmax(dim=0)
