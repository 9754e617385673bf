"""What a prediction tells beside its labels, if it is asked: where it is unsure, how good it may be, its scores.

All of it is gathered from scores as they are finished, plane by plane, and changes none of them. Entropy and
disagreement (see `uncertainty`) are held on the network's grid and moved linearly to the study's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.dice_tally import DiceTally
from pipeline.kept_scores import Grids, Keeper, KeptScores, kept_scores_bytes
from pipeline.outputs import probabilities_of
from pipeline.quality import QualityEstimate
from pipeline.tile_scores import Member, mirror_passes
from pipeline.uncertainty import Potential, entropy
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.placing import put_back
from transforms.resample import move

MAP_BYTES = 2
"""Of a voxel of a map until it is finished: half precision."""

WORK_PLANES = 6
"""Planes of scores that are worked on at a time: probabilities, their logarithms, what is left of them."""

MOVING_BYTES = 10
"""For each voxel of the study, while a map is moved to it: the map in single precision, half precision, and bytes."""

_STEPS = 255


@dataclass(frozen=True)
class Asked:
    """Maps of uncertainty, an estimate of quality, and the scores of so many likeliest outputs a voxel."""

    maps: bool = False
    estimate: bool = False
    keep_scores: int = 0

    @property
    def anything(self) -> bool:
        """Whether there is anything to gather."""
        return self.maps or self.estimate or self.keep_scores > 0


@dataclass(frozen=True, eq=False)
class UncertaintyMap:
    """Bytes (I, J, K) on the study's grid; times `step` they are parts of the highest entropy."""

    values: npt.NDArray[np.uint8]
    step: float


@dataclass(frozen=True, eq=False)
class Confidence:
    """What was asked for; the rest is None. There is no disagreement where there is only one answer."""

    entropy: UncertaintyMap | None = None
    disagreement: UncertaintyMap | None = None
    estimate: QualityEstimate | None = None
    scores: KeptScores | None = None

    @property
    def byte_count(self) -> int:
        """What it holds."""
        maps = sum(found.values.nbytes for found in (self.entropy, self.disagreement) if found is not None)
        return maps + (self.scores.outputs.nbytes + self.scores.levels.nbytes if self.scores is not None else 0)


def answer_count(members: Sequence[Member]) -> int:
    """Passes through networks that are averaged, mirrored ones included."""
    return sum(len(mirror_passes(member.settings.mirror_axes)) for member in members)


def figure_for(members: Sequence[Member], asked: Asked) -> Potential | None:
    """By which disagreement is told; None where it is not asked for, or one answer has nobody to disagree with."""
    if not asked.maps or answer_count(members) < 2:
        return None
    settings = members[0].settings
    return Potential(settings.overlap, settings.conventions.blend == "logits")


@dataclass(frozen=True)
class Taken:
    """Bytes: what a `Gatherer` holds, what finishing it takes besides, and what its `Confidence` holds."""

    gathered: int
    finishing: int
    finished: int


def bytes_taken(members: Sequence[Member], asked: Asked, schema: LabelSchema, voxels: tuple[int, int]) -> Taken:
    """Of a study with so many `voxels` on the network's grid, and on its own."""
    grid, source = voxels
    maps = (1 + (figure_for(members, asked) is not None)) if asked.maps else 0
    scores = kept_scores_bytes(grid, schema, asked.keep_scores)
    # While the last map is moved, the others are finished.
    finishing = (MOVING_BYTES + maps - 1) * source if maps else 0
    return Taken(maps * MAP_BYTES * grid + scores, finishing, maps * source + scores)


class Gatherer:
    """Takes slabs of scores on `grid`, and gives a `Confidence` in the end."""

    def __init__(self, members: Sequence[Member], schema: LabelSchema, grid: Geometry, asked: Asked) -> None:
        self.figure = figure_for(members, asked)
        self._settings, self._grid, self._schema = members[0].settings, grid, schema
        names = (["entropy"] if asked.maps else []) + (["disagreement"] if self.figure else [])
        self._maps = {name: torch.zeros(grid.shape, dtype=torch.float16) for name in names}
        # An estimate comes with the maps.
        self._tally = DiceTally(schema) if asked.estimate or asked.maps else None
        self._keeper = Keeper(grid.shape, schema, asked.keep_scores) if asked.keep_scores else None

    def add(self, axis: int, first: int, slab: Tensor) -> None:
        """Scores (O, ...), or with the mean of `figure` (O + 1, ...), from plane `first` on along an axis."""
        for n in range(slab.shape[axis + 1]):
            plane = slab.select(axis + 1, n)
            scores = plane[: self._schema.output_count]
            logits = self._settings.conventions.blend == "logits"
            probabilities = probabilities_of(scores, self._schema) if logits else scores
            if "entropy" in self._maps:
                found = entropy(probabilities, overlap=self._settings.overlap)
                self._maps["entropy"].select(axis, first + n).copy_(found)
            if self.figure is not None:
                found = self.figure.disagreement(plane[-1], scores)
                self._maps["disagreement"].select(axis, first + n).copy_(found)
            if self._tally is not None:
                self._tally.add(probabilities)
            if self._keeper is not None:
                self._keeper.add(axis, first + n, probabilities)

    def finished(self, grids: Grids, made_by: tuple[str, str], models: Sequence[str]) -> Confidence:
        """When all slabs have come; for the last two see `KeptScores`."""
        return Confidence(
            **{name: _moved(self._maps.pop(name), grids) for name in list(self._maps)},
            estimate=None if self._tally is None else self._tally.estimate(self._grid.voxel_volume_mm3, models),
            scores=None if self._keeper is None else self._keeper.kept(grids, made_by, models),
        )


def _moved(found: Tensor, grids: Grids) -> UncertaintyMap:
    moved = move(found[None], grids.grid, grids.field, order=1, dtype=torch.float16)
    return _in_bytes(put_back(moved, grids.field, grids.box, grids.source)[0])


def _in_bytes(values: Tensor) -> UncertaintyMap:
    """As fine as 8 bits allow: the largest value is the last step."""
    highest = float(values.max())
    step = highest / _STEPS if highest > 0 else 1 / _STEPS
    found = torch.empty(values.shape, dtype=torch.uint8)
    for plane, into in zip(values, found, strict=True):
        into.copy_(plane.float().div_(step).round_().clamp_(0, _STEPS))
    return UncertaintyMap(found.numpy(), step)
