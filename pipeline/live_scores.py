"""Scores of which some windows are still to come: a few planes of the volume, in a ring."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.tiling import Layout

MOST_FLOAT32_OUTPUTS = 32
"""Networks with more outputs have their scores held in 16 bits until they are finished."""

FIXED_POINT = 32_000
"""Probabilities in 16 bits are multiples of one part in this; the rest of the range is for what rounding adds."""

_NOTHING = 0.499
"""What is less is rounded to 0."""

_MOST = 0.8
"""Of the outputs: with more than this left, all are added at once."""

Store = Literal["float32", "fixed", "float16"]
_DTYPES: dict[Store, torch.dtype] = {"float32": torch.float32, "fixed": torch.int16, "float16": torch.float16}


def store_of(output_count: int, blend: Literal["probabilities", "logits"]) -> Store:
    """How unfinished scores are held: by the model alone, never by how much memory there is.

    Fixed point: n windows over a voxel move a probability by at most n / 64,000, so that only a voxel whose two best
    classes are closer than twice that can get another label. Logits have no bounds, so they are rounded as nnU-Net
    does it (Isensee et al. 2021), to half precision.
    """
    if output_count <= MOST_FLOAT32_OUTPUTS:
        return "float32"
    return "fixed" if blend == "probabilities" else "float16"


def live_bytes(output_count: int, layout: Layout, store: Store) -> int:
    """What the ring holds, its coverage included."""
    voxels = math.prod(layout.live_shape)
    return voxels * (output_count * _DTYPES[store].itemsize + torch.float32.itemsize)


def is_copied(store: Store, axis: int) -> bool:
    """Whether finished scores are: where they are held in another type, and where a plane's do not lie together, as
    who takes them wants them."""
    return store != "float32" or axis == 2


class LiveScores:
    """Sums (O, I, J, K) over the planes [`first`, `first` + depth) of the layout's axis, each at its number modulo
    depth."""

    def __init__(self, output_count: int, layout: Layout, store: Store, device: torch.device) -> None:
        self.axis, self.depth, self.store = layout.axis, layout.depth, store
        self.first = 0
        self.sums = torch.zeros((output_count, *layout.live_shape), dtype=_DTYPES[store], device=device)

    def add(self, start_ijk: Sequence[int], scores: Tensor, weights: Tensor) -> None:
        """Scores (O, i, j, k) float32 at a place of the volume, times weights (i, j, k).

        Raises:
            ValueError: they reach out of the planes that are held.
        """
        begin, count = start_ijk[self.axis], scores.shape[self.axis + 1]
        if begin < self.first or begin + count > self.first + self.depth:
            raise ValueError(f"planes {begin} to {begin + count} of {self.first} to {self.first + self.depth}")
        outputs, shares = self._shares(scores, weights)
        for low, high in self.parts(begin, begin + count):
            part = shares.narrow(self.axis + 1, low - begin, high - low)
            place: list[slice] = [slice(None)]
            for axis, side in enumerate(part.shape[1:]):
                at = low % self.depth if axis == self.axis else start_ijk[axis]
                place.append(slice(at, at + side))
            sums = self.sums[tuple(place)]
            if outputs is None:
                sums += part
            else:
                sums.index_add_(0, outputs, part)

    def _shares(self, scores: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """What is added, as it is held, and to which outputs; None are all."""
        if self.store != "fixed":
            return None, (scores * weights).to(self.sums.dtype)
        weights = weights * FIXED_POINT
        # Of many classes most are so unlikely everywhere in a piece that nothing of them is left in 16 bits.
        counts = scores.amax(dim=(1, 2, 3)) * weights.amax() > _NOTHING
        outputs = counts.nonzero()[:, 0]
        if len(outputs) > _MOST * len(scores):
            return None, (scores * weights).round_().to(self.sums.dtype)
        return outputs, scores.index_select(0, outputs).mul_(weights).round_().to(self.sums.dtype)

    def take(self, stop: int, planes: int) -> Iterator[tuple[int, Tensor]]:
        """The planes up to `stop`, which are finished, at most `planes` at a time: number of the first, float32 scores.

        A slab is good until the next is asked for.
        """
        copy: Tensor | None = None
        while self.first < stop:
            low, high = next(self.parts(self.first, min(self.first + planes, stop)))
            slab = self.sums.narrow(self.axis + 1, low % self.depth, high - low)
            if not is_copied(self.store, self.axis):
                yield low, slab
            else:
                planes_first = slab.movedim(self.axis + 1, 1)
                if copy is None or copy.shape != planes_first.shape:
                    copy = None  # else the next one would be made beside it
                    copy = torch.empty(planes_first.shape, dtype=torch.float32, device=slab.device)
                finished = copy.copy_(planes_first).movedim(1, self.axis + 1)
                yield low, finished.div_(FIXED_POINT) if self.store == "fixed" else finished
                del finished
            slab.zero_()
            self.first = high

    def parts(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The planes [first, stop) in parts that lie together in the ring."""
        while first < stop:
            end = min(stop, (first // self.depth + 1) * self.depth)
            yield first, end
            first = end
