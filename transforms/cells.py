"""What class scores decide between voxels: interpolated only in the cells whose corners do not agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transforms.spline import LinearTaps

_CHUNK = 1 << 17
"""Scores that are interpolated at a time: they stay in a core's cache."""

_COMPETITORS = 64
"""Classes that may win among neighbouring cells, mostly fewer; chunks are sized for so many."""

_FEWEST = 512
"""Voxels that are decided at a time, however many classes there are."""

_FEW = 1 << 15
"""Voxels up to which PyTorch's own search for the highest is faster than one class after another."""

_MARGIN = 1e-5
"""Of the largest score: far more than float32 loses, by which a class must fall short to be left out."""


@dataclass(frozen=True, eq=False)
class ScorePlane:
    """Scores (outputs, A, B) of a plane of voxels, of any strides, and the codes (A, B) that they decide."""

    scores: Tensor
    codes: Tensor

    def copied(self) -> ScorePlane:
        """The same in memory of its own."""
        return ScorePlane(self.scores.clone(), self.codes.clone())

    def at(self, places: Tensor) -> Tensor:
        """Scores (outputs, n) float32 at flat places of (A, B)."""
        width, (stride, across, along) = self.scores.shape[2], self.scores.stride()
        rows = places.div(width, rounding_mode="floor")
        index = rows * across + (places - rows * width) * along
        extent = (self.scores.shape[1] - 1) * across + (width - 1) * along + 1
        flat = self.scores.as_strided((len(self.scores), extent), (stride, 1))
        return flat.gather(1, index.expand(len(flat), -1)).to(torch.float32)


@dataclass(frozen=True, eq=False)
class PlaneBetween:
    """A target plane at `part` of the way from one plane of scores to another; `far` is `near` where it lies on one.

    `rows` and `columns` are where its voxels lie along A and B.
    """

    near: ScorePlane
    far: ScorePlane
    part: float
    rows: LinearTaps
    columns: LinearTaps

    def codes(self, above: float | None) -> Tensor:
        """What its voxels (A', B') decide, int16; see `codes_of`."""
        lowest, highest = self._extremes()
        mixed = lowest != highest
        rows, columns = (torch.from_numpy(taps.low).to(mixed.device) for taps in (self.rows, self.columns))
        cells = rows[:, None] * mixed.shape[1] + columns
        found = lowest.to(torch.int16).masked_fill_(mixed, -1).take(cells)
        places = (found < 0).view(-1).nonzero()[:, 0]
        if len(places):
            scores, corners = self._corners(mixed)
            numbers = _numbered(mixed)[cells.view(-1)[places]]
            found.view(-1)[places] = self._decided(scores, corners[:, numbers], places, above)
        return found

    def _extremes(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest code among the corners of each cell."""
        lowest, highest = self.near.codes, self.near.codes
        if self.far is not self.near:
            lowest, highest = torch.minimum(lowest, self.far.codes), torch.maximum(highest, self.far.codes)
        for axis, taps in enumerate((self.rows, self.columns)):
            if not taps.is_selection:
                lowest, highest = (
                    pick(codes.narrow(axis, 0, codes.shape[axis] - 1), codes.narrow(axis, 1, codes.shape[axis] - 1))
                    for pick, codes in ((torch.minimum, lowest), (torch.maximum, highest))
                )
        return lowest, highest

    def _corners(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (outputs, n) of the n places in this plane that are a corner of a mixed cell, and which of them the
        corners (4, cells) of each are: low and high along rows, at the low column, then at the high one."""
        width = self.near.codes.shape[1]
        row, column = mixed.nonzero().unbind(1)
        first = row * width + column
        down, right = (0 if self.rows.is_selection else width), (0 if self.columns.is_selection else 1)
        places = torch.stack([first, first + down, first + right, first + down + right])
        used = torch.zeros(self.near.codes.numel(), dtype=torch.bool, device=mixed.device)
        used[places.view(-1)] = True
        scores = self.near.at(used.nonzero()[:, 0])
        if self.far is not self.near:
            scores = _mean(scores, self.far.at(used.nonzero()[:, 0]), torch.tensor(self.part))
        return scores, _numbered(used)[places]

    def _decided(self, scores: Tensor, corners: Tensor, places: Tensor, above: float | None) -> Tensor:
        """Codes of the flat `places` of the plane, in rising order, whose cells have these corners."""
        rows = places.div(len(self.columns.low), rounding_mode="floor")
        columns = places - rows * len(self.columns.low)
        down, right = (torch.from_numpy(taps.part).to(places.device) for taps in (self.rows, self.columns))
        decided = torch.empty(len(places), dtype=torch.int16, device=places.device)
        needed = None if above is not None else _needed(scores, corners)
        size = max(_FEWEST, _CHUNK // min(len(scores), _COMPETITORS))
        for start in range(0, len(places), size):
            chunk = slice(start, start + size)
            nearby, outputs = scores, None
            at = corners[:, chunk]
            if needed is not None:
                first, count = int(at.min()), int(at.max() - at.min()) + 1
                nearby, at = scores.narrow(1, first, count), at - first
                # A class that stays below what is needed at all of these corners wins in none of their cells.
                outputs = (~(nearby.amax(dim=1) < needed[chunk].amin())).nonzero()[:, 0]
                nearby = nearby.index_select(0, outputs)
            values = [nearby.index_select(1, corner) for corner in at]
            if not self.rows.is_selection:
                part = down[rows[chunk]]
                values = [_mean(values[0], values[1], part), values[1], _mean(values[2], values[3], part)]
            if not self.columns.is_selection:
                values = [_mean(values[0], values[2], right[columns[chunk]])]
            codes = codes_of(values[0], above)
            decided[chunk] = codes.to(torch.int16) if outputs is None else outputs[codes.long()].to(torch.int16)
        return decided


def _mean(first: Tensor, second: Tensor, part: Tensor) -> Tensor:
    """Linear, in steps that are rounded alike wherever they are taken: no fused multiply-add."""
    return (first * (1.0 - part)).add_(second * part)


def _numbered(mask: Tensor) -> Tensor:
    """For each flat place where a mask is true, how many are before it."""
    return mask.reshape(-1).to(torch.int32).cumsum(0) - 1


def _needed(scores: Tensor, corners: Tensor) -> Tensor:
    """What a class has to reach, at a corner at least, to win in each of these cells.

    In a cell the highest score is at least the mean of its corners' winners, so at least the lowest value that mean
    has at a corner.
    """
    winners = codes_of(scores, None).long()[corners]
    flat, width = scores.reshape(-1), scores.shape[1]
    mean = torch.stack([flat.take(winners * width + at).mean(dim=0) for at in corners])
    return mean.amin(dim=0) - _MARGIN * scores.abs().amax()


def codes_of(scores: Tensor, above: float | None) -> Tensor:
    """What scores (outputs, ...) decide, uint8, or int16 if there are many.

    The class that wins, the first of equals; or, of regions, the last whose score is over `above` plus 1, 0 for none.
    """
    dtype = torch.uint8 if len(scores) < 255 else torch.int16
    if above is None and (scores.is_cuda or scores[0].numel() <= _FEW):
        return scores.max(dim=0)[1].to(dtype)
    codes = torch.zeros(scores.shape[1:], dtype=dtype, device=scores.device)
    best = scores[0].clone() if above is None else scores.new_full((), above)
    for number, score in enumerate(scores[1:] if above is None else scores, start=1):
        # Numbers only grow, so that the highest is the last that was better.
        codes = torch.maximum(codes, (score > best).to(dtype).mul_(number))
        best = torch.maximum(best, score) if above is None else best
    return codes
