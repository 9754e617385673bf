"""Sliding-window inference on one preprocessed volume: scores, blended where windows overlap, plane after plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.live_scores import LiveScores, store_of
from pipeline.tile_scores import Member, Network, VoxelFigure, mirror_passes, score_tiles
from pipeline.tiling import Box, Layout, Row, Triple, WindowSettings, lay_out, overlap, window_settings, window_shape
from transforms.channels import channel_minima
from transforms.patches import blending_weights, nnunet_weights
from transforms.sampling import filled

__all__ = [
    "Member",
    "Network",
    "Progress",
    "VoxelFigure",
    "WindowSettings",
    "mirror_passes",
    "predict_windows",
    "stream_windows",
    "window_settings",
    "window_shape",
]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pace:
    """How much is in memory at a time: windows in a batch, finished planes in a slab. It changes no result.

    `skip_empty`: of windows that hold nothing but the lowest value of each channel, or are taken for such, the network
    sees one, and its answer is kept for the others.
    """

    batch: int = 1
    slab_planes: int = 1 << 30
    skip_empty: bool = True


AT_ONCE = Pace()
"""One window at a time, and all that is finished."""


def predict_windows(
    network: Network, image: Tensor, settings: WindowSettings, *, on_tile: Progress | None = None
) -> Tensor:
    """Scores (outputs, I, J, K) float32 of a whole image (C, I, J, K), on the image's device.

    They are probabilities, or logits where the conventions blend these. `network` maps (1, C, *patch) to logits
    (1, outputs, *patch). Volumes smaller than the patch are padded as the conventions say, and the padding is cut off
    again. `on_tile(done, total)` is called after each tile.
    """
    layout = lay_out(image.shape[1:], [settings])
    whole: Tensor | None = None
    for first, slab in stream_windows([Member(network, settings)], image, layout, on_tile=on_tile):
        if whole is None:
            whole = torch.empty((slab.shape[0], *layout.shape), device=slab.device)
        whole.narrow(layout.axis + 1, first, slab.shape[layout.axis + 1]).copy_(slab)
    if whole is None:
        raise ValueError("a volume has at least one tile")
    return whole


def stream_windows(
    members: Sequence[Member],
    image: Tensor,
    layout: Layout,
    *,
    pace: Pace = AT_ONCE,
    on_tile: Progress | None = None,
    figure: VoxelFigure | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Scores of an image (C, I, J, K), averaged over the members, as slabs in the order of the layout's axis.

    A slab is the number of its first plane and scores (outputs, ...) float32 that have the image's other two sides; it
    is good until the next is asked for. `on_tile(done, total)` is called after each tile. The mean of a `figure` over
    all answers, weighed as they are, is one channel more, the last; the others are the same without it.
    """
    tell, done = on_tile or _silence, 0
    conventions = members[0].settings.conventions
    scorers: dict[tuple[int, ...], _Scorer] = {}
    live: LiveScores | None = None
    for row in layout.rows:
        if live is not None:
            yield from live.take(layout.planes(row)[0], pace.slab_planes)
        weights = _RowWeights(row, layout, conventions.weights, share=len(row.members) / len(members))
        if row.members not in scorers:
            seeing = [members[m] for m in row.members]
            scorers[row.members] = _Scorer(seeing, image, row.window, skip_empty=pace.skip_empty, figure=figure)
        for at in range(0, len(row.starts), pace.batch):
            starts = row.starts[at : at + pace.batch]
            weighed = {start: weights.of(start).to(image.device) for start in starts}
            for start, low, scores in scorers[row.members].scores(starts):
                if live is None:
                    store = store_of(scores.shape[0] - (figure is not None), conventions.blend)
                    live = LiveScores(scores.shape[0], layout, store, scores.device)
                _add(live, start, low, scores, weighed[start])
            for _ in starts:
                done += 1
                tell(done, layout.window_count)
    if live is not None:
        yield from live.take(layout.shape[layout.axis], pace.slab_planes)


def count_taken_for_air(members: Sequence[Member], image: Tensor, layout: Layout) -> int:
    """Windows of an image (C, I, J, K) that are taken for air (`WindowSettings.air`) although they hold more."""
    count = 0
    for row in layout.rows if members[0].settings.air is not None else ():
        scorer = _Scorer([members[m] for m in row.members], image, row.window, skip_empty=True, figure=None)
        count += sum(scorer.takes_for_air(start) for start in row.starts)
    return count


class _RowWeights:
    """What each voxel of a row's windows counts for: over all windows that see a voxel they sum to `share`."""

    def __init__(self, row: Row, layout: Layout, kind: Literal["centred", "nnunet", "even"], *, share: float) -> None:
        first, stop = layout.planes(row)
        self.profile = _PROFILES[kind](row.window)
        self.origin = [first if a == layout.axis else 0 for a in range(3)]
        self.shape = [stop - first if a == layout.axis else n for a, n in enumerate(layout.shape)]
        self.coverage = torch.zeros(self.shape)
        for other in layout.rows:
            other_first, other_stop = layout.planes(other)
            if other.members == row.members and other_first < stop and first < other_stop:
                for start in other.starts:
                    window, volume = self._overlap(start)
                    self.coverage[volume] += self.profile[window]
        self.coverage /= share

    def of(self, start_ijk: Triple) -> Tensor:
        """Those of the voxels (I, J, K) of a window that lie in the volume."""
        window, volume = self._overlap(start_ijk)
        return self.profile[window] / self.coverage[volume]

    def _overlap(self, start_ijk: Triple) -> tuple[Box, Box]:
        starts = [a - o for a, o in zip(start_ijk, self.origin, strict=True)]
        return overlap(starts, self.profile.shape, self.shape)


class _Scorer:
    """Windows of one shape, cut from an image (C, I, J, K) and scored by the networks that see them."""

    def __init__(
        self, members: Sequence[Member], image: Tensor, window: Triple, *, skip_empty: bool, figure: VoxelFigure | None
    ) -> None:
        self.members, self.image, self.window, self.figure = members, image, window, figure
        self.lowest = channel_minima(image)
        zero = members[0].settings.conventions.padding == "zero"
        self.padding = torch.zeros_like(self.lowest) if zero else self.lowest
        self.skip_empty = skip_empty
        air = members[0].settings.air
        self.air = None if air is None else torch.tensor(air, dtype=image.dtype, device=image.device)
        self._of_empty: list[tuple[int, Tensor]] = []

    def scores(self, starts: Sequence[Triple]) -> Iterator[tuple[Triple, int, Tensor]]:
        """Pieces of the windows that begin at `starts`: the window's start, the piece's first plane, its scores."""
        tiles = {start: self._cut(start) for start in starts}
        for start in [start for start, tile in tiles.items() if self._is_dark(tile) or self._is_empty(tile)]:
            if not self.skip_empty:
                tiles[start] = self._nothing()
                continue
            del tiles[start]
            if not self._of_empty:
                pieces = score_tiles(self.members, self._nothing()[None], self.figure)
                self._of_empty = [(low, piece.clone()) for _, low, piece in pieces]
            yield from ((start, low, piece) for low, piece in self._of_empty)
        if tiles:
            seen = list(tiles)
            batch = torch.stack(list(tiles.values())) if len(tiles) > 1 else tiles.popitem()[1][None]
            tiles.clear()
            pieces = score_tiles(self.members, batch, self.figure)
            yield from ((seen[number], low, piece) for number, low, piece in pieces)

    def takes_for_air(self, start: Triple) -> bool:
        """Whether a window is taken for air although it holds more than the lowest values."""
        tile = self._cut(start)
        return self._is_dark(tile) and not self._is_empty(tile)

    def _nothing(self) -> Tensor:
        return self.lowest.reshape(-1, 1, 1, 1).expand(-1, *self.window).contiguous()

    def _cut(self, start: Triple) -> Tensor:
        """A window (C, I, J, K), padded where it reaches out of the image."""
        inside, volume = overlap(start, self.window, self.image.shape[1:])
        part = self.image[(slice(None), *volume)]
        if tuple(part.shape[1:]) == self.window:
            return part
        shape = (self.image.shape[0], *self.window)
        tile = filled(shape, self.padding, dtype=self.image.dtype, device=self.image.device)
        tile[(slice(None), *inside)] = part
        return tile

    def _is_dark(self, tile: Tensor) -> bool:
        return self.air is not None and bool((tile.amax(dim=(1, 2, 3)) < self.air).all())

    def _is_empty(self, tile: Tensor) -> bool:
        return bool((tile == self.lowest.reshape(-1, 1, 1, 1)).all())


def _add(live: LiveScores, start: Triple, low: int, scores: Tensor, weights: Tensor) -> None:
    """Blend a piece of a window in: its planes from `low` on, as far as they lie in the volume."""
    first = max(0, -start[0])  # the window's first plane in the volume, where the weights begin
    begin, end = max(low, first), min(low + scores.shape[1], first + weights.shape[0])
    if begin < end:
        j, k = (max(0, -a) for a in start[1:])
        part = scores[:, begin - low : end - low, j : j + weights.shape[1], k : k + weights.shape[2]]
        place = (start[0] + begin, start[1] + j, start[2] + k)
        live.add(place, part, weights[begin - first : end - first])


_PROFILES: dict[str, Callable[[Triple], Tensor]] = {
    "centred": blending_weights,
    "nnunet": nnunet_weights,
    "even": torch.ones,
}
"""Weights (I, J, K) of a window's voxels, as `InferenceConventions.weights` names them."""


def _silence(done: int, total: int) -> None:
    """Nothing is told."""
